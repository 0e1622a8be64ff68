#!/usr/bin/env bash
# Make .venv-torch, the environment of the goldens, from requirements.txt: torch for CPU exists for Python 3.11 alone.
# Nothing is done where it is there and up to date.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$here/../../.venv-torch
cmp -s "$here/requirements.txt" "$venv/requirements.txt" && exit # otherwise it is absent, stale or half made

python311() { # the first 3.11 that runs and can make an environment: a pyenv shim on PATH may do neither
    local candidate
    for candidate in python3.11 python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.11*/bin/python3.11; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

python=$(python311) || { echo "goldens: no Python 3.11 found (looked on PATH and in pyenv), which torch needs" >&2; exit 1; }
"$python" -m venv --clear "$venv"
"$venv/bin/python" -m pip install -qq --no-compile --disable-pip-version-check -r "$here/requirements.txt"
cp "$here/requirements.txt" "$venv/requirements.txt"
