"""Matching of generated answers with the choices of a question.

The candidates of a question are what the model was trained to answer: `A`, `B`, … or `the correct answer is answer1`, ….
A candidate's *label* is its last word; its *text* is what the question shows behind the label (`A. TEXT` on a line of its
own, `Answer1: TEXT` up to the next label). An answer means a choice by the first rule that names exactly one:

    1. it begins with the candidate
    2. it holds the label: a long one anywhere; a single letter before . : , ) or at the end if nothing or "(" stands before
       it, and anywhere after "answer is", "answer:" or "option"
    3. it holds the choice's text; a text that is part of another one in the answer does not count

All of them as whole words, whatever the case and the white space; but letters must be capitals, and an A or I that a small
word follows ("A cat") is no label. An answer that means none of the choices, or several, is wrong, and counted as
unmatched.
"""

from __future__ import annotations

import re

from adafuse_jax.data.examples import MultipleChoice


def match(answer: str, example: MultipleChoice) -> int | None:
    """The index of the choice that `answer` means; None for none or several."""
    normalized = " ".join(answer.split())
    labels = [choice.split()[-1] for choice in example.choices]
    rules = (
        [_begins(normalized, choice) for choice in example.choices],
        [_names(normalized, label) for label in labels],
        _holds_text(normalized, option_texts(example)),
    )
    for rule in rules:
        if sum(rule) == 1:
            return rule.index(True)
    return None


def option_texts(example: MultipleChoice) -> list[str]:
    """The text that the question shows behind each label; empty where it shows none."""
    labels = [choice.split()[-1] for choice in example.choices]
    next_label = "|".join(rf"\s{re.escape(label)}\s*:" for label in labels)
    texts = []
    for label in labels:
        if len(label) == 1:
            found = re.search(rf"^{re.escape(label)}[.)] *(.*)$", example.question, re.MULTILINE)
        else:
            pattern = rf"(?<!\w){re.escape(label)}\s*:\s*(.*?)(?={next_label}|\n|$)"
            found = re.search(pattern, example.question, re.IGNORECASE)
        texts.append(" ".join(found.group(1).split()) if found else "")
    return texts


def _words(text: str) -> str:
    """A pattern of `text` that no letter or digit touches."""
    return rf"(?<!\w){re.escape(text)}(?!\w)"


def _begins(normalized: str, choice: str) -> bool:
    if len(choice) == 1:
        return re.match(_words(choice), normalized) is not None and not re.match("[AI] [a-z]", normalized)
    return re.match(_words(" ".join(choice.split())), normalized, re.IGNORECASE) is not None


def _names(normalized: str, label: str) -> bool:
    if len(label) > 1:
        return re.search(_words(label), normalized, re.IGNORECASE) is not None
    alone = rf"(?:^|\(){label}(?=[.:,)]|$)"
    announced = rf"(?i:answer is|answer:|option):? ?\(?{label}(?!\w)(?! [a-z])"
    return re.search(f"{alone}|{announced}", normalized) is not None


def _holds_text(normalized: str, texts: list[str]) -> list[bool]:
    is_held = [bool(text) and re.search(_words(text), normalized, re.IGNORECASE) is not None for text in texts]
    longer = [text.casefold() for text, held in zip(texts, is_held, strict=True) if held]
    return [
        held and not any(text.casefold() != other and text.casefold() in other for other in longer)
        for text, held in zip(texts, is_held, strict=True)
    ]
