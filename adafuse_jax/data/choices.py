"""Multiple-choice rows: `choices` and an answer column, or an instruction that ends in its possible answers.

`choices` is a list of texts, {label: [...], text: [...]}, a list of {label, text}, or {letter: text}. Prompts show the
letters A, B, ... whatever labels a dataset has (1-4 in some ARC rows), and the candidate responses are these letters.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from adafuse_jax.core.errors import quoted
from adafuse_jax.data.examples import MultipleChoice
from adafuse_jax.data.rows import Notes, Number, Row, RowError, first_given, json_value, text_of

QUESTION_COLUMNS = ("question", "question_stem")
ANSWER_COLUMNS = ("answer", "answerKey")
ANSWER_FORMAT = re.compile(r"answer format:[ \t]*(\S+)\s*$", re.IGNORECASE)
ANSWER_INSTRUCTION = "Answer with the letter of the correct choice."


def _labels_and_texts(choices: Any) -> tuple[list[str], list[str]]:
    if isinstance(choices, Mapping) and {"label", "text"} <= choices.keys():
        labels, texts = choices["label"], choices["text"]
    elif isinstance(choices, Mapping):
        present = {k: v for k, v in choices.items() if v is not None}  # a column has one set of keys for all its rows
        labels, texts = list(present), list(present.values())
    elif isinstance(choices, list | tuple) and choices and all(isinstance(c, Mapping) for c in choices):
        labels, texts = [c.get("label") for c in choices], [c.get("text") for c in choices]
    elif isinstance(choices, list | tuple):
        labels, texts = list(string.ascii_uppercase[: len(choices)]), list(choices)
    else:
        raise RowError("column 'choices' must hold a list of texts, {label, text} lists, or {letter: text}")
    if not isinstance(texts, list | tuple) or not isinstance(labels, list | tuple) or len(labels) != len(texts):
        raise RowError("column 'choices': as many labels as texts are needed")
    if not 2 <= len(texts) <= 26:
        raise RowError(f"column 'choices' has {len(texts)} choices: 2 to 26 are supported")
    if any(not isinstance(t, str | int | float) or isinstance(t, bool) for t in texts):
        raise RowError("column 'choices': every choice must be a text")
    names = [text_of(label, "column 'choices': a label").strip() for label in labels]
    return names, [text_of(text, "column 'choices'") for text in texts]


def _answer_index(answer: Any, labels: Sequence[str], column: str) -> int:
    if isinstance(answer, Number) and re.fullmatch(r"-?\d{1,9}", answer):
        answer = int(answer)
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(labels):
            raise RowError(f"column {column!r} is {answer}: an index must be from 0 to {len(labels) - 1}")
        return answer
    key = answer.strip() if isinstance(answer, str) else ""
    for names in (labels, string.ascii_uppercase[: len(labels)]):
        if key and key.upper() in [n.upper() for n in names]:
            return [n.upper() for n in names].index(key.upper())
    hint = " (this split may have no answers: use another)" if not key else ""
    shown = ", ".join(labels) if sum(map(len, labels)) < 120 else f"its {len(labels)} labels"
    raise RowError(f"column {column!r} is {quoted(answer)}: it must be one of {shown} or an index from 0{hint}")


def multiple_choice(row: Row, notes: Notes) -> MultipleChoice:
    labels, texts = _labels_and_texts(json_value(row.get("choices"), "column 'choices'"))
    column = first_given(row, ANSWER_COLUMNS, notes) or ANSWER_COLUMNS[0]
    answer = _answer_index(row.get(column), labels, column)
    letters = tuple(string.ascii_uppercase[: len(texts)])
    about = first_given(row, ("hint", "context"), notes)
    context = "" if about is None else text_of(row[about], f"column {about!r}").strip()
    asked = first_given(row, QUESTION_COLUMNS, notes) or QUESTION_COLUMNS[0]
    prompt = [f"Context: {context}\n"] if context else []
    prompt.append(f"Question: {text_of(row.get(asked), f'column {asked!r}').strip()}")
    prompt += [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True)]
    prompt.append(f"\n{ANSWER_INSTRUCTION}")
    return MultipleChoice("\n".join(prompt), letters, answer)


def llm_adapters(row: Row, question: str) -> MultipleChoice:
    """`question` is the instruction with the row's input; the possible answers stand at the instruction's end."""
    found = ANSWER_FORMAT.search(text_of(row.get("instruction"), "column 'instruction'"))
    if found is None:
        raise RowError(
            "column 'instruction' must end in 'Answer format: answer1/answer2/...' for the format llm_adapters"
        )
    names, answer = found.group(1).split("/"), text_of(row.get("answer"), "column 'answer'").strip()
    if answer not in names:
        raise RowError(f"column 'answer' is {quoted(answer)}: it must be one of {', '.join(names)}")
    choices = tuple(f"the correct answer is {name}" for name in names)
    return MultipleChoice(question, choices, names.index(answer))
