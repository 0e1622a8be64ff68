"""Building of a run's data: rows read, divided, tokenised and packed in a stream, into files; and reading of these files.

    0/ 1/ …      the packed rows of each data set (`example_files`)
    held_out/    the held-out examples
    choices/     the candidates of its questions

Data sets are counted before any is tokenised: which examples are held out depends on how many there are.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from adafuse_jax.core.errors import UserError
from adafuse_jax.data.batches import Batches
from adafuse_jax.data.chat import Chunk, Encoded, Encoding, encode_all, encode_choices
from adafuse_jax.data.encoders import encode_stream
from adafuse_jax.data.example_files import read_examples, read_rows, write_examples, write_plan
from adafuse_jax.data.examples import Example, MultipleChoice
from adafuse_jax.data.packing import plan
from adafuse_jax.data.sources import Dataset, held_out_indices
from adafuse_jax.evaluation.heldout import HeldOut
from adafuse_jax.training.config import TrainConfig

log = logging.getLogger(__name__)

HELD_OUT_SPLITS = ("validation", "test")
FINGERPRINT_TOKENS = 2**20
"""Rows that are laid out at a time: so many tokens, or one row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """The data sets of a run, opened."""

    training: list[Dataset]
    evaluation: list[Dataset]


@dataclass(slots=True, kw_only=True, eq=False)
class Part:
    """The examples of a split: `count` in all, `held` of them (indices, ascending) held out, of which those in `picked` are
    scored and get into `found`."""

    data: Dataset
    split: str
    count: int
    held: Int[np.ndarray, " held"] = field(default_factory=lambda: np.zeros(0, np.int64))
    picked: set[int] = field(default_factory=set)
    found: list[Example] = field(default_factory=list)

    def training(self) -> Iterator[Example]:
        """The examples that are not held out; on the way, `found` is filled."""
        held = set(self.held.tolist())
        for i, example in enumerate(self.data.examples(self.split)):
            if i not in held:
                yield example
            elif i in self.picked:
                self.found.append(example)

    def find(self) -> None:
        """Fill `found`, of a part that is not trained on."""
        if self.picked:
            with closing(self.data.examples(self.split)) as examples:
                first = islice(enumerate(examples), max(self.picked) + 1)
                self.found = [example for i, example in first if i in self.picked]


def build(config: TrainConfig, sources: Sources, tokenizer: Any, directory: Path) -> dict[str, Any]:
    """Write the prepared data into `directory`; returns what else is to be known of it: `lengths` T of rows by data set,
    `held_out`, `fingerprint` and `largest_token`. Raises UserError and OSError."""
    training, held_out = parts(config, sources)
    pick(held_out, config.eval_examples)
    facts: dict[str, Any] = {"lengths": []}
    largest = _Largest()
    for i, part in enumerate(training):
        facts["lengths"].append(_write_rows(part, tokenizer, config, directory / str(i), largest))
    for part in held_out:
        if part not in training:
            part.find()
    scored = [example for part in held_out for example in part.found]
    facts["held_out"] = _write_held_out(_held_out(scored, tokenizer, config), directory, largest)
    fingerprint = _fingerprint(batches(config, sources, directory, facts))
    return facts | {"fingerprint": fingerprint, "largest_token": largest.token}


def batches(config: TrainConfig, sources: Sources, directory: Path, facts: dict[str, Any]) -> Batches:
    """The batches over the rows in `directory`. Raises UserError for weights that fit no mixture."""
    return Batches(
        rows=tuple(read_rows(directory / str(i), length) for i, length in enumerate(facts["lengths"])),
        seed=config.seed,
        batch_size=config.batch_size,
        grad_accum=config.grad_accum,
        weights=tuple(data.spec.weight for data in sources.training),
        epochs=None if config.steps else config.epochs,
    )


def parts(config: TrainConfig, sources: Sources) -> tuple[list[Part], list[Part]]:
    """Parts to train on, by data set, and parts held out. Both hold the part of a split that is divided."""
    held_out = []
    for data in sources.evaluation:
        split = data.evaluation_split(HELD_OUT_SPLITS)
        count = data.count(split).examples
        held_out.append(Part(data=data, split=split, count=count, held=np.arange(count)))
    training = []
    for data in sources.training:
        split = data.training_split()
        part = Part(data=data, split=split, count=data.count(split).examples)
        training.append(part)
        if config.eval_examples > 0 and not config.eval_dataset:
            held = _held_out_of(part, config)
            held_out += [held] if held is not None else []
    return training, held_out


