"""Greedy answers to many prompts at a time, and the experts that read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from adafuse_jax.inference.rows import Row
from adafuse_jax.inference.session import Session
from examples.skills.skills import Case

MAX_ANSWER = 16
"""Tokens; the longest right answer has eleven and its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Texts in the order of the cases; `experts[e]` counts the answers' tokens read with expert e (None: no adapter)."""

    cases: Sequence[Case]
    texts: list[str]
    experts: Int[np.ndarray, " E"] | None

    @property
    def exact_match(self) -> float:
        """Share of answers that are right to the letter."""
        return float(np.mean([text == case.answer for text, case in zip(self.texts, self.cases, strict=True)]))


def answer_all(session: Session, cases: Sequence[Case]) -> Answers:
    """All `cases` as one batch."""
    rows: dict[int, Row] = {}
    for step in session.engine.generate([session.tokens_of(case.prompt) for case in cases], max_new_tokens=MAX_ANSWER):
        rows |= step.rows
    experts = [chosen for row in rows.values() for chosen in row.experts]
    used = np.bincount(np.ravel(experts).astype(int), minlength=session.num_experts)
    texts = [session.tokenizer.decode(rows[i].token_ids, skip_special_tokens=True) for i in range(len(cases))]
    return Answers(cases=cases, texts=texts, experts=used if session.num_experts else None)
