"""From data-set names to what the loop needs: batches by step, held-out data, and a fingerprint of it all."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adafuse_jax.configs import TrainConfig
from adafuse_jax.core.errors import UserError
from adafuse_jax.data.batches import Batches
from adafuse_jax.data.chat import Encoded, encode_all, encode_choices
from adafuse_jax.data.examples import Example, MultipleChoice, Text
from adafuse_jax.data.packing import Rows, pack
from adafuse_jax.data.sources import DatasetSpec, available_splits, held_out_split, load_examples
from adafuse_jax.evaluation.heldout import HeldOut

log = logging.getLogger(__name__)

HELD_OUT_SPLITS = ("validation", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    batches: Batches
    held_out: HeldOut
    fingerprint: str
    """SHA-256 of the packed rows and their weights: a resumed run must see the same."""
    largest_token: int


def prepare_data(config: TrainConfig, tokenizer: Any) -> Data:
    """Load, tokenise, split and pack the data sets of `config`.

    Held out are, in this order: `eval_dataset`; the validation or test split of each data set; `eval_fraction` of it.
    Raises `UserError` for whatever is wrong with the data.
    """
    specs = [DatasetSpec.parse(text) for text in config.dataset]
    held_out: list[Example] = []
    if config.eval_examples > 0:
        for spec in (DatasetSpec.parse(text) for text in config.eval_dataset):
            splits = available_splits(spec)
            held_out += load_examples(spec, _first_of(HELD_OUT_SPLITS, splits) or splits[0])
    rows = []
    for spec in specs:
        examples = load_examples(spec)
        if config.eval_examples > 0 and not config.eval_dataset:
            split = _first_of(HELD_OUT_SPLITS, available_splits(spec))
            if split:
                held_out += load_examples(spec, split)
            elif config.eval_fraction > 0:
                try:
                    examples, held = held_out_split(examples, config.eval_fraction, config.seed)
                except UserError as error:
                    raise UserError(f"{spec.source}: {error}, or --eval-examples 0") from error
                held_out += held
        rows.append(_pack(examples, spec, tokenizer, config))
    batches = Batches(
        rows=tuple(rows),
        seed=config.seed,
        batch_size=config.batch_size,
        grad_accum=config.grad_accum,
        weights=tuple(spec.weight for spec in specs),
        epochs=None if config.steps else config.epochs,
    )
    evaluation = _held_out(held_out, tokenizer, config)
    parts: list[Rows | Encoded] = [*rows, *evaluation.rows, *(row for rows in evaluation.choices for row in rows)]
    return Data(
        batches=batches,
        held_out=evaluation,
        fingerprint=_fingerprint(batches),
        largest_token=int(max(part.tokens.max() for part in parts)),
    )


def _first_of(wanted: Sequence[str], present: Sequence[str]) -> str | None:
    return next((name for name in wanted if name in present), None)


def _pack(examples: list[Example], spec: DatasetSpec, tokenizer: Any, config: TrainConfig) -> Rows:
    encoded, dropped = encode_all(examples, tokenizer, config.max_length)
    if not encoded:
        raise UserError(
            f"{spec.source}: no response of its {len(examples)} examples fits --max-length {config.max_length}; raise it"
        )
    if dropped:
        log.warning(
            "%s: %d of %d examples left out: their prompt alone fills --max-length %d",
            spec.source, dropped, len(examples), config.max_length,
        )  # fmt: skip
    chats = sum(not isinstance(example, Text) for example in examples)
    cut = sum(len(row.tokens) == config.max_length for row in encoded) if chats else 0
    if cut:
        log.warning(
            "%s: %d of %d examples fill --max-length %d, where they are cut",
            spec.source,
            cut,
            len(examples),
            config.max_length,
        )
    return pack(encoded, config.max_length, packing=config.packing)


def _held_out(examples: list[Example], tokenizer: Any, config: TrainConfig) -> HeldOut:
    """At most `eval_examples` of the examples, evenly spaced so that every data set is represented."""
    count = min(len(examples), config.eval_examples)
    examples = [examples[i * len(examples) // count] for i in range(count)]
    rows, dropped = encode_all(examples, tokenizer, config.max_length)
    choices, answers = [], []
    for example in examples:
        if isinstance(example, MultipleChoice):
            candidates = encode_choices(example, tokenizer, config.max_length)
            if candidates is not None:
                choices.append(candidates)
                answers.append(example.answer)
    dropped += sum(isinstance(example, MultipleChoice) for example in examples) - len(choices)
    if dropped:
        log.warning(
            "held out: %d answers or questions do not fit --max-length %d and are not scored",
            dropped,
            config.max_length,
        )
    return HeldOut(rows=rows, choices=choices, answers=answers)


def _fingerprint(batches: Batches) -> str:
    digest = hashlib.sha256(repr((batches.weights, [rows.tokens.shape for rows in batches.rows])).encode())
    for packed in batches.rows:
        digest.update(packed.tokens.tobytes())
        digest.update(packed.loss_mask.tobytes())
        digest.update(packed.segment_ids.tobytes())
    return digest.hexdigest()
