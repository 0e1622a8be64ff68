"""Perplexity of a model on a text, plain and quantised, beside a reference in torch of the same scheme.

    python -m benchmarks.quantised_quality --model DIR --text docs/*.md --tokens 8192 --rows rows.json --record OUT.json
    TORCH_PYTHON -m benchmarks.peers.quantised_perplexity --model DIR --rows rows.json --quantize int4 --record OUT.json

The text is split into rows of `--length` tokens, each scored from its second token on; float32, in both programs. `--rows`
gets the tokens for the reference. The change has its standard error over the tokens: rounding moves the loss of each by far
more than their mean, so that a few thousand tokens leave a tenth of a percent open. `--record` has an entry for each label;
what is measured again replaces its own part, and on another number of tokens the whole entry.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint, load_backbone
from adafuse_jax.core import runtime
from adafuse_jax.data.tokenizer import load_tokenizer
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.quantised import LAYOUTS, Quantisation, uneven_groups
from benchmarks.common.records import command_line, facts, write_json


def rows_of(tokens: Sequence[int], length: int, count: int) -> np.ndarray:
    """[rows, length] of the first `count` tokens."""
    rows = min(count, len(tokens)) // length
    return np.asarray(tokens[: rows * length], np.int32).reshape(rows, length)


@jax.jit
def losses_of(model: Backbone, row: jax.Array) -> jax.Array:
    """−log p of a row's tokens but the first."""
    logits = model.logits(model.run(row[None, :-1]).hidden[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, row[1:])


def losses(model: Backbone, rows: np.ndarray) -> np.ndarray:
    return np.concatenate([losses_of(model, jnp.asarray(row)) for row in rows]).astype(np.float64)


def change(found: np.ndarray, plain: np.ndarray) -> tuple[float, float]:
    """Change of the perplexity and its standard error, in percent."""
    differences = found - plain
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    return 100 * math.expm1(differences.mean()), 100 * error


def measure(checkpoint: HFCheckpoint, rows: np.ndarray, names: Sequence[Any], *, head: bool) -> dict[str, Any]:
    """Name → perplexity, change and its error in percent, or the reason why the model cannot be quantised so."""
    found: dict[str, Any] = {}
    plain = losses(load_backbone(checkpoint, "float32"), rows)
    found["plain"] = {"perplexity": round(math.exp(plain.mean()), 4)}
    print(f"plain: {found['plain']['perplexity']}", flush=True)
    for name in names:
        if reason := uneven_groups(checkpoint.config, LAYOUTS[name]):
            found[name] = {"refused": reason}
            print(f"{name}: {reason}", flush=True)
            continue
        of_name = losses(load_backbone(checkpoint.quantised(name, head), "float32"), rows)
        percent, error = change(of_name, plain)
        name = Quantisation(LAYOUTS[name], head).name
        found[name] = {
            "perplexity": round(math.exp(of_name.mean()), 4), "change_pct": round(percent, 3), "error_pct": round(error, 3)
        }  # fmt: skip
        print(f"{name}: {found[name]['perplexity']} ({percent:+.2f}% ± {error:.2f})", flush=True)
    return found


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", nargs="+", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192, help="at most")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--quantize", nargs="+", choices=LAYOUTS, default=[*LAYOUTS])
    parser.add_argument("--quantize-head", action="store_true", help="the head in 8 bits, too")
    parser.add_argument("--rows", type=Path, help="JSON of the rows")
    parser.add_argument("--record", type=Path, help="JSON of the results")
    parser.add_argument("--label", help="of the record's entry; default: the directory's name")
    arguments = parser.parse_args(argv)
    runtime.exact_float32()
    checkpoint = HFCheckpoint.open(arguments.model)
    text = "\n".join(path.read_text(encoding="utf-8") for path in arguments.text)
    tokens = load_tokenizer(checkpoint.directory)(text)["input_ids"]
    rows = rows_of(tokens, arguments.length, arguments.tokens)
    if not len(rows):
        raise SystemExit(f"the text has {len(tokens)} tokens, no row of {arguments.length}; give a longer text")
    if arguments.rows is not None:
        arguments.rows.write_text(json.dumps(rows.tolist()))
    print(f"{arguments.model}: {rows.size} tokens in {len(rows)} rows", flush=True)
    found = measure(checkpoint, rows, arguments.quantize, head=arguments.quantize_head)
    if arguments.record is not None:
        records = json.loads(arguments.record.read_text()) if arguments.record.exists() else {}
        key = arguments.label or checkpoint.directory.name
        settings = {**facts(), "command": command_line("benchmarks.quantised_quality", argv), "tokens": rows.size}
        before = records.get(key, {})
        records[key] = (before if before.get("tokens") == rows.size else {}) | settings | found
        write_json(arguments.record, records)


if __name__ == "__main__":
    main(sys.argv[1:])