def _held_out_of(part: Part, config: TrainConfig) -> Part | None:
    """The validation or test split, a share of the training part, which is then divided, or nothing."""
    data = part.data
    split = data.held_out_split(HELD_OUT_SPLITS, besides=data.find(part.split))
    if split is not None:
        count = data.count(split).examples
        return Part(data=data, split=split, count=count, held=np.arange(count))
    if config.eval_fraction == 0:
        return None
    try:
        part.held = held_out_indices(part.count, config.eval_fraction, config.seed)
    except UserError as error:
        raise UserError(f"{data.spec.source}: {error}, or --eval-examples 0") from error
    return part


def pick(held_out: list[Part], limit: int) -> None:
    """Choose up to `limit` of the examples, evenly spaced so that every data set is represented."""
    total = sum(len(part.held) for part in held_out)
    count, before = min(total, limit), 0
    chosen = np.arange(count) * total // max(count, 1)
    for part in held_out:
        own = chosen[(chosen >= before) & (chosen < before + len(part.held))] - before
        part.picked = set(part.held[own].tolist())
        before += len(part.held)


class _Largest:
    """The largest token in the rows that pass."""

    token = 0

    def of(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        for chunk in chunks:
            self.token = max(self.token, int(chunk.tokens.max(initial=0)))
            yield chunk


def _write_rows(part: Part, tokenizer: Any, config: TrainConfig, directory: Path, largest: _Largest) -> int:
    """Tokenise and pack the training examples of a part; returns the length T of its rows."""
    name, total = part.data.spec.source, part.count - len(part.held)
    encoding = Encoding(name=name, skip_bad_rows=config.skip_bad_rows)
    with closing(encode_stream(part.training(), tokenizer, config.max_length, encoding, total=total)) as chunks:
        lengths = write_examples(directory, largest.of(chunks))
    if not len(lengths):
        raise UserError(f"{name}: no response of its {total} examples fits --max-length {config.max_length}; raise it")
    if encoding.counts["unfit"]:
        log.warning(
            "%s: %d of %d examples left out: their prompt alone fills --max-length %d, or no turn has weight",
            name, encoding.counts["unfit"], total, config.max_length,
        )  # fmt: skip
    if encoding.counts["chats"] and encoding.counts["full"]:
        log.warning(
            "%s: %d of %d examples fill --max-length %d, where they are cut",
            name, encoding.counts["full"], total, config.max_length,
        )  # fmt: skip
    planned = plan(lengths, config.max_length, packing=config.packing)
    write_plan(directory, planned)
    return planned.length


def _held_out(examples: list[Example], tokenizer: Any, config: TrainConfig) -> HeldOut:
    rows, dropped = encode_all(
        examples, tokenizer, config.max_length, name="held out", skip_bad_rows=config.skip_bad_rows
    )
    choices, answers = [], []
    for example in examples:
        if isinstance(example, MultipleChoice):
            try:
                candidates = encode_choices(example, tokenizer, config.max_length)
            except UserError:  # counted and logged above
                continue
            if candidates is None:
                dropped += 1
            else:
                choices.append(candidates)
                answers.append(example.answer)
    if dropped:
        log.warning(
            "held out: %d answers or questions do not fit --max-length %d and are not scored",
            dropped,
            config.max_length,
        )
    return HeldOut(rows=rows, choices=choices, answers=answers)


def _write_held_out(held_out: HeldOut, directory: Path, largest: _Largest) -> dict[str, Any]:
    candidates = [row for question in held_out.choices for row in question]
    for name, rows in (("held_out", held_out.rows), ("choices", candidates)):
        write_examples(directory / name, largest.of(map(Chunk.of, rows)))
    return {"candidates": [len(question) for question in held_out.choices], "answers": held_out.answers}


def read_held_out(directory: Path, facts: dict[str, Any]) -> HeldOut:
    """The held-out examples in `directory`."""
    candidates = iter(read_examples(directory / "choices"))
    choices: list[list[Encoded]] = [list(islice(candidates, n)) for n in facts["held_out"]["candidates"]]
    return HeldOut(rows=read_examples(directory / "held_out"), choices=choices, answers=facts["held_out"]["answers"])


def _fingerprint(batches: Batches) -> str:
    """SHA-256 of the rows [n, T] of each pool, laid out one array behind the other."""
    length = batches.length
    count = max(1, FINGERPRINT_TOKENS // length)
    shapes = [(sum(map(len, pool)), length) for pool in batches.pools]
    digest = hashlib.sha256(repr((batches.weights, shapes)).encode())
    for pool in batches.pools:
        for name in ("tokens", "loss_mask", "segment_ids"):
            for rows in pool:
                for at in range(0, len(rows), count):
                    block = np.arange(at, min(at + count, len(rows)))
                    digest.update(rows.arrays(block, length, (name,))[name])
    return digest.hexdigest()
