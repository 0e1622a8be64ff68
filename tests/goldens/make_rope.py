#!/usr/bin/env python3
"""Queries and keys as transformers rotates them, for each case of rope_cases.py, in `rope.npz` beside this file.

`<case>/<length>` [2, length, heads, H] has the rotated queries and keys of a sequence, `<case>/decoded` [2, 16, heads, H]
those of the tokens that are read one by one after a prompt of 24 tokens, past the original length. `rope_models.npz` has
the logits [2, V] behind the two texts of each model of rope_models.py.

    python make_rope.py             write                   (Python 3.11, requirements.txt; check.sh sets that up)
    python make_rope.py --check     compute again and compare; exit 1 with a line per difference
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from make_goldens import HERE, differences, forward, load
from rope_cases import CASES, HEAD_DIM, LENGTHS, RopeCase, config, heads

sys.path.insert(0, str(HERE.parent))  # the tests import this module by the same name
from goldens import rope_models

OUT = HERE / "rope.npz"
MODELS = HERE / "rope_models.npz"
WRITTEN = OUT.with_name("rope_written.json")
"""Case → the keys that the project writes for it; `tests/models/test_rotary.py` compares them with what it does write."""
PROMPT, DECODED = 24, 16


class Reference:
    """The rotation of one case, with the state that transformers keeps between calls."""

    def __init__(self, case: RopeCase, keys: dict | None = None):
        name = {"gemma3": "Gemma3Text"}.get(case.module, case.module.capitalize())
        self.module = importlib.import_module(f"transformers.models.{case.module}.modeling_{case.module}")
        made = getattr(transformers, f"{name}Config")
        self.config = made(head_dim=HEAD_DIM, **(config(case) if keys is None else keys))
        rotary = f"{name.removesuffix('Text')}RotaryEmbedding"
        self.embedding, self.layer_type = getattr(self.module, rotary)(self.config), case.layer_type

    def __call__(self, positions: torch.Tensor, x: np.ndarray) -> np.ndarray:
        """Queries and keys [2, T, heads, H], both `x` before."""
        x = torch.from_numpy(x).movedim(0, 1)[None]  # [1, heads, T, H]
        kinds = {} if self.layer_type is None else {"layer_type": self.layer_type}
        q, k = self.module.apply_rotary_pos_emb(x, x, *self.embedding(x, positions[None], **kinds))
        if scale := getattr(self.module, "get_llama_4_attn_scale", None):
            parameters = self.config.rope_parameters
            original = parameters["original_max_position_embeddings"]
            q = q * scale(positions[None], parameters["llama_4_scaling_beta"], original)
        return torch.cat([q, k]).movedim(1, 2).numpy()


def golden(name: str) -> dict[str, np.ndarray]:
    case, found = CASES[name], {}
    for length in LENGTHS:
        found[f"{name}/{length}"] = Reference(case)(torch.arange(length), heads(length))
    reference, x = Reference(case), heads(PROMPT + DECODED)
    reference(torch.arange(PROMPT), x[:PROMPT])
    steps = [reference(torch.tensor([at]), x[at : at + 1]) for at in range(PROMPT, PROMPT + DECODED)]
    return found | {f"{name}/decoded": np.concatenate(steps, axis=1)}


def differences_of_written(name: str, keys: dict, committed: dict[str, np.ndarray]) -> list[str]:
    """Differences between a case and what transformers makes of the keys that the project writes for it."""
    case = CASES[name]
    for_all = {key: value for key, value in config(case).items() if key not in case.keys or "max_position" in key}
    for_all.pop("original_max_position_embeddings", None)
    found = {f"{name}/{n}": Reference(case, for_all | keys)(torch.arange(n), heads(n)) for n in LENGTHS}
    return differences(f"written {name}", {key: committed[key] for key in found}, found)


def logits_of_model(case: rope_models.Case) -> np.ndarray:
    """Logits [2, V] behind the case's texts."""
    with tempfile.TemporaryDirectory() as folder:
        model = load(rope_models.write_model_dir(case, Path(folder)))
    texts = (rope_models.tokens(case, length) for length in rope_models.LENGTHS)
    return np.concatenate([forward(model, text[None])[:, -1] for text in texts])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with what is on disk instead of writing")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    transformers.logging.disable_progress_bar()
    computed = {key: value for name in CASES for key, value in golden(name).items()}
    of_models = {name: logits_of_model(case) for name, case in rope_models.CASES.items()}
    if not arguments.check:
        np.savez_compressed(OUT, **computed)
        np.savez_compressed(MODELS, **of_models)
        return 0
    with np.load(MODELS) as committed:
        found = differences(MODELS.name, dict(committed), of_models)
    with np.load(OUT) as committed:
        found += differences(OUT.name, dict(committed), computed)
        for name, keys in json.loads(WRITTEN.read_text()).items():
            found += differences_of_written(name, keys, dict(committed))
    for line in found:
        print(f"goldens: {line}", file=sys.stderr)
    if not found:
        print(f"goldens: {len(CASES)} kinds of RoPE, and {len(of_models)} models with them, agree with transformers")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
