"""Accuracy on multiple-choice data sets: `python -m adafuse_jax.evaluation --model DIR --adapter DIR --dataset SPEC…`."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adafuse_jax.core import runtime
from adafuse_jax.core.atomic_files import write_json
from adafuse_jax.core.cli import run_cli
from adafuse_jax.core.errors import UserError
from adafuse_jax.core.flags import parse_flags
from adafuse_jax.evaluation.config import EvaluationConfig

log = logging.getLogger("adafuse_jax.evaluation")

SPLITS = ("test", "validation")
COLUMNS = {
    "accuracy": "accuracy",
    "accuracy_norm": "per character",
    "accuracy_bytes": "per byte",
    "generated": "generated",
}


def run(config: EvaluationConfig) -> dict[str, Any]:
    """Load everything, then score every data set. All mistakes in the data show before the backbone is read."""
    from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint
    from adafuse_jax.data.left_out import log_unwritten_system
    from adafuse_jax.data.tokenizer import load_tokenizer
    from adafuse_jax.evaluation.loading import load
    from adafuse_jax.evaluation.multiple_choice import Questions, evaluate, mean_of

    checkpoint = HFCheckpoint.open(config.model, config.quantize, config.quantize_head)
    directory, context = checkpoint.directory, checkpoint.config.context_length
    if config.max_length is not None and config.max_length > context:
        raise UserError(f"--max-length {config.max_length} exceeds the {context} positions of {config.model}; lower it")
    tokenizer, token_budget = load_tokenizer(directory, config.adapter), config.max_new_tokens if config.generate else 0
    if config.system is not None:
        log_unwritten_system(tokenizer, config.model)
    sets = []
    for text in config.dataset:
        split, examples = read_questions(text, config)
        try:
            questions = Questions.encode(
                examples, tokenizer, config.max_length or context, token_budget=token_budget, system=config.system
            )
        except UserError as error:
            raise UserError(f"{text}: {error}") from error
        if questions.left_out:
            log.warning("%s: %d of %d questions are too long, and left out", text, questions.left_out, len(examples))
        sets.append((text, split, questions))
    loaded = load(checkpoint, config.adapter, config.dtype, tokenizer=tokenizer)
    largest = max(int(row.tokens.max()) for *_, questions in sets for rows in questions.candidates for row in rows)
    if largest >= loaded.model.config.vocab_size:
        raise UserError(
            f"{directory}: the data has token {largest} and the model {loaded.model.config.vocab_size} tokens: the "
            "tokenizer is of another model; restore the files of one"
        )
    new_tokens = config.max_new_tokens if config.generate else None
    results = [
        {"dataset": text, "split": split}
        | evaluate(loaded, questions, batch_size=config.batch_size, max_new_tokens=new_tokens)
        for text, split, questions in sets
    ]
    settings = {**dataclasses.asdict(config), "dtype": loaded.dtype}
    return {"settings": settings, "datasets": results, "mean": mean_of(results)}


def read_questions(text: str, config: EvaluationConfig) -> tuple[str, list[Any]]:
    """(split, its multiple-choice questions), at most `limit` of them, evenly spaced."""
    from adafuse_jax.data.examples import MultipleChoice
    from adafuse_jax.data.sources import Dataset, DatasetSpec

    spec = DatasetSpec.parse(text)
    if spec.weight is not None:
        raise UserError(f"--dataset {text}: a weight means nothing in an evaluation; leave ={spec.weight:g} out")
    data = Dataset(spec, skip_bad_rows=config.skip_bad_rows)
    split = spec.split or config.split or data.evaluation_split(SPLITS)
    examples = data.load(split).examples
    questions = [example for example in examples if isinstance(example, MultipleChoice)]
    if len(questions) < len(examples):
        raise UserError(f"--dataset {text}: its rows are no multiple-choice questions; give a data set with choices")
    count = min(len(questions), config.limit or len(questions))
    return split, [questions[i * len(questions) // count] for i in range(count)]


def table(report: dict[str, Any]) -> str:
    """One row per data set and one for their mean; accuracies in percent ± standard error."""
    names = [name for name in COLUMNS if name in report["mean"]]
    rows = [["data set", "questions", "left out", *(COLUMNS[name] for name in names), "unmatched"]]
    for result in report["datasets"]:
        source = result["dataset"]
        shown = Path(source).name if os.path.exists(source) else source
        counts = [f"{shown} ({result['split']})", str(result["questions"]), str(result["left_out"])]
        rows.append([*counts, *(_percent(result, name) for name in names), str(result.get("unmatched", ""))])
    if len(report["datasets"]) > 1:
        rows.append(["mean", "", "", *(_percent(report["mean"], name) for name in names), ""])
    if "generated" not in names:
        rows = [row[:-1] for row in rows]
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))])
        for name, *cells in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _percent(result: dict[str, Any], name: str) -> str:
    error = result[f"{name}_stderr"]
    return f"{100 * result[name]:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def write(report: dict[str, Any], out: Path) -> None:
    """The file appears complete or not at all."""
    try:
        write_json(out, report)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another file") from error


def main(argv: Sequence[str], program: str = "python -m adafuse_jax.evaluation") -> int:
    """Accuracy on multiple-choice data sets."""
    (config,) = parse_flags(main.__doc__, (EvaluationConfig,), argv, program)
    runtime.set_up()
    with runtime.memory_errors("lower --batch-size or --max-length, or give --dtype bfloat16"):
        report = run(config)
    if config.out is not None:
        write(report, Path(config.out))
    sys.stdout.write(table(report) + "\n")
    return 0


if __name__ == "__main__":
    run_cli(main)
