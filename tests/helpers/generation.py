"""Prompts, and the tokens that an engine gives for them."""

from __future__ import annotations

import jax.numpy as jnp
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


def by_full_forward(model, adapter, prompt: list[int], answer: list[int]) -> list[int]:
    """Greedy token after each beginning of prompt + answer, from one full forward pass without a cache. It is the answer if
    and only if every token of the answer is greedy. Padded to one length and not jitted: tests share programs."""
    tokens = np.zeros((1, 128), np.int32)
    length = len(prompt) + len(answer)
    tokens[0, :length] = [*prompt, *answer]
    logits = model(tokens, adapter=adapter, unroll=True).logits[0]
    return np.asarray(logits)[len(prompt) - 1 : length - 1].argmax(-1).tolist()


def step_by_modules(model, adapter, fused, token, positions, cache):
    """Decode step by the modules, in place of the megakernel's `fused_step`; the cache may have more rows."""
    rows = jnp.arange(len(token))
    read = cache.of_rows(rows)
    out = model.run(token[:, None], adapter=adapter, positions=positions[:, None], cache=read, unroll=True)
    chosen = None if adapter is None else out.routing.of_first_token()
    return model.logits(out.hidden[:, 0]), chosen, cache.with_rows(rows, out.cache)
