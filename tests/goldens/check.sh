#!/usr/bin/env bash
# Compute the goldens again with transformers, PEFT, lm_eval and torch on CPU and compare them with the committed ones.
# They run in a second environment, .venv-torch, which environment.sh makes.
#
#   tests/goldens/check.sh              compare, LoRAs with PEFT too; needs the project's own .venv, or JAX_PYTHON
#   tests/goldens/check.sh --out DIR    write into DIR (arguments go to make_goldens.py and make_lm_eval.py)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$here/../../.venv-torch

"$here/environment.sh"
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
