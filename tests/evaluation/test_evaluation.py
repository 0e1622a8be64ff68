"""Multiple choice by log-likelihood and by generation, against sums written out; `python -m adafuse_jax.evaluation` as users
call it."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

from adafuse_jax.adapters.adafuse import AdaFuse
from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.checkpoints.adapter_directory import save_adapter
from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint
from adafuse_jax.core.errors import UserError
from adafuse_jax.data.examples import MultipleChoice
from adafuse_jax.evaluation.loading import load
from adafuse_jax.evaluation.matching import match, option_texts
from adafuse_jax.evaluation.multiple_choice import (
    Questions,
    chosen_by_likelihood,
    evaluate,
    generated_answers,
    mean_of,
    prompt_of,
    standard_error,
)

LETTERS = MultipleChoice(
    "Question: Which purrs?\nA. a dog\nB. a cat\nC. a cat and a dog\n\nAnswer with…", ("A", "B", "C"), 1
)
NAMED = MultipleChoice(
    "Which purrs?\n\nAnswer1: a dog Answer2: a big cat Answer3: 7:30 pm\n\nAnswer format: answer1/answer2/answer3",
    tuple(f"the correct answer is answer{i}" for i in (1, 2, 3)),
    1,
)


@pytest.mark.parametrize(
    ("example", "answer", "choice"),
    [
        (LETTERS, "B", 1),
        (LETTERS, "B.", 1),
        (LETTERS, " (C) a cat and a dog", 2),
        (LETTERS, "B because it is one", 1),
        (LETTERS, "The answer is C", 2),
        (LETTERS, "Answer: A", 0),
        (LETTERS, "I choose option B, of course.", 1),
        (LETTERS, "A cat purrs.", 1),  # the article A is no label; the text is
        (LETTERS, "It is a cat and a dog", 2),  # the texts of A and B are part of C's
        (LETTERS, "a DOG!", 0),
        (LETTERS, "a doghouse", None),
        (LETTERS, "a, b or c", None),  # letters must be capitals
        (LETTERS, "(A) or (B)", None),
        (LETTERS, "BA", None),
        (LETTERS, "", None),
        (NAMED, "the correct answer is answer2", 1),
        (NAMED, "The correct  answer is Answer3.", 2),
        (NAMED, "answer1", 0),
        (NAMED, "answer12", None),
        (NAMED, "answer1 and answer2", None),
        (NAMED, "the correct answer is answer4", None),
        (NAMED, "It would be a big\ncat", 1),
        (NAMED, "at 7:30 pm", 2),
    ],
)
def test_which_choice_an_answer_means(example: MultipleChoice, answer: str, choice: int | None):
    assert match(answer, example) == choice


def test_texts_behind_the_labels():
    assert option_texts(LETTERS) == ["a dog", "a cat", "a cat and a dog"]
    assert option_texts(NAMED) == ["a dog", "a big cat", "7:30 pm"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, data sets, and an adapter that changes the model's answers."""
    folder = tiny.write_folder(tmp_path_factory.mktemp("evaluation"))
    checkpoint = HFCheckpoint.open(folder / "model")
    adapter = AdaFuse(AdapterConfig(num_experts=4, rank=2), checkpoint.config, rngs=nnx.Rngs(0))
    for name, experts in adapter.experts.items():
        experts.B[...] = 0.3 * jax.random.normal(jax.random.key(len(name)), experts.B.shape)
    identity = checkpoint.identity()
    save_adapter(adapter, folder / "adapter", backbone_name="tiny", backbone_identity=identity)
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path):
    return load(str(folder / "model"), str(folder / "adapter"))


@pytest.fixture(scope="module")
def examples() -> list[MultipleChoice]:
    """Candidates of several lengths, in characters and in bytes, for which the three scores disagree."""
    return [MultipleChoice(f"Which is {i}?", ("éé", "it is so", "no"), i % 3) for i in range(6)]


@jax.jit
def all_logits(model: Any, adapter: Any, tokens: Any) -> Any:
    return model(tokens, adapter=adapter).logits


