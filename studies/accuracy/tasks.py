"""The eight sets of the mixture, their splits and their measures. All of it was fixed before the first run.

    set         what is asked                                 measures            training
    gsm8k       grade-school mathematics in steps             exact, likelihood   1,500
    code        code_alpaca: short programs                   likelihood, passed  all, 1,500
    instruct    alpaca: instructions of all kinds             likelihood          all, 750
    scienceqa   science, the letter of a choice               accuracy            all, 800
    openbookqa  science, the number of a choice               accuracy            3,000
    arc-easy    science, the number of a choice               accuracy            all, 1,900
    vel, dor    `made_up`: one question, two contradictory    exact               1,000 each
                answers

Splits: gsm8k, scienceqa, openbookqa and arc-easy have official test sets; a training question with the text of a test
question is dropped. A question's place in the others, and in training or validation everywhere, is a hash of its text
with SEED: the same question is in the same split in both languages. A set's questions are in the order of that hash, and
of the training and the validation questions at most TRAINING and VALIDATION are taken.

Measures are in points, 0 to 100:

    accuracy    questions whose right choice has the largest log-likelihood
    exact       replies that are right word by word, greedily decoded; of gsm8k, whose final number is right
    likelihood  100 · exp(−mean loss of a target token): the geometric mean of the probability of a right token
    passed      pass@1 of the problems in `programs`, greedily decoded; of runs with --programs

A set's *score* is the mean of its measures, and the *mixture's mean* that of its eight sets' scores. Learning rates and
variants are chosen by it on validation questions. 0.022 nats of the loss are then worth a point at a loss of 0.8, about as
much as one question in a hundred. `passed` came after the first record, whose runs lack it and keep their means.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adafuse_jax.data.examples import Chat, Message, MultipleChoice
from studies.accuracy import made_up
from studies.questions import read_rows, read_set

SETS = ("gsm8k", "code", "instruct", "scienceqa", "openbookqa", "arc-easy", *made_up.LANGUAGES)
PASSED = "passed"
"""The measure of runs with --programs alone."""
MEASURES: dict[str, tuple[str, ...]] = {
    "gsm8k": ("exact", "likelihood"),
    "code": ("likelihood", PASSED),
    "instruct": ("likelihood",),
    "scienceqa": ("accuracy",),
    "openbookqa": ("accuracy",),
    "arc-easy": ("accuracy",),
    "vel": ("exact",),
    "dor": ("exact",),
}
SPLITS = ("training", "validation", "test")
SEED = 25
VALIDATION_SHARE, TEST_SHARE = 0.15, 0.1
TRAINING, VALIDATION = {"gsm8k": 1500, "openbookqa": 3000, "vel": 1000, "dor": 1000}, 400
GSM8K = {"training": "gsm8k_train.jsonl.gz", "test": "gsm8k_test.jsonl.gz"}
INSTRUCTIONS = {"code": "code_alpaca_2k.json.gz", "instruct": "alpaca_en_demo.json.gz"}

Example = Chat | MultipleChoice


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Examples of each of SPLITS."""

    training: list[Example]
    validation: list[Example]
    test: list[Example]


def place(text: str) -> float:
    """Hash of a question's text and SEED, in [0, 1); decides its split."""
    digest = hashlib.blake2b(f"{SEED} {text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def read_task(name: str, folder: Path) -> Task:
    """Read one of SETS from its files in `folder`. Raises `UserError` for a file that is missing."""
    if name == "gsm8k":
        known, test = ([_gsm8k(row) for row in read_rows(folder / GSM8K[split])] for split in ("training", "test"))
        return _task(name, known, test)
    if name in INSTRUCTIONS:
        return _task(name, [_instruction(row) for row in read_rows(folder / INSTRUCTIONS[name])])
    if name in made_up.LANGUAGES:
        pairs = [(made_up.asked(q, name), made_up.in_language(number, name)) for q, number in made_up.questions()]
        return _task(name, [_reply(question, words) for question, words in pairs])
    found = read_set(name, folder)
    return _task(name, [*found.training, *found.validation], found.test)


def _task(name: str, known: Iterable[Example], test: Sequence[Example] | None = None) -> Task:
    """`test` None: a part of the known ones is it."""
    tested = {_question(example) for example in test or ()}
    parts: dict[str, list[Example]] = {split: [] for split in SPLITS}
    first = 0.0 if test is not None else TEST_SHARE
    for example in sorted(dict.fromkeys(known), key=lambda example: (place(_key(example)), _question(example))):
        at = place(_key(example))
        if _question(example) not in tested:
            parts["test" if at < first else "validation" if at < first + VALIDATION_SHARE else "training"].append(
                example
            )
    return Task(
        training=parts["training"][: TRAINING.get(name)],
        validation=parts["validation"][:VALIDATION],
        test=parts["test"] if test is None else list(test),
    )


def _question(example: Example) -> str:
    return example.question if isinstance(example, MultipleChoice) else example.messages[0].content


def _key(example: Example) -> str:
    """A made-up question without the tag of its language: both ask it in the same split."""
    return re.sub("^Answer in (Vel|Dor). ", "", _question(example))


def _reply(question: str, answer: str) -> Chat:
    return Chat((Message("user", question), Message("assistant", answer)))


def _gsm8k(row: dict[str, Any]) -> Chat:
    """Convert a row of GSM8K, without the calculator's notes <<48/2=24>>."""
    return _reply(row["question"], re.sub("<<.*?>>", "", row["answer"]))


def _instruction(row: dict[str, Any]) -> Chat:
    return _reply("\n\n".join(part for part in (row["instruction"], row["input"]) if part), row["output"])


NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def final_number(text: str) -> float | None:
    """The first number after "####", or the last one of a text without it."""
    _, mark, after = text.rpartition("####")
    numbers = NUMBER.findall(after if mark else text)
    return float(numbers[0 if mark else -1].replace(",", "")) if numbers else None
