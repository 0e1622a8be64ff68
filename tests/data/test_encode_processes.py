"""Processes that tokenise: how many, what each is given, and one line for each way in which they fail."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import CHATML, write_tokenizer

from adafuse_jax.core.errors import UserError
from adafuse_jax.data import encoders, templates
from adafuse_jax.data.cache import prepared
from adafuse_jax.data.chat import CHUNK_CHARACTERS, chunks, encode_chunk, load_tokenizer
from adafuse_jax.data.examples import Chat, Message, MultipleChoice, Text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), template=CHATML))


@pytest.fixture
def encode(tokenizer, monkeypatch):
    """Encode a text by one of two processes."""
    monkeypatch.setattr(encoders, "_processors", lambda: 2)
    monkeypatch.setattr(encoders, "OWN_CHUNKS", 0)

    def encode() -> list[Any]:
        with encoders._Encoders(tokenizer, 128, datetime.now()) as processes:
            return list(processes.encoded([[Text("a")]]))

    return encode


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import os; os._exit(7)", r"exit code 7\): it wrote no error: limit the processors"),
        ("import no_module_of_this_name", r"exit code 1\): ModuleNotFoundError: No module named 'no_module_of_this_name'"),
        ("import sys; sys.exit('x' * 10_000 + '\\n\\nlast\\n\\n')", r"exit code 1\): last: limit"),
        ("import os, sys; print(1, file=sys.stderr); os.kill(os.getpid(), 9)",
         r"exit code -9\): is there enough memory for 2 of them\?"),
    ],
    ids=["silent", "an import", "an exit", "a kill"],
)  # fmt: skip
def test_one_that_ends_is_a_line_with_its_last(encode, monkeypatch, program, message):
    monkeypatch.setattr(encoders, "START", program)
    with pytest.raises(UserError, match=message):
        encode()


def test_one_that_cannot_be_started_is_no_fault_of_the_cache(encode, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))

    def build(_: Path) -> dict[str, Any]:
        encode()
        return {}

    message = "^a process that tokenises the data cannot be started: No such file or directory"
    with pytest.raises(UserError, match=message), prepared(tmp_path / "cache", {}, build):
        pass


def test_nor_is_one_that_renders_templates(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(templates, "_worker", templates._Worker())
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(UserError, match=r"^chat template: a process to render it cannot be started: No such file"):
        encode_chunk([Chat((Message("user", "a"), Message("assistant", "b")))], tokenizer, 128)


@pytest.mark.parametrize(
    ("quota", "count"),
    [
        ("200000 100000", 2),
        ("250000 100000", 2),
        ("1000 100000", 1),
        ("9900000 100000", 8),
        ("max 100000", 8),
        (None, 8),
    ],
)
def test_as_many_as_the_container_may_use(tmp_path, monkeypatch, quota, count):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(encoders, "CPU_QUOTA", tmp_path / "cpu.max")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert encoders._processors() == count


HALF = "x" * (CHUNK_CHARACTERS // 2 + 1)
TURNS = Message("user", "a"), Message("assistant", "b")


@pytest.mark.parametrize(
    "example",
    [
        Text(HALF),
        Chat((Message("user", HALF), TURNS[1])),
        Chat((TURNS[0], Message("assistant", "b", extra=HALF))),
        Chat(TURNS, tools=HALF),
        MultipleChoice("a", ("b", HALF), 0),
    ],
    ids=["a text", "a turn", "a call of tools", "tools", "a choice"],
)
def test_chunks_are_bounded_by_all_of_their_text(example):
    assert [len(chunk) for chunk in chunks([example] * 3)] == [1, 1, 1]
