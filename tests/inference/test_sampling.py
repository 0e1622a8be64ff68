"""Sampling against numpy, and text that streams."""

from __future__ import annotations

import zlib
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adafuse_jax.data.chat import load_tokenizer
from adafuse_jax.inference.detokenizer import TextStream
from adafuse_jax.inference.sampling import Sampling, keep_likely, penalize, row_keys, sample

compiled = jax.jit(sample)


def keys(rows: int):
    return jax.random.split(jax.random.key(0), rows)


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
        filtered = keep_likely(jnp.array(logits), jnp.int32(top_k), jnp.float32(top_p))
        for row, values in zip(np.asarray(filtered), logits, strict=True):
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
        np.testing.assert_array_equal(sample(logits, Sampling.of(), keys(2), None), [1, 0])

    @staticmethod
    def draw(logits, sampling: Sampling, times: int) -> np.ndarray:
        """Samples of `times` rows of the same logits."""
        return np.asarray(compiled(jnp.tile(logits, (times, 1)), sampling, keys(times), None))

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
            sample(logits, sampling, keys(50), None),
            [int(sample(row[None], sampling, key[None], None)[0]) for row, key in zip(logits, keys(50), strict=True)],
        )
        np.testing.assert_array_equal(rows, alone)
        assert len(set(alone)) > 5

    def test_rows_with_settings_of_their_own_draw_what_they_draw_alone(self):
        """A greedy row beside sampled ones too, and a row without a penalty beside one with it."""
        settings = [
            Sampling.of(), Sampling.of(temperature=1.3, top_k=5), Sampling.of(temperature=0.4, top_p=0.8),
            Sampling.of(repetition_penalty=1e6), Sampling.of(temperature=2.0, repetition_penalty=3.0),
        ]  # fmt: skip
        logits = jax.random.normal(jax.random.key(1), (5, 30))
        seen = jax.random.bernoulli(jax.random.key(2), 0.3, (5, 30)).at[3, jnp.argmax(logits[3])].set(True)
        together = sample(logits, Sampling.stack(settings), keys(5), seen)
        alone = [int(sample(logits[i][None], s, keys(5)[i][None], seen[i][None])[0]) for i, s in enumerate(settings)]
        assert together.tolist() == alone
        assert (alone[0], alone[3] == logits[3].argmax()) == (logits[0].argmax(), False)

    def test_values_change_without_recompiling(self):
        step = jax.jit(lambda *given: sample(*given))
        for temperature, top_k, top_p in [(0.5, 0, 1.0), (1.0, 3, 0.9), (2.0, 1, 0.1)]:
            sampling = Sampling.of(temperature=temperature, top_k=top_k, top_p=top_p)
            step(jnp.zeros((2, 8)), sampling, keys(2), None)
        assert step._cache_size() == 1

    def test_rows_of_the_same_logits_draw_apart(self):
        assert len(set(self.draw(jnp.zeros(50), Sampling.of(temperature=1.0), 20).tolist())) > 10

    LOGITS = np.array([3.0, 2.999, -50.0, 2.9985, 0.0, -1e-3], np.float32)

    @pytest.mark.parametrize(
        "temperature", [1e-3, 1e-5, 1e-7, 1e-8, 1e-10, 1e-30, 1e-38, 1e-45, 5e-324, 0.7, 1e3, 1e30, 1e38, 1e39, 1e300]
    )
    def test_any_temperature_draws_from_the_float64_distribution(self, temperature):
        exact = (self.LOGITS.astype(np.float64) - self.LOGITS.max()) / max(temperature, 1e-300)
        exact = np.exp(exact) / np.exp(exact).sum()
        drawn = self.draw(jnp.asarray(self.LOGITS), Sampling.of(temperature=temperature), 20000)
        np.testing.assert_allclose(np.bincount(drawn, minlength=6) / 20000, exact, atol=0.015)

    @pytest.mark.parametrize("top_p", [1e-3, 1e-38, 1e-45, 5e-324])
    def test_a_tiny_top_p_leaves_the_likeliest(self, top_p):
        assert set(self.draw(jnp.asarray(self.LOGITS), Sampling.of(temperature=1.0, top_p=top_p), 200).tolist()) == {0}

    @pytest.mark.parametrize(
        ("penalty", "wanted"), [(1e-38, 1), (1e-45, 1), (1e-300, 1), (1e38, 3), (1e39, 3), (1e300, 3)]
    )
    @pytest.mark.parametrize("temperature", [0.0, 1e-8, 1.0])
    def test_extreme_penalties_stay_finite(self, penalty, wanted, temperature):
        """Tokens 0, 1, 2 and 5 were seen: their sign decides, and among those of one sign their size."""
        logits = jnp.array([[2.0, 5.0, 0.0, 0.5, -1.0, -3.0]] * 50)
        seen = jnp.tile(jnp.array([True, True, True, False, False, True]), (50, 1))
        sampling = Sampling.of(temperature=temperature, repetition_penalty=penalty)
        drawn = np.asarray(compiled(logits, sampling, keys(50), seen))
        if temperature == 1.0 and penalty > 1:  # tokens 0, 1 and 2 are left with logits of 0
            assert set(drawn.tolist()) <= {0, 1, 2, 3, 4}
        else:
            assert set(drawn.tolist()) == {wanted}

    def test_a_row_s_key_is_of_seed_prompt_and_sample(self):
        def data(*args) -> list:
            return jax.random.key_data(row_keys(*args)).tolist()

        both = data(1, [[1, 2], [3]], [0, 0])
        assert both == [*data(1, [[1, 2]], [0]), *data(1, [[3]], [0])]
        others = [data(2, [[1, 2]], [0])[0], data(1, [[1, 2]], [1])[0], *both]
        assert len({tuple(key) for key in others}) == 4

    @pytest.mark.parametrize("seed", [0, 7, 2**31 - 1, 2**31, 2**32 - 1])
    def test_any_seed_is_that_of_jax_random(self, seed):
        digest = zlib.crc32(np.array([1, 2], np.int64).tobytes())
        wanted = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), digest), 3)
        assert (row_keys(seed, [[1, 2]], [3])[0] == wanted).all()


