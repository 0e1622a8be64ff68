"""Mistakes in data sets and prompts: one line, exit code 2, nothing on disk changed."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.utils import _http
from mistakes import PROMPTS, Case, check_refused, edit_json, parametrize, write

TRAIN = [
    # data
    Case("data missing", ("{}/none.jsonl", "no such dataset", "give"), {"dataset": "{}/none.jsonl"}),
    Case("data preset misspelt", ("slimorka", "did you mean slimorca"), {"dataset": "slimorka"}),
    Case("data on an unreachable hub", ("nobody/nothing", "hub", "check"), {"dataset": "nobody/nothing"}),
    Case("data format unknown", ("alpha.jsonl", "'tsv'", "alpaca"), {"dataset": "{}/alpha.jsonl@tsv"}),
    Case("data weight 0", ("alpha.jsonl", "weight", "above 0"), {"dataset": "{}/alpha.jsonl=0"}),
    Case("data weight nan", ("alpha.jsonl", "weight", "above 0"), {"dataset": "{}/alpha.jsonl=nan"}),
    Case("data weight of some", ("weight", "each"), {"dataset": ["{}/alpha.jsonl=2", "{}/beta.jsonl"]}),
    Case("data weight tiny", ("dataset 1", "weight", "raise"), {"dataset": ["{}/alpha.jsonl=1e-9", "{}/beta.jsonl=1"]}),
    Case(
        "data of lone surrogates",
        ("{}/alpha.jsonl", "surrogate", "row 1, line 1", "correct"),
        damage=write("alpha.jsonl", '{"instruction": "a", "output": "\\ud83d"}\n'),
    ),
    Case("data spec empty", ("dataset", "SOURCE"), {"dataset": ""}),
    Case("data of unknown type", ("{}/alpha.txt", ".jsonl"), {"dataset": "{}/alpha.txt"}, write("alpha.txt", "x")),
    Case("data folder empty", ("{}/none", "put"), {"dataset": "{}/none"}, lambda folder: (folder / "none").mkdir()),
    Case("data empty", ("{}/alpha.jsonl", "empty", "give"), damage=write("alpha.jsonl", "")),
    Case("data without rows", ("{}/e.json", "no rows", "give"), {"dataset": "{}/e.json"}, write("e.json", "[]")),
    Case(
        "data line malformed",
        ("{}/alpha.jsonl", "line 2", "fix"),
        damage=write("alpha.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": "a" "output"}\n'),
    ),
    Case(
        "data not UTF-8",
        ("{}/alpha.jsonl", "line 1", "UTF-8", "convert"),
        damage=write("alpha.jsonl", b'{"instruction": "caf\xe9", "output": "b"}\n'),
    ),
    Case(
        "data column missing",
        ("{}/alpha.jsonl", "output", "columns"),
        damage=write("alpha.jsonl", '{"instruction": "a"}\n'),
    ),
    Case(
        "data value missing",
        ("{}/alpha.jsonl", "row 2", "'output'"),
        damage=write("alpha.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": null}\n'),
    ),
    Case(
        "data replies empty",
        ("{}/alpha.jsonl", "no usable rows", "give"),
        damage=write("alpha.jsonl", '{"instruction": "a", "output": ""}\n'),
    ),
    Case("data parquet corrupt", ("{}/a.parquet", "check"), {"dataset": "{}/a.parquet"}, write("a.parquet", b"PAR1")),
    Case("data longer than max length", ("{}/alpha.jsonl", "--max-length 8", "raise"), {"max_length": 8}),
    Case(
        "nothing to hold out",
        ("{}/alpha.jsonl", "cannot hold out", "give"),
        {"eval_examples": 4},
        write("alpha.jsonl", '{"instruction": "a", "output": "b"}\n'),
    ),
    Case(
        "held-out data missing",
        ("{}/none.jsonl", "no such dataset", "give"),
        {"eval_dataset": "{}/none.jsonl", "eval_examples": 4},
    ),
]
DECODE = [
    # prompts
    Case(
        "a later prompt too long",
        ("prompt 2", "shorten"),
        PROMPTS | {"batch_size": 1},
        write("p.jsonl", '{"prompt": "Hi"}\n{"prompt": "' + "word " * 5000 + '"}\n'),
    ),
    *(
        Case(
            f"prompts line {line}",
            ("--prompts-file {}/p.jsonl, line 1", "give"),
            PROMPTS,
            write("p.jsonl", line + "\n"),
        )
        for line in ("[1]", '"hello"', "5", "null")
    ),
    Case("prompt longer than context", ("the prompt has", "context holds 256", "shorten"), {"prompt": "a" * 300}),
    Case("prompt not UTF-8", ("--prompt", "not UTF-8", "give"), {"prompt": "caf\udce9"}),
    Case(
        "prompt without a token",
        ("prompt is empty", "give"),
        {"prompt": "", "raw": True},
        edit_json("model/tokenizer_config.json", bos_token=None),
    ),
    Case("prompts missing", ("--prompts-file {}/p.jsonl", "give an existing"), PROMPTS),
    Case("prompts are a directory", ("--prompts-file {}/model", "give"), PROMPTS | {"prompts_file": "{}/model"}),
    Case("prompts empty", ("--prompts-file {}/p.jsonl", "no prompt", "write"), PROMPTS, write("p.jsonl", "\n \n")),
    Case(
        "prompts not UTF-8",
        ("--prompts-file {}/p.jsonl", "not UTF-8", "save"),
        PROMPTS,
        write("p.jsonl", b'{"prompt": "caf\xe9"}'),
    ),
    Case(
        "prompts line malformed",
        ("--prompts-file {}/p.jsonl, line 2", "give"),
        PROMPTS,
        write("p.jsonl", '{"prompt": "a"}\n{"prompt": }\n'),
    ),
    Case(
        "prompts line is no prompt",
        ("--prompts-file {}/p.jsonl, line 1", "give"),
        PROMPTS,
        write("p.jsonl", '{"promt": "a"}\n'),
    ),
    Case(
        "prompts of lone surrogates",
        ("--prompts-file {}/p.jsonl, line 1", "not UTF-8", "give"),
        PROMPTS,
        write("p.jsonl", '{"prompt": "\\ud83d"}\n'),
    ),
    Case(
        "prompts role unknown",
        ("--prompts-file {}/p.jsonl, line 1", "turn 1: unknown role '5'", "use system, "),
        PROMPTS,
        write("p.jsonl", '{"messages": [{"role": 5, "content": "a"}]}\n'),
    ),
]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts to reach the Hub follow each other at once: its client waits 23 s between them."""
    monkeypatch.setattr(_http, "time", SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None}))


@parametrize(("train", TRAIN), ("decode", DECODE))
def test_one_line_and_nothing_changed(
    script: str, case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    check_refused(script, case, folder, monkeypatch, capfd)


@pytest.mark.parametrize("chat", [True, None])
def test_stdin_not_utf8(refused: Callable, monkeypatch: pytest.MonkeyPatch, chat: bool | None):
    # As in a C locale, where Python lets the bytes through.
    broken = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", broken)
    refused("decode", Case("stdin", ("stdin: not UTF-8", "give UTF-8"), {"prompt": None, "chat": chat}))
