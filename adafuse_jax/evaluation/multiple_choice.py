"""Multiple choice by log-likelihood and by generation.

    accuracy         argmax_c log p(c | question)                        (lm-eval's acc)
    accuracy_norm    argmax_c log p(c | question) / characters of c      (lm-eval's acc_norm)
    accuracy_bytes   argmax_c log p(c | question) / UTF-8 bytes of c     (lm-eval's acc_bytes)
    generated        the choice that the greedy answer means, by the rules of `matching`

log p(c | question) = Σ_t log p(c_t | question, c_<t) over the candidate's own tokens, in nats; no end-of-turn token. The
standard error of an accuracy p over n questions is sqrt(p (1 − p) / (n − 1)), as lm-eval has it; that of the unweighted mean
over D data sets, sqrt(Σ se²) / D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adafuse_jax.core.errors import UserError
from adafuse_jax.data.chat import Encoded, encode_choices, encode_prompt, stop_tokens
from adafuse_jax.data.examples import Message, MultipleChoice
from adafuse_jax.data.templates import TemplateLimit, template_date
from adafuse_jax.evaluation.heldout import score
from adafuse_jax.evaluation.loading import Loaded
from adafuse_jax.evaluation.matching import match
from adafuse_jax.inference.engine import Engine
from adafuse_jax.inference.rows import Row

SCORES = ("accuracy", "accuracy_norm", "accuracy_bytes", "generated")


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """Questions that fit `max_length` with each of their candidates, and how many were left out because they do not."""

    examples: list[MultipleChoice]
    prompts: list[list[int]]
    """Token ids that a generated answer starts from."""
    candidates: list[list[Encoded]]
    left_out: int

    @classmethod
    def encode(
        cls,
        examples: Sequence[MultipleChoice],
        tokenizer: Any,
        max_length: int,
        *,
        token_budget: int = 0,
        system: str | None = None,
    ) -> Questions:
        """`system` is a message before each question; `token_budget`: tokens that must fit behind a question's prompt,
        for an answer to be generated.

        Raises `UserError` when none is left."""
        fitting: list[MultipleChoice] = []
        prompts: list[list[int]] = []
        candidates: list[list[Encoded]] = []
        with template_date():
            for example in examples:
                try:
                    encoded, prompt = (
                        encode_choices(example, tokenizer, max_length, system=system),
                        prompt_of(example, tokenizer, system),
                    )
                except TemplateLimit:
                    raise
                except UserError as error:
                    raise UserError(f"{example.where}: {error}" if example.where else str(error)) from error
                if encoded is None or (token_budget and len(prompt) + token_budget > max_length):
                    continue
                fitting.append(example)
                prompts.append(prompt)
                candidates.append(encoded)
        if not fitting:
            raise UserError(
                f"none of {len(examples)} questions fits {max_length} tokens with its answer; "
                "raise --max-length, or give shorter questions"
            )
        return cls(examples=fitting, prompts=prompts, candidates=candidates, left_out=len(examples) - len(fitting))


def prompt_of(example: MultipleChoice, tokenizer: Any, system: str | None = None) -> list[int]:
    """The tokens that an answer to a question starts from."""
    before = [] if system is None else [Message("system", system)]
    return encode_prompt([*before, Message("user", example.question)], tokenizer).tolist()


def chosen_by_likelihood(loaded: Loaded, questions: Questions, *, batch_size: int) -> dict[str, list[int]]:
    """The choice for each question: `accuracy`, `accuracy_norm` and `accuracy_bytes` as in the module's docstring."""
    flat = [row for candidates in questions.candidates for row in candidates]
    losses = iter(score(loaded.model, loaded.adapter, flat, batch_size=batch_size))
    chosen: dict[str, list[int]] = {"accuracy": [], "accuracy_norm": [], "accuracy_bytes": []}
    for example in questions.examples:
        likelihood = -np.array([next(losses) for _ in example.choices])
        characters = np.array([len(choice) for choice in example.choices])
        utf8_bytes = np.array([len(choice.encode()) for choice in example.choices])
        for name, length in zip(chosen, (1, characters, utf8_bytes), strict=True):
            chosen[name].append(int(np.argmax(likelihood / length)))
    return chosen


def generated_answers(loaded: Loaded, questions: Questions, *, batch_size: int, max_new_tokens: int) -> list[str]:
    """The greedy answer to each question. Questions of like length are answered together, each as it would be alone."""
    stops = sorted({*loaded.model.config.eos_token_ids, *stop_tokens(loaded.tokenizer)})
    engine = Engine(loaded.model, loaded.adapter, eos_ids=stops)
    prompts = questions.prompts
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        rows = members + members[-1:] * (batch_size - len(members))  # one batch size, one program
        ended: dict[int, Row] = {}
        for step in engine.generate([prompts[i] for i in rows], max_new_tokens=max_new_tokens):
            ended |= step.rows
        for row, i in enumerate(members):
            answers[i] = loaded.tokenizer.decode(ended[row].token_ids, skip_special_tokens=True)
    return answers


def evaluate(loaded: Loaded, questions: Questions, *, batch_size: int, max_new_tokens: int | None) -> dict[str, Any]:
    """`{questions, left_out, accuracy, accuracy_stderr, accuracy_norm, …}`, accuracies in [0, 1]; with `max_new_tokens` also
    `generated` and `unmatched`, the number of answers that mean no choice."""
    right = [example.answer for example in questions.examples]
    result: dict[str, Any] = {"questions": len(right), "left_out": questions.left_out}
    chosen: dict[str, list[int | None]] = dict(chosen_by_likelihood(loaded, questions, batch_size=batch_size))  # type: ignore[arg-type]
    if max_new_tokens is not None:
        answers = generated_answers(loaded, questions, batch_size=batch_size, max_new_tokens=max_new_tokens)
        chosen["generated"] = [match(a, e) for a, e in zip(answers, questions.examples, strict=True)]
        result["unmatched"] = sum(choice is None for choice in chosen["generated"])
    for name, choices in chosen.items():
        accuracy = float(np.mean([choice == answer for choice, answer in zip(choices, right, strict=True)]))
        result[name] = accuracy
        result[f"{name}_stderr"] = standard_error(accuracy, len(right))
    return result


def standard_error(accuracy: float, questions: int) -> float | None:
    """None for a single question, which has no sample variance."""
    return math.sqrt(accuracy * (1 - accuracy) / (questions - 1)) if questions > 1 else None


def mean_of(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The unweighted mean of the data sets' accuracies, and its standard error."""
    mean: dict[str, Any] = {}
    for name in SCORES:
        if all(name in result for result in results):
            errors = [result[f"{name}_stderr"] for result in results]
            known = all(error is not None for error in errors)
            mean[name] = sum(result[name] for result in results) / len(results)
            mean[f"{name}_stderr"] = math.sqrt(sum(e**2 for e in errors)) / len(results) if known else None
    return mean