class FakeTokenizer:
    """Tokenizer with one id per byte, and one for the special token <end>."""

    END = 256
    all_special_tokens = ("<end>",)
    added_tokens_decoder: ClassVar[dict] = {}

    def decode(self, ids, *, skip_special_tokens, **_):
        end = b"" if skip_special_tokens else b"<end>"
        return b"".join(end if i == self.END else bytes([i]) for i in ids).decode("utf-8", errors="replace")


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

    @pytest.mark.parametrize(
        ("stop", "wanted"),
        [
            (("<end>",), "aé"),
            (("x<end>", "zzz"), "aéb"),
            (("é<end>b",), "a"),
            (("<end>bx<end>",), "aé"),
            (("<end>bx<end>!",), "aébxcd"),
            (("c", "<end>"), "aé"),
            (("b",), "aé"),
            (("éb",), "a"),
            (("éb", "<end>"), "aé"),
            (("q<end>",), "aébxcd"),
        ],
    )
    def test_stop_strings_with_special_tokens(self, stop, wanted):
        stream = TextStream(FakeTokenizer(), stop)
        pieces = []
        for part in ("aé", None, "bx", None, "cd"):
            for token in [FakeTokenizer.END] if part is None else part.encode():
                if not stream.stopped:
                    pieces.append(stream.push(token))
        pieces.append(stream.flush())
        assert "".join(pieces) == stream.text == wanted
        assert stream.stopped == (wanted != "aébxcd")

    def test_a_stop_in_the_last_broken_character_s_text(self):
        class Glued(FakeTokenizer):
            def decode(self, ids, **_):
                return "".join("STOP\ufffd" if i == 1 else "a" for i in ids)

        stream = TextStream(Glued(), ("STOP",))
        assert [stream.push(0), stream.push(1), stream.flush()] == ["a", "", ""]
        assert stream.stopped
        assert stream.text == "a"

    def test_equals_decoding_all_at_once_with_real_tokenizers(self, stories260k_dir, smollm2_dir):
        text = "Once upon a time, there was naïve 日本語 🎉 text.\n\n  Twice!"
        for directory in (stories260k_dir, smollm2_dir):
            tokenizer = load_tokenizer(directory)
            ids = tokenizer(text)["input_ids"]
            stream = TextStream(tokenizer, () if directory == stories260k_dir else ("<|im_end|>x",))
            for token in ids:
                stream.push(token)
            stream.flush()
            assert stream.text == tokenizer.decode(ids, skip_special_tokens=True)
