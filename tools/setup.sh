#!/usr/bin/env bash
# Make .venv, with Shoal and its tools in it. `make` calls this when it has to; running it again is always safe.
#
#   tools/setup.sh            check what the machine lacks, then install
#   tools/setup.sh --missing  only name the Debian packages that the machine lacks (nothing when it has them all)
#
# PYTHON=… chooses the interpreter; CC=… the compiler.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usable() { # PYTHON: does it run, and is it new enough?
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        usable "$PYTHON" && echo "$PYTHON"
        return
    fi
    for name in python3 python3.13 python3.12 python3.11; do
        if usable "$name"; then
            echo "$name"
            return
        fi
    done
    return 1
}

compiles() { # PROGRAM FLAG…: a real build, since a header that is there may still be of no use
    # shellcheck disable=SC2086 # CC may carry flags
    printf '%s\n' "$1" | $cc -x c - -o "$scratch/probe" "${@:2}" >/dev/null 2>&1
}

missing_packages() { # one line: what libp2p's fastecdsa, which exists as source only, and venv need
    local missing=() include version
    version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    "$python" -c 'import venv, ensurepip' >/dev/null 2>&1 || missing+=("$version-venv")
    if [ -z "$rebuild" ] && .venv/bin/python -c 'import fastecdsa.point' >/dev/null 2>&1; then
        echo "${missing[*]}" # already built: no compiler is needed
        return
    fi
    cc=${CC:-$("$python" -c 'import sysconfig; print((sysconfig.get_config_var("CC") or "cc").split()[0])')}
    command -v "${cc%% *}" >/dev/null || cc=cc
    include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [ -e "$include/Python.h" ] || missing+=("$version-dev")
    if ! compiles 'int main(void) { return 0; }'; then
        missing+=(build-essential libgmp-dev)
    elif ! compiles $'#include <gmp.h>\nint main(void) { mpz_t n; mpz_init(n); return 0; }' -lgmp; then
        missing+=(libgmp-dev)
    fi
    echo "${missing[*]}"
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

if ! python=$(find_python); then
    if [ "${1:-}" = --missing ]; then
        echo "python3 python3-venv python3-dev build-essential libgmp-dev"
        exit
    fi
    echo "Shoal needs Python 3.11 or newer, and ${PYTHON:-python3} is missing or older: install it (Debian 12 or newer: apt-get install python3 python3-venv python3-dev) or name one with PYTHON=…" >&2
    exit 1
fi

# A virtual environment is built anew when its last set-up did not end, when its interpreter is gone, or when the
# tree has moved since: its scripts hold absolute paths.
rebuild=
if ! usable .venv/bin/python || [ -e .venv/.setting-up ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    rebuild=yes
elif [ -e .venv/.ready ] && [ "$(cat .venv/.ready)" != "$(pwd -P)" ]; then
    rebuild=yes
fi

missing=$(missing_packages)
if [ "${1:-}" = --missing ]; then
    echo "$missing"
    exit
fi
if [ -n "$missing" ]; then
    echo "Shoal cannot be set up yet: run 'apt-get install $missing' as root (or install what these Debian packages hold), then try again" >&2
    exit 1
fi

if [ -n "$rebuild" ]; then
    rm -rf .venv
    mkdir .venv
fi
touch .venv/.setting-up
if [ -n "$rebuild" ]; then
    echo "Making .venv with $("$python" --version)"
    "$python" -m venv .venv
fi
echo "Installing Shoal and its tools into .venv (minutes the first time: PyTorch is large)"
.venv/bin/python -m pip install -qq --disable-pip-version-check --editable '.[dev]'
pwd -P >.venv/.ready
rm .venv/.setting-up
