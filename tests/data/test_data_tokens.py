"""Long texts tokenised window by window give the tokens of the whole text, in little memory."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from data_fixtures import write_tokenizer

from adafuse_jax.data import tokens
from adafuse_jax.data.chat import load_tokenizer
from adafuse_jax.data.tokens import tokens_and_starts

PROSE = (tiny.REPOSITORY / "README.md").read_text() + "naïve 東京 😀\r\n\t  x" * 50


@pytest.fixture(scope="module", params=["smollm2", "stories260k", "bytes"])
def tokenizer(request, tmp_path_factory):
    if request.param == "bytes":
        return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("t") / "t", merges_from=PROSE, trim_offsets=True))
    return load_tokenizer(request.getfixturevalue(f"{request.param}_dir"))


@pytest.mark.parametrize("window", [300, 1111])
def test_windows_give_the_tokens_of_the_whole(tokenizer, monkeypatch, window):
    text = "".join(chr(97 + i % 7) + PROSE[i * 13 : i * 13 + 800] for i in range(40))
    (expected,) = tokens_and_starts([text], tokenizer)
    for name, value in (("BATCH_CHARACTERS", 100), ("WINDOW", window), ("OVERLAP", 128)):
        monkeypatch.setattr(tokens, name, value)
    found = list(tokens_and_starts(["short", text, "", "x" * 90, "y" * 20], tokenizer))
    for ours, theirs in zip(found[1], expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    single = [next(tokens_and_starts([t], tokenizer))[0].tolist() for t in ("short", "", "x" * 90, "y" * 20)]
    assert [ids.tolist() for i, (ids, _) in enumerate(found) if i != 1] == single


@pytest.mark.parametrize("texts", [["a b " * 2000], ["a b " * 30] * 50, ["x" * 120, "a b " * 300, "y"]])
def test_the_tokenizer_gets_little_at_a_time(tokenizer, monkeypatch, texts):
    given = []

    class Counting:
        convert_ids_to_tokens = tokenizer.convert_ids_to_tokens

        def __call__(self, text, **kwargs):
            given.append(len(text))
            return tokenizer(text, **kwargs)

        @property
        def backend_tokenizer(self):
            return self

        def encode_batch(self, batch, **kwargs):
            given.append(sum(map(len, batch)))
            return tokenizer.backend_tokenizer.encode_batch(batch, **kwargs)

    for name, value in (("BATCH_CHARACTERS", 600), ("WINDOW", 300), ("OVERLAP", 100)):
        monkeypatch.setattr(tokens, name, value)
    assert len(list(tokens_and_starts(texts, Counting()))) == len(texts)
    assert max(given) <= 600


def test_text_without_a_sure_boundary_is_tokenised_whole(tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "_seam", lambda *_: None)
    text = "no seam " * 400
    (expected,) = tokens_and_starts([text], tokenizer)
    for name, value in (("BATCH_CHARACTERS", 100), ("WINDOW", 256), ("OVERLAP", 64)):
        monkeypatch.setattr(tokens, name, value)
    (found,) = tokens_and_starts([text], tokenizer)
    np.testing.assert_array_equal(found[0], expected[0])
