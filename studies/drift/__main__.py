"""Drift of *switch*, as a command: `python -m studies.drift --model DIR --adapter DIR --out OUT`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import studies.drift
from adafuse_jax import load_backbone
from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint
from adafuse_jax.core import runtime
from adafuse_jax.data.chat import load_tokenizer
from adafuse_jax.inference.backends.merged import adapted_weights
from adafuse_jax.models.config import DType
from benchmarks.common import reports
from benchmarks.common.records import command_line, facts, write_json
from benchmarks.common.timing import Stopwatch
from studies.drift.measure import load_adafuse, measure, sample_tokens, text_tokens

RESULTS = Path("studies/results/cpu")
DTYPES: tuple[DType, ...] = ("bfloat16", "float32")
LENGTH = 256
"""Tokens of a row; the first row is held out."""


def table(results: dict[str, Any]) -> str:
    """Markdown table of the results in drift.json."""
    cells: list[list[str]] = []
    for dtype, of in results.items():
        for row in of["switch"]:
            cells.append([f"switch, {dtype}", f"{row['steps']:,}", f"{row['weight_error']:.1e}", f"{row['kl']:.1e}"])
        cells.append([f"golden, {dtype}", "any", f"{of['golden']['weight_error']:.1e}", f"{of['golden']['kl']:.1e}"])
        cells.append([f"unmerged, {dtype}", "any", "writes none", f"{of['unmerged']['kl']:.1e}"])
    return "\n".join(reports.table(("", "steps", "weight error", "KL, nats"), cells))


def plot(results: dict[str, Any], title: str, picture: Path) -> None:
    """Weight error on the left, KL on the right, over switch steps; the lines of golden and unmerged are level."""
    with reports.picture(picture, ncols=2, figsize=(11, 4.5), layout="constrained") as (figure, panels):
        for dtype, color in zip(results, ("tab:red", "tab:blue"), strict=False):
            for panel, name in zip(panels, ("weight_error", "kl"), strict=True):
                plot_errors(panel, results[dtype], name, dtype, color)
        labels = "‖W − W_exact‖ / ‖W_exact‖", "KL(exact ‖ drifted) of the next token, nats"
        for panel, label in zip(panels, labels, strict=True):
            panel.set(xscale="log", yscale="log", xlabel="switch steps", ylabel=label)
            panel.grid(alpha=0.3)
            panel.legend(fontsize="x-small")
        figure.suptitle(title, fontsize="medium")


def plot_errors(panel: Any, of: dict[str, Any], name: str, dtype: str, color: str) -> None:
    """Plot one error (`name`) over the steps, for weights of one dtype."""
    steps = [row["steps"] for row in of["switch"]]
    panel.plot(steps, [row[name] for row in of["switch"]], "o-", color=color, label=f"switch, {dtype}")
    for strategy, style in (("golden", "--"), ("unmerged", ":")):
        level = of[strategy][name]
        if level is not None and level > 1e-14:  # less is the rounding of the KL itself
            panel.axhline(level, linestyle=style, color=color, label=f"{strategy}, {dtype}: at any step")


def decades_to(steps: int) -> list[int]:
    """1, 10, 100, … and `steps`."""
    return sorted({10**i for i in range(len(str(steps)))} | {steps})


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=studies.drift.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face model directory")
    parser.add_argument("--adapter", type=Path, required=True, help="adapter directory written by train.py")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for drift.json, drift.md and drift.png")
    parser.add_argument("--steps", type=int, default=10000, help="switch steps")
    parser.add_argument("--text", type=Path, help="text whose tokens to use; default: sampled from the model")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps is {arguments.steps}: it must be at least 1")
    watch = Stopwatch()
    runtime.exact_float32()
    checkpoint = HFCheckpoint.open(arguments.model)
    config, identity = checkpoint.config, checkpoint.identity()
    tokenizer = load_tokenizer(arguments.model)
    length = min(LENGTH, config.max_position_embeddings)
    rows, decades = 1 + -(-max(arguments.steps, 2) // length), decades_to(arguments.steps)
    tokens: Any = None
    results: dict[str, Any] = {}
    for dtype in DTYPES:
        model = load_backbone(checkpoint, dtype)
        adapter = load_adafuse(arguments.adapter, config, backbone_identity=identity, dtype=jnp.dtype(dtype))
        if arguments.text is not None:
            tokens = jnp.asarray(text_tokens(arguments.text, tokenizer, rows, length))
        elif tokens is None:
            first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            tokens = sample_tokens(model, adapter, first, rows, length)
        results[dtype] = measure(model, adapter, tokens, decades)

    found = facts()
    a = adapter.config
    shapes = f"{len(a.targets)} linears, E={a.num_experts}, R={a.rank}, k={a.top_k}"
    adapted = int(sum(w.size for w in adapted_weights(model, adapter).values()))
    result = {
        "command": command_line("studies.drift", argv),
        **found,
        "adapter": f"{shapes}, s={a.scale:g}",
        "adapted_weights": adapted,
        "tokens": "sampled at temperature 1" if arguments.text is None else str(arguments.text),
        "held_out_tokens": length,
        "seconds": round(watch.seconds, 1),
        "results": results,
    }
    write_json(arguments.out / "drift.json", result)
    where = "{device}, JAX {jax}".format(**found)
    title = f"{arguments.model.name}, {adapted / 1e6:.1f} M adapted weights ({shapes}), {where}"
    (arguments.out / "drift.md").write_text(f"{title}\n\n{table(results)}\n")
    plot(results, title, arguments.out / "drift.png")
    print(table(results))


if __name__ == "__main__":
    main(sys.argv[1:])