def log_likelihood(loaded: Any, example: MultipleChoice, choice: str) -> float:
    """Sum of log-probabilities, one candidate at a time, softmax in float64. Padding stands behind, where a causal
    model does not look."""
    start = prompt_of(example, loaded.tokenizer)
    tokens = [*start, *loaded.tokenizer(choice, add_special_tokens=False)["input_ids"]]
    padded = np.zeros((1, 256), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(all_logits(loaded.model, loaded.adapter, padded)[0], np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return float(sum(logp[t - 1, tokens[t]] for t in range(len(start), len(tokens))))


def test_choices_by_likelihood(loaded: Any, examples: list[MultipleChoice]):
    questions = Questions.encode(examples, loaded.tokenizer, 256)
    chosen = chosen_by_likelihood(loaded, questions, batch_size=5)
    lengths = {"accuracy": [1, 1, 1], "accuracy_norm": [2, 8, 2], "accuracy_bytes": [4, 8, 2]}
    scores = np.array([[log_likelihood(loaded, e, c) for c in e.choices] for e in examples])
    for name, length in lengths.items():
        assert chosen[name] == (scores / length).argmax(1).tolist()
    assert len({tuple(choices) for choices in chosen.values()}) == 3, "the three definitions must differ on this data"


def test_answers_do_not_depend_on_the_batch(loaded: Any, examples: list[MultipleChoice]):
    questions = Questions.encode(examples[:5], loaded.tokenizer, 256)
    alone, together = (generated_answers(loaded, questions, batch_size=size, max_new_tokens=6) for size in (1, 4))
    assert alone == together
    assert len(set(alone)) > 1


def test_long_questions_are_left_out_and_counted(loaded: Any, examples: list[MultipleChoice]):
    long = MultipleChoice("long " * 60, examples[0].choices, 0)
    questions = Questions.encode([*examples, long], loaded.tokenizer, 256)
    assert (questions.examples, questions.left_out) == (examples, 1)
    longer = MultipleChoice("Which is 10?", examples[0].choices, 0)
    length = len(prompt_of(longer, loaded.tokenizer)) + 20
    fits, tight = (
        Questions.encode([*examples, longer], loaded.tokenizer, n, token_budget=20) for n in (length, length - 1)
    )
    assert (fits.left_out, tight.left_out) == (0, 1)


def test_results_and_their_errors(loaded: Any, examples: list[MultipleChoice]):
    result = evaluate(loaded, Questions.encode(examples, loaded.tokenizer, 256), batch_size=8, max_new_tokens=None)
    p, n = result["accuracy"], len(examples)
    answers = [e.answer for e in examples]
    scores = np.array([[log_likelihood(loaded, e, c) for c in e.choices] for e in examples])
    right = (scores.argmax(1) == answers).astype(float)
    assert p == right.mean()
    assert result["accuracy_stderr"] == pytest.approx(right.std(ddof=1) / np.sqrt(n))
    assert "generated" not in result
    other = {**result, "accuracy": 1.0, "accuracy_stderr": 0.0}
    mean = mean_of([result, other])
    assert mean["accuracy"] == pytest.approx((p + 1) / 2)
    assert mean["accuracy_stderr"] == pytest.approx(result["accuracy_stderr"] / 2)
    assert standard_error(1.0, 1) is None


def call(flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> int | None:
    monkeypatch.setattr(sys, "argv", ["evaluation", *tiny.as_flags(flags)])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("adafuse_jax.evaluation", run_name="__main__")
    return end.value.code


def test_table_and_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    rows = [
        {"question": f"Which is {i}?" + " really" * (40 if i == 1 else 0), "choices": ["1", "2"], "answer": i % 2}
        for i in range(4)
    ]
    tiny.write_jsonl(tmp_path / "test.jsonl", rows)
    flags = {
        "model": folder / "model",
        "adapter": folder / "adapter",
        "dataset": [str(folder / "choices.jsonl"), str(tmp_path / "test.jsonl")],
        "max_new_tokens": 3,
        "batch_size": 4,
        "limit": 4,
        "out": tmp_path / "result.json",
    }
    assert call(flags, monkeypatch) == 0
    report = json.loads((tmp_path / "result.json").read_text())
    assert [(r["split"], r["questions"], r["left_out"]) for r in report["datasets"]] == [
        ("train", 4, 0),
        ("train", 3, 1),
    ]
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[-2:] == ["generated", "unmatched"]
    assert [line.split()[0] for line in lines] == ["choices.jsonl", "test.jsonl", "mean"]
    for line, result in zip(lines, [*report["datasets"], report["mean"]], strict=True):
        assert f"{100 * result['accuracy']:.1f} ± {100 * result['accuracy_stderr']:.1f}" in line
    assert not list(tmp_path.glob("*.partial"))
    assert call({**flags, "generate": None, "no_generate": True, "out": None, "limit": 1}, monkeypatch) == 0
    assert "generated" not in capsys.readouterr().out


@dataclass(frozen=True)
class Case:
    """Case of bad input: `flags` change those of a good call, `{}` in a text is the folder, `expected` are parts of the
    message."""

    name: str
    expected: tuple[str, ...]
    flags: dict[str, Any] = field(default_factory=dict)


BAD = [
    Case("no data set", ("--dataset is required",), {"dataset": None}),
    Case("no batch", ("--batch-size is 0", "must be an integer from"), {"batch_size": 0}),
    Case("no questions asked", ("--limit is 0", "must be an integer from"), {"limit": 0}),
    Case("no length", ("--max-length is -1", "must be an integer from"), {"max_length": -1}),
    Case("no new tokens", ("--max-new-tokens is 0", "must be an integer from"), {"max_new_tokens": 0}),
    Case("beyond the context", ("--max-length 300", "256 positions", "lower it"), {"max_length": 300}),
    Case("nothing fits", ("{}/choices.jsonl", "none of 12 questions fits 20 tokens", "raise"), {"max_length": 20}),
    Case("no choices", ("{}/alpha.jsonl", "no multiple-choice", "give a data set"), {"dataset": ["{}/alpha.jsonl"]}),
    Case("no such data", ("{}/none.jsonl",), {"dataset": ["{}/none.jsonl"]}),
    Case("no such split", ("no split 'test'", "{}/choices.jsonl", "train"), {"split": "test"}),
    Case("weight", ("{}/choices.jsonl=2", "weight", "leave =2 out"), {"dataset": ["{}/choices.jsonl=2"]}),
    Case("out below nothing", ("--out {}/none/r.json", "no directory", "make it"), {"out": "{}/none/r.json"}),
    Case("out is a directory", ("--out {}/model", "is a directory", "name a file"), {"out": "{}/model"}),
    Case("no model", ("{}/none", "no such model directory"), {"model": "{}/none"}),
    Case("no adapter", ("{}/none", "no such adapter directory"), {"adapter": "{}/none"}),
    Case("adapter of another model", ("trained on another backbone",), {"model": "{}/other", "adapter": "{}/adapter"}),
]


@pytest.mark.parametrize("case", BAD, ids=[case.name.replace(" ", "_") for case in BAD])
def test_one_line_and_nothing_changed(
    case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    if not (folder / "other").exists():
        tiny.write_model(folder / "other", name="another")

    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [placed(v) for v in value]
        return value.replace("{}", str(folder)) if isinstance(value, str) else value

    flags = {"model": folder / "model", "dataset": [str(folder / "choices.jsonl")]}
    before = tiny.snapshot(folder)
    code = call(flags | {name: placed(value) for name, value in case.flags.items()}, monkeypatch)
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    for text in case.expected:
        assert text.replace("{}", str(folder)) in line, line
    assert (code, out) == (2, "")
    assert tiny.snapshot(folder) == before


def test_a_form_that_no_model_has_is_refused(folder):
    with pytest.raises(UserError, match="dtype is 'int8': choose from float32, bfloat16, float16"):
        load(str(folder / "model"), dtype="int8")
    with pytest.raises(UserError, match="quantize_head is 'no': choose from True, False"):  # as the harness reads it
        HFCheckpoint.open(folder / "model", "int8", "no")
    with pytest.raises(UserError, match=r"quantize is .*int8.*: choose from int8, int4, int4-g64"):
        HFCheckpoint.open(folder / "model", ["int8"])
