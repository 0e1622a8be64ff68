"""Settings, examples and batches for training steps on a tiny model."""

from __future__ import annotations

import dataclasses

import numpy as np

from adafuse_jax.data.batches import Batch
from adafuse_jax.data.chat import Encoded
from adafuse_jax.training.config import TrainConfig


def config(**changes) -> TrainConfig:
    return TrainConfig(**({"model": "m", "dataset": ("d",), "output": "o", "learning_rate": 1e-2} | changes))


def examples(model, lengths, seed=0) -> list[Encoded]:
    rng = np.random.default_rng(seed)
    made = []
    for n in lengths:
        mask = np.arange(n) >= n // 2
        made.append(Encoded(rng.integers(3, model.config.vocab_size, n).astype(np.int32), mask))
    return made


def as_batch(rows, accum: int) -> Batch:
    fold = lambda x: x.reshape(accum, -1, x.shape[-1])  # noqa: E731
    return Batch(*(fold(getattr(rows, f.name)) for f in dataclasses.fields(Batch)))
