"""Perplexity in torch and transformers of weights rounded to b bits in groups, written out plainly:

    s = f · max|w| / (2^(b−1) − 1),   w ← s · clamp(round(w / s), −2^(b−1), 2^(b−1) − 1)        of every linear of the layers

f is 1 for 8 bits, for 4 bits the one of `FACTORS` that makes the least squared error of a group.

    python -m benchmarks.peers.quantised_perplexity --model DIR --rows rows.json --quantize int4-g64 --record quality.json

The rows are those that `benchmarks.quantised_quality` writes; its record gets the results as `torch`.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

FACTORS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, -1.0, -0.96, -0.92, -0.88, -0.84, -0.8, -0.76, -0.72)
MARGIN = 1e-4
"""Part of the error by which a later factor must be better."""
SCHEMES = {"int8": (8, 0), "int4": (4, 128), "int4-g64": (4, 64)}
"""`--quantize` → bits and inputs of a group, 0 for a whole row."""


def rounded(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """[out, in]; a group size of 0 is a whole row."""
    grouped, half = weight.reshape(weight.shape[0], -1, group_size or weight.shape[1]), 2 ** (bits - 1)
    best, least = grouped, torch.full((*grouped.shape[:2], 1), math.inf)
    for factor in FACTORS if bits == 4 else (1.0,):
        scale = grouped.abs().amax(dim=-1, keepdim=True) * (factor / (half - 1))
        found = torch.clamp(torch.round(grouped / scale), -half, half - 1) * scale
        error = ((found - grouped) ** 2).sum(dim=-1, keepdim=True)
        is_less = error < least * (1 - MARGIN)
        best, least = torch.where(is_less, found, best), torch.where(is_less, error, least)
    return best.reshape(weight.shape)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--quantize", choices=SCHEMES, required=True)
    parser.add_argument("--record", type=Path, help="JSON of benchmarks.quantised_quality")
    parser.add_argument("--label", help="of the record's entry; default: the directory's name")
    arguments = parser.parse_args()
    bits, group_size = SCHEMES[arguments.quantize]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.weight.copy_(rounded(module.weight, bits, group_size))
    rows, total = json.loads(arguments.rows.read_text()), 0.0
    for row in rows:
        ids = torch.tensor([row])
        losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        total += float(losses)
    perplexity = math.exp(total / (sum(map(len, rows)) - len(rows)))
    print(f"{arguments.quantize}: {perplexity:.4f}")
    if arguments.record is not None:
        records = json.loads(arguments.record.read_text())
        entry = records[arguments.label or Path(arguments.model).name]
        entry.setdefault("torch", {"version": torch.__version__})[arguments.quantize] = round(perplexity, 4)
        arguments.record.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
