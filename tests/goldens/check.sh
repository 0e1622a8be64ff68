#!/usr/bin/env bash
# Compute the goldens again with transformers + torch on CPU and compare them with the committed ones.
# torch for CPU exists for Python 3.11 alone, so this keeps a second environment, .venv-torch, from requirements.txt.
#
#   tests/goldens/check.sh              compare (arguments go to make_goldens.py instead of --check)
#   tests/goldens/check.sh --out DIR    write into DIR
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$here/../../.venv-torch

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

if ! cmp -s "$here/requirements.txt" "$venv/requirements.txt"; then # absent, stale or half made
    python=$(python311) || { echo "goldens: no Python 3.11 found (looked on PATH and in pyenv), which torch needs" >&2; exit 1; }
    "$python" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check -r "$here/requirements.txt"
    cp "$here/requirements.txt" "$venv/requirements.txt"
fi
if [ $# -eq 0 ]; then # lm-evaluation-harness with its Hugging Face backend
    HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$venv/bin/python" "$here/make_lm_eval.py" --check
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ $# -eq 0 ]; then set -- --check; fi
exec "$venv/bin/python" "$here/make_goldens.py" "$@"
