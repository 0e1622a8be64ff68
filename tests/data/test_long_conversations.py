"""Memory for long conversations: each assistant turn has renderings of all text before it, of which few are kept."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from data_fixtures import CHATML, write_tokenizer

from adafuse_jax.data import chat, templates
from adafuse_jax.data.chat import Encoded, encode_chunk, load_tokenizer
from adafuse_jax.data.examples import Chat, Message
from adafuse_jax.data.replies import Rendered

THINKS_LAST = CHATML.replace("m['content']", "('' if loop.last else ' ') + m['content']")
"""Writes a turn otherwise when others follow, so every assistant turn is a row."""
TURNS, CHARACTERS = 20, 1500


def conversations(count: int) -> list[Chat]:
    """Each with 30 kB of text, and 330 kB of renderings."""
    roles = ("user", "assistant") * (TURNS // 2)
    return [
        Chat(tuple(Message(role, f"{i} {n} " + "x" * CHARACTERS) for n, role in enumerate(roles))) for i in range(count)
    ]


@pytest.fixture
def load(tmp_path):
    return lambda template: load_tokenizer(
        write_tokenizer(tmp_path / "t", template=template, merges_from="x" * CHARACTERS)
    )


def test_renderings_are_not_kept(load, monkeypatch):
    tokenizer, asked, ask = load(CHATML), [], templates._worker.ask

    def counted(template: str, request: dict[str, Any], where: str) -> list[dict[str, Any]]:
        asked.append(len(json.dumps(request["conversations"])))
        return ask(template, request, where)

    monkeypatch.setattr(templates._worker, "ask", counted)
    encode_chunk(conversations(1), tokenizer, 256)
    peaks = []
    for count in (3, 15):
        examples = conversations(count)
        tracemalloc.start()
        try:
            encode_chunk(examples, tokenizer, 256)
            peaks.append(tracemalloc.get_traced_memory()[1] / 1e6)
        finally:
            tracemalloc.stop()
    assert max(asked) < 1.1 * templates.BATCH_CHARACTERS
    assert peaks[1] < peaks[0] + 3, peaks


def test_rows_are_tokenised_some_at_a_time(load, monkeypatch):
    """Rows of ten conversations, one an assistant turn: 1.6 million characters."""
    sizes, encode = [], chat._encode_texts

    def counted(rendered: Sequence[Rendered], tokenizer: Any) -> Iterator[Encoded]:
        sizes.append(sum(len(row.text) for row in rendered))
        return encode(rendered, tokenizer)

    monkeypatch.setattr(chat, "_encode_texts", counted)
    chunk = encode_chunk(conversations(10), load(THINKS_LAST), 512)
    assert chunk.counts["turns"] == len(chunk.lengths) == 10 * TURNS // 2
    assert sum(sizes) > 1.5 * chat.CHUNK_CHARACTERS
    assert max(sizes) < 1.2 * chat.CHUNK_CHARACTERS
