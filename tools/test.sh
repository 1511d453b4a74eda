#!/usr/bin/env bash
# The test suite. Without arguments three parts side by side: two that mostly wait for nodes, and share the files of
# tests/integration between them as they come to each, and one that computes, in the time that these leave. With
# arguments, one pytest that is given them. Fails if any part does.
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

set -m  # each part in a process group of its own, which takes an interruption with all that it has started
there=$(mktemp -d)
mkdir "$there/share"
parts=()
end() {
    kill -INT -- "${parts[@]/#/-}" 2>/dev/null || true
    wait
    cat "$there"/*.log
    exit 130
}
trap 'rm -rf "$there"' EXIT
trap end INT TERM
echo "beside the following, and shown after it: the other half of $waiting; ${computing[*]}"
# One thread: beside two other parts a second one makes small products take five times as long.
OMP_NUM_THREADS=1 nice -n 5 "$pytest" "${computing[@]}" >"$there/computing.log" 2>&1 </dev/null &
parts+=("$!")
SHOAL_TEST_SHARE=$there/share "$pytest" "$waiting" >"$there/another.log" 2>&1 </dev/null &
parts+=("$!")
SHOAL_TEST_SHARE=$there/share "$pytest" "$waiting" </dev/null &
parts+=("$!")

failed=0
for part in "${parts[@]}"; do
    wait "$part" || failed=$?
done
cat "$there"/*.log
exit "$failed"
