"""The lengths of a prompt's chunks."""

from __future__ import annotations

import pytest

from adafuse_jax.inference.prefill import CHUNKS, MAX_TOKENS, Prefill, chunk_lengths
from adafuse_jax.inference.rows import Row
from adafuse_jax.inference.sampling import Sampling


def test_little_is_padding_and_no_chunk_is_needless():
    for length in range(1, 2500):
        sizes = chunk_lengths(length)
        padding = sum(sizes) - length
        assert 0 <= padding < (length / 2 if length > 256 else max(48, length))
        assert len(sizes) == -(-length // CHUNKS[-1])
    assert [chunk_lengths(n) for n in (128, 512, 1100)] == [[128], [512], [1024, 128]]


@pytest.mark.parametrize("rows", [1, 9, 32, 1000])
def test_tokens_of_a_program_are_bounded(rows):
    prompt = [1] * 5000
    made = [
        Row(
            slot=i, prompt=prompt, budget=1, sampling=Sampling.of(), seed=0, sample=i, stop_ids=(), reuse_cache=False,
            cached=0 if i else 100,
        )
        for i in range(rows)
    ]  # fmt: skip
    prefill = Prefill.of(made, 4, whole=True)
    assert sum(prefill.sizes) >= len(prompt) - (100 if rows == 1 else 0)
    assert rows * max(prefill.sizes) <= max(MAX_TOKENS, CHUNKS[0] * rows)
