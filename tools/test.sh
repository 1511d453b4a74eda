#!/usr/bin/env bash
# The test suite. Without arguments two halves side by side, since one mostly waits for nodes and the other computes;
# with arguments, one pytest that is given them. Fails if either half does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
pytest=.venv/bin/pytest

[ "$#" = 0 ] || exec "$pytest" "$@"

waiting=tests/integration
computing=()  # every other folder, so that a new one is not left out
for folder in tests/*/; do
    folder=${folder%/}
    if [ "$folder" != "$waiting" ] && compgen -G "$folder/test_*.py" >/dev/null; then
        computing+=("$folder")
    fi
done

set -m  # each half in a process group of its own, which takes an interruption with all that it has started
log=$(mktemp)
trap 'rm -f "$log"' EXIT
trap 'kill -INT -- "-$second" "-$first" 2>/dev/null || true; wait; cat "$log"; exit 130' INT TERM
echo "${computing[*]}: beside the following, and shown after it"
"$pytest" "${computing[@]}" >"$log" 2>&1 </dev/null &
second=$!
"$pytest" "$waiting" </dev/null &
first=$!

failed=0
wait "$first" || failed=$?
wait "$second" || failed=$?
cat "$log"
exit "$failed"
