"""Prompts, and the tokens that an engine gives for them."""

from __future__ import annotations

import numpy as np

from adafuse_jax.inference.engine import Engine


def generate(engine: Engine, *prompts, n: int = 16, **options) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]
    for token in engine.generate(prompts, max_new_tokens=n, **options):
        for row, value in zip(rows, token.ids, strict=True):
            row.append(int(value))
    return rows


def prompt_of(model, length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, model.config.vocab_size, length).tolist()
