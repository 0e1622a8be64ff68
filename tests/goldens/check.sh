#!/usr/bin/env bash
# Compute the goldens again with transformers, PEFT, lm_eval and torch on CPU and compare them with the committed ones.
# torch for CPU exists for Python 3.11 alone, so this keeps a second environment, .venv-torch, from requirements.txt.
#
#   tests/goldens/check.sh              compare, LoRAs with PEFT too; needs the project's own .venv, or JAX_PYTHON
#   tests/goldens/check.sh --out DIR    write into DIR (arguments go to make_goldens.py and make_lm_eval.py)
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
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ $# -gt 0 ]; then
    "$venv/bin/python" "$here/make_goldens.py" "$@"
    exec "$venv/bin/python" "$here/make_lm_eval.py" "$@"
fi
"$venv/bin/python" "$here/make_goldens.py" --check
"$venv/bin/python" "$here/make_families.py" --check
"$venv/bin/python" "$here/make_lm_eval.py" --check
"$venv/bin/python" "$here/make_peft.py" --check
"$venv/bin/python" "$here/make_rope.py" --check

# What the project exports, read by the programs that it is for.
exports=$(mktemp -d)
trap 'rm -rf "$exports"' EXIT
JAX_PLATFORMS=cpu "${JAX_PYTHON:-$here/../../.venv/bin/python}" "$here/export_loras.py" "$exports"
"$venv/bin/python" "$here/make_peft.py" --exports "$exports"
