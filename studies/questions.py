"""Multiple-choice questions of the studies: three data sets, each split into training, validation and test, and packed rows.

    set         training questions                           test questions
    openbookqa  LLM-Adapters' training file                  LLM-Adapters' test file
    arc-easy    LLM-Adapters' training file                  LLM-Adapters' test file
    scienceqa   text-only rows of the official training and  text-only rows of the official test split (LLaVA's copy)
                validation splits in MoLA's sample and in
                Think-ScienceQA, each question once

A training question that is also a test question (same text, same choices) is dropped. A tenth of the training questions of
each set, drawn with a fixed seed, is the validation split: learning rates are chosen on it, and no run trains on it.
"""

from __future__ import annotations

import gzip
import json
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from adafuse_jax.core.errors import UserError
from adafuse_jax.data.chat import Encoded, encode_choices
from adafuse_jax.data.examples import MultipleChoice
from adafuse_jax.data.formats import convert
from adafuse_jax.data.sources import held_out_split

SETS = ("scienceqa", "openbookqa", "arc-easy")
FILES = {
    "openbookqa": ("openbookqa_train.llmadapters.json.gz", "openbookqa_test.llmadapters.json.gz"),
    "arc-easy": ("arc-easy_train.llmadapters.json.gz", "arc-easy_test.llmadapters.json.gz"),
}
SCIENCEQA_TRAINING = ("scienceqa_mola_600_textonly.jsonl.gz", "scienceqa_think_textonly.jsonl.gz")
SCIENCEQA_TEST = "scienceqa_test_llava_CQM-A.json.gz"
VALIDATION_SHARE, VALIDATION_SEED = 0.1, 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    training: list[MultipleChoice]
    validation: list[MultipleChoice]
    test: list[MultipleChoice]


def read_set(name: str, folder: Path) -> Questions:
    """Read one of SETS. Raises `UserError` for a file that is missing."""
    if name == "scienceqa":
        rows = [row for file in SCIENCEQA_TRAINING for row in read_rows(folder / file)]
        training = [_scienceqa(row) for row in rows if row["split"] != "test"]
        test = [_llava(row) for row in read_rows(folder / SCIENCEQA_TEST) if "image" not in row]
    else:
        training, test = (
            [_question(row, "llm_adapters", f"{file}, row {i}") for i, row in enumerate(read_rows(folder / file), 1)]
            for file in FILES[name]
        )
    tested = {(q.question, q.choices) for q in test}
    once = list(dict.fromkeys(q for q in training if (q.question, q.choices) not in tested))
    remaining, validation = held_out_split(once, VALIDATION_SHARE, VALIDATION_SEED)
    return Questions(training=remaining, validation=validation, test=test)  # type: ignore[arg-type]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a gzipped JSON list, or of JSON lines. Raises `UserError` for a file that is missing."""
    try:
        text = gzip.decompress(path.read_bytes()).decode()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); --data must hold it") from error
    return (
        json.loads(text) if path.name.endswith(".json.gz") else [json.loads(line) for line in text.splitlines() if line]
    )


def _question(row: dict[str, Any], form: str, where: str) -> MultipleChoice:
    example = convert(row, form, where)
    assert isinstance(example, MultipleChoice)
    return example


def _scienceqa(row: dict[str, Any]) -> MultipleChoice:
    """`Context: HINT` stands before the question as in LLaVA's copy, so that both splits have one form."""
    hint = (row.get("hint") or "").strip()
    question = (f"Context: {hint}\n" if hint else "") + row["question"].strip()
    table = {"question": question, "choices": row["choices"], "answer": row["answer"]}
    return _question(table, "multiple_choice", "ScienceQA")


def _llava(row: dict[str, Any]) -> MultipleChoice:
    """Convert a row of LLaVA's copy: `QUESTION\\nA. …\\nB. …` and the letter of the answer."""
    text, answer = (turn["value"] for turn in row["conversations"])
    lines = text.split("\n")
    choices: list[str] = []
    first = max(i for i, line in enumerate(lines) if line.startswith("A. "))
    for line in lines[first:]:
        if line.startswith(f"{string.ascii_uppercase[len(choices)]}. "):
            choices.append(line[3:])
        else:
            choices[-1] += "\n" + line
    if not re.fullmatch("[A-Z]", answer):
        raise UserError(f"{SCIENCEQA_TEST}: answer {answer!r} of {row['id']} is no letter; restore the file")
    table = {"question": "\n".join(lines[:first]), "choices": choices, "answer": answer}
    return _question(table, "multiple_choice", "ScienceQA")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Candidates of many questions in rows of T tokens, several to a row and masked from each other. The targets of a row
    are listed: its k-th is token `wanted[n, k]` after token `place[n, k]` of the row, and counts for candidate
    `owner[n, k]`, −1 for none.

    Candidates that differ in their last token alone (letters, "answer2") are one text, scored at that token: what they
    share counts the same for each."""

    tokens: Int[np.ndarray, "N T"]
    positions: Int[np.ndarray, "N T"]
    segment_ids: Int[np.ndarray, "N T"]
    place: Int[np.ndarray, "N K"]
    wanted: Int[np.ndarray, "N K"]
    owner: Int[np.ndarray, "N K"]
    choices: list[int]
    """Candidates of each question, which follow each other."""
    answers: list[int]
    left_out: int
    """Questions with a candidate that does not fit a row."""

    @property
    def prompts(self) -> Bool[np.ndarray, "N T"]:
        """True for the tokens of a text up to the one before its first target."""
        rows, targets = np.nonzero(self.owner >= 0)
        return prompts_of(self.segment_ids, rows, self.place[rows, targets])

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum of `values` [N, K] over the targets of each candidate."""
        is_target = self.owner >= 0
        sums = np.zeros(sum(self.choices))
        np.add.at(sums, self.owner[is_target], values[is_target])
        return sums

    def accuracy(self, losses: np.ndarray) -> float:
        """Share of questions whose right candidate has the least loss; losses [candidates]."""
        starts = np.cumsum([0, *self.choices])
        best = [int(np.argmin(losses[a:b])) for a, b in pairwise(starts)]
        return float(np.mean(np.array(best) == self.answers))


