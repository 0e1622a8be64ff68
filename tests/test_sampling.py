"""Sampling against numpy, and text that streams."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adafuse_jax.data.chat import load_tokenizer
from adafuse_jax.decoding.sampling import Sampling, keep_likely, penalize, sample
from adafuse_jax.decoding.stream import TextStream


def reference_keep(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Ids that top-k, then top-p leave, by sorting one row at a time."""
    order = np.argsort(-logits)
    order = order[:top_k] if top_k else order
    p = np.exp(logits[order] - logits[order].max())
    p /= p.sum()
    count = int(np.searchsorted(np.cumsum(p), top_p)) + 1
    return np.sort(order[:count])


class TestKeepLikely:
    @pytest.mark.parametrize(
        ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (5, 1.0), (0, 0.5), (0, 0.01), (7, 0.8), (99, 0.9)]
    )
    def test_equals_numpy(self, top_k, top_p):
        logits = 2 * np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
        kept = keep_likely(jnp.array(logits), jnp.int32(top_k), jnp.float32(top_p))
        for row, values in zip(np.asarray(kept), logits, strict=True):
            np.testing.assert_array_equal(np.flatnonzero(np.isfinite(row)), reference_keep(values, top_k, top_p))
            np.testing.assert_array_equal(row[np.isfinite(row)], values[np.isfinite(row)])


class TestPenalty:
    def test_pushes_seen_tokens_down_whatever_their_sign(self):
        logits = jnp.array([[2.0, -2.0, 2.0, -2.0]])
        seen = jnp.array([[True, True, False, False]])
        np.testing.assert_allclose(penalize(logits, seen, 2.0), [[1.0, -4.0, 2.0, -2.0]])


class TestSample:
    def test_greedy_takes_the_largest(self):
        logits = jnp.array([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
        np.testing.assert_array_equal(sample(logits, Sampling.of(), jax.random.key(0), None), [1, 0])

    @staticmethod
    def draw(logits, sampling: Sampling, times: int) -> np.ndarray:
        """One row, with as many keys."""
        keys = jax.random.split(jax.random.key(0), times)
        return np.asarray(jax.vmap(lambda key: sample(logits[None], sampling, key, None)[0])(keys))

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_frequencies_follow_the_softmax(self, temperature):
        logits = jnp.array([1.0, 0.0, -1.0, 2.0])
        drawn = self.draw(logits, Sampling.of(temperature=temperature), 20000)
        frequencies = np.bincount(drawn, minlength=4) / len(drawn)
        np.testing.assert_allclose(frequencies, jax.nn.softmax(logits / temperature), atol=0.015)

    def test_only_kept_tokens_are_drawn(self):
        logits = jnp.array([1.0, 0.5, 0.0, -9.0])
        assert set(self.draw(logits, Sampling.of(temperature=1.0, top_k=2), 5000).tolist()) == {0, 1}

    def test_a_row_draws_what_it_draws_alone(self):
        logits, sampling = jax.random.normal(jax.random.key(1), (50, 30)), Sampling.of(temperature=1.0, top_p=0.9)
        rows, alone = (
            sample(logits, sampling, jax.random.key(2), None),
            [int(sample(row[None], sampling, jax.random.key(2), None)[0]) for row in logits],
        )
        np.testing.assert_array_equal(rows, alone)
        assert len(set(alone)) > 5

    def test_values_change_without_recompiling(self):
        step = jax.jit(sample)
        for temperature, top_k, top_p in [(0.5, 0, 1.0), (1.0, 3, 0.9), (2.0, 1, 0.1)]:
            sampling = Sampling.of(temperature=temperature, top_k=top_k, top_p=top_p)
            step(jnp.zeros((2, 8)), sampling, jax.random.key(0), None)
        assert step._cache_size() == 1


class FakeTokenizer:
    """One id per byte."""

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", errors="replace")


def streamed(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(FakeTokenizer(), stop)
    pieces = []
    for byte in text.encode():
        pieces.append(stream.push(byte))
        if stream.stopped:
            break
    pieces.append(stream.flush())
    return pieces, stream


class TestTextStream:
    @pytest.mark.parametrize("text", ["plain", "naïve café", "日本語 🎉 ok", "", "ends in 🎉"])
    def test_pieces_make_the_text_and_hold_whole_characters(self, text):
        pieces, stream = streamed(text)
        assert "".join(pieces) == stream.text == text
        assert all("\ufffd" not in piece for piece in pieces)

    @pytest.mark.parametrize(
        ("stop", "wanted"),
        [(("STOP",), "one S ST STO "), (("two", "STOP"), "one S ST STO "), (("absent",), None), (("S",), "one ")],
    )
    def test_text_ends_before_the_stop_string(self, stop, wanted):
        text = "one S ST STO STOP two"
        pieces, stream = streamed(text, stop)
        assert "".join(pieces) == stream.text == (text if wanted is None else wanted)
        assert stream.stopped == (wanted is not None)

    def test_nothing_of_a_stop_string_is_ever_released(self):
        pieces, _ = streamed("abcabcabd rest", ("abcabd",))
        assert "".join(pieces) == "abc"

    def test_what_only_looked_like_a_stop_is_released(self):
        pieces, stream = streamed("abcab", ("abcabd",))
        assert "".join(pieces) == "abcab"
        assert not stream.stopped

    def test_equals_decoding_all_at_once_with_real_tokenizers(self, stories260k_dir, smollm2_dir):
        text = "Once upon a time, there was naïve 日本語 🎉 text.\n\n  Twice!"
        for directory in (stories260k_dir, smollm2_dir):
            tokenizer = load_tokenizer(directory)
            ids = tokenizer(text)["input_ids"]
            stream = TextStream(tokenizer)
            for token in ids:
                stream.push(token)
            stream.flush()
            assert stream.text == tokenizer.decode(ids, skip_special_tokens=True)
