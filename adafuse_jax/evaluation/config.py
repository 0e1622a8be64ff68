"""Configuration of `python -m adafuse_jax.evaluation`: a frozen dataclass whose fields define the flags."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from adafuse_jax.core.fields import MAX_COUNT, MAX_ROWS, MAX_TOKENS, check, flag, require
from adafuse_jax.models.config import QUANTIZE_HEAD_HELP, QUANTIZE_HELP, DType, Quantize


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """Model, adapter, data sets, and how a question is answered."""

    model: str = flag("Hugging Face model directory or hub id", metavar="DIR|ID", text="path")
    adapter: str | None = flag(
        "adapter directory written by train.py; default: the bare backbone", None, "DIR", text="path"
    )
    dataset: tuple[str, ...] = flag(
        "multiple-choice data sets: SOURCE[:SUBSET][#SPLIT][@FORMAT], as in training", metavar="SPEC", text="spec"
    )
    split: str | None = flag(
        "split of every data set that names none by #SPLIT; default: test, else validation, else the only one there is",
        None,
        "NAME",
    )
    skip_bad_rows: bool = flag("leave out rows that cannot be read or used, and log how many and the first", False)
    system: str | None = flag("system message put before each question", None, "TEXT")
    limit: int | None = flag("questions per data set, evenly spaced; default: all of them", None, low=1, high=MAX_COUNT)
    batch_size: int = flag("candidates scored together, and questions answered together", 16, low=1, high=MAX_ROWS)
    max_length: int | None = flag(
        "tokens of a question with its answer; longer ones are left out; default: the model's context",
        None,
        low=2,
        high=MAX_TOKENS,
    )
    generate: bool = flag("also let the model answer greedily, and match its text to the choices", True)
    max_new_tokens: int = flag("tokens of a generated answer, at most", 16, low=1, high=MAX_COUNT)
    out: str | None = flag("JSON file for the results", None, "FILE", text="path")
    dtype: DType | None = flag("type of weights and activations; default: the model's own", None)
    quantize: Quantize | None = flag(QUANTIZE_HELP, None)
    quantize_head: bool = flag(QUANTIZE_HEAD_HELP, False)

    def __post_init__(self) -> None:
        check(self)
        require(len(self.dataset) > 0, "--dataset is empty; name at least one data set")
        if self.out is not None:
            out = Path(self.out)
            folder = out.parent
            require(not os.path.isdir(out), f"--out {out}: is a directory; name a file in it")
            require(os.path.isdir(folder), f"--out {out}: {folder} is no directory; make it, or name another file")
            require(os.access(folder, os.W_OK), f"--out {out}: {folder} is not a writable directory; name another file")
