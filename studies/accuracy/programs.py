"""Short programming problems of our own, and pass@1: the share of them that the greedy reply solves.

`programs.jsonl` has a problem a line: its function, what it returns, calls with their results, a right answer, and a
wrong one that the calls tell from it. None is trained on. TEST of them, by the hash of `tasks.place`, are the test split,
the others the validation split.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from studies.accuracy.sandbox import Job, Outcome, judge_all
from studies.accuracy.tasks import place

FILE = Path(__file__).with_name("programs.jsonl")
TEST = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """`calls[i]` are arguments and `results[i]` what the function returns for them, as JSON has both."""

    function: str
    signature: str
    task: str
    calls: Sequence[Sequence[Any]]
    results: Sequence[Any]
    right: str
    wrong: str

    @property
    def question(self) -> str:
        example = f"{self.function}({', '.join(map(repr, self.calls[0]))}) is {self.results[0]!r}"
        return (
            f"Write a Python function `{self.signature}` that {self.task}. For example, {example}. Give the code alone."
        )

    def job(self, program: str) -> Job:
        return Job(program=program, function=self.function, calls=self.calls, results=self.results)


@cache
def problems(split: str) -> tuple[Problem, ...]:
    """The problems of a split, in the order of the hash."""
    read = [Problem(**json.loads(line)) for line in FILE.read_text(encoding="utf-8").splitlines()]
    ordered = sorted(read, key=lambda problem: place(problem.function))
    return tuple({"training": [], "validation": ordered[TEST:], "test": ordered[:TEST]}[split])


FENCED = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
CODE = re.compile(r"^(?:(?:async def|def|class|import|from) |@).*", re.MULTILINE | re.DOTALL)


def program_of(reply: str) -> str:
    """The code of a reply: its first fenced block, or all from the first line that begins like code."""
    fenced = FENCED.search(reply)
    if fenced:
        return fenced[1]
    code = CODE.search(reply)
    return code[0] if code else ""


def outcomes(replies: Sequence[str], split: str) -> list[Outcome]:
    """Outcomes of replies to the first problems of a split, in their order."""
    asked = problems(split)[: len(replies)]
    return judge_all([p.job(program_of(reply)) for p, reply in zip(asked, replies, strict=True)])