def prompts_of(
    segment_ids: Int[np.ndarray, "N T"], rows: Int[np.ndarray, " targets"], places: Int[np.ndarray, " targets"]
) -> Bool[np.ndarray, "N T"]:
    """True for the tokens of a text up to the one before its first target. Target i comes after token `places`[i] of row
    `rows`[i]; a text without a target is all prompt."""
    count, length = segment_ids.shape
    first = np.full((count, int(segment_ids.max()) + 1), length)
    np.minimum.at(first, (rows, segment_ids[rows, places]), places)
    return (np.arange(length) <= np.take_along_axis(first, segment_ids, axis=1)) & (segment_ids > 0)


def pack_candidates(questions: Sequence[MultipleChoice], tokenizer: Any, length: int) -> Packed:
    """Rows of one shape: T = `length`, K = T / 4 targets a row."""
    per_row = length // 4
    texts: list[_Scored] = []
    choices: list[int] = []
    answers = []
    for question in questions:
        encoded = encode_choices(question, tokenizer, length)
        if encoded is not None and all(e.loss_mask.sum() <= per_row for e in encoded):
            texts += _scored(encoded, sum(choices))
            choices.append(len(encoded))
            answers.append(question.answer)
    plan: list[list[_Scored]] = [[]]
    tokens_left, targets_left = length, per_row
    for text in texts:
        if len(text.tokens) > tokens_left or len(text.owner) > targets_left:
            plan.append([])
            tokens_left, targets_left = length, per_row
        plan[-1].append(text)
        tokens_left, targets_left = tokens_left - len(text.tokens), targets_left - len(text.owner)
    count = len(plan)
    tokens, positions, segment_ids = (np.zeros((count, length), np.int32) for _ in range(3))
    place, wanted = (np.zeros((count, per_row), np.int32) for _ in range(2))
    owner = np.full((count, per_row), -1, np.int32)
    for row, members in enumerate(plan):
        at = k = 0
        for segment, text in enumerate(members, 1):
            span, targets = slice(at, at + len(text.tokens)), slice(k, k + len(text.owner))
            tokens[row, span] = text.tokens
            positions[row, span] = np.arange(len(text.tokens))
            segment_ids[row, span] = segment
            place[row, targets], wanted[row, targets], owner[row, targets] = at + text.place, text.wanted, text.owner
            at, k = span.stop, targets.stop
    return Packed(
        tokens=tokens, positions=positions, segment_ids=segment_ids, place=place, wanted=wanted, owner=owner,
        choices=choices, answers=answers, left_out=len(questions) - len(choices),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    """A text with its targets: token `wanted[k]` after its token `place[k]`, for candidate `owner[k]`."""

    tokens: Int[np.ndarray, " T"]
    place: Int[np.ndarray, " K"]
    wanted: Int[np.ndarray, " K"]
    owner: Int[np.ndarray, " K"]


def _scored(encoded: Sequence[Encoded], first: int) -> list[_Scored]:
    """The texts of a question whose candidates are number `first` and on: one if the last token alone differs."""
    shared = encoded[0].tokens[:-1]
    if all(e.loss_mask[-1] and np.array_equal(e.tokens[:-1], shared) for e in encoded):
        wanted = np.array([e.tokens[-1] for e in encoded])
        owner = first + np.arange(len(encoded))
        return [_Scored(tokens=shared, place=np.full(len(encoded), len(shared) - 1), wanted=wanted, owner=owner)]
    texts = []
    for i, e in enumerate(encoded, first):
        where = np.flatnonzero(e.loss_mask)
        texts.append(_Scored(tokens=e.tokens, place=where - 1, wanted=e.tokens[where], owner=np.full(len(where), i)))
    return texts
