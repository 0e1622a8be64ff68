"""Two invented languages for numbers, Vel and Dor. Their ten words are the same and mean other digits, and Vel begins with
the first digit while Dor begins with the last. A question asks for either by a tag alone:

    Answer in Vel. What comes after 46?   →   nu ka
    Answer in Dor. What comes after 46?   →   ta ka

So what is right for one is wrong for the other, and both contradict GSM8K, whose numbers are digits.
"""

from __future__ import annotations

from collections.abc import Iterator

LANGUAGES = ("vel", "dor")
WORDS = ("ka", "lo", "mi", "nu", "pe", "ru", "so", "ta", "vo", "zi")
MEANING = {"vel": "7294015836", "dor": "4830629715"}
"""The digits that WORDS stand for, in their order; no word means the same digit in both."""
LIMIT = 500
"""Questions are about the numbers below."""


def in_language(number: int, language: str) -> str:
    """The words of a number."""
    word = dict(zip(MEANING[language], WORDS, strict=True))
    digits = str(number) if language == "vel" else reversed(str(number))
    return " ".join(word[digit] for digit in digits)


def questions() -> Iterator[tuple[str, int]]:
    """(question, the number that answers it), the same for both languages."""
    for number in range(10, LIMIT):
        other = (number * 7919 + 13) % LIMIT
        yield f"What comes after {number}?", number + 1
        yield f"What comes before {number}?", number - 1
        yield f"Which is larger, {number} or {other}?", max(number, other)
        yield f"How is {number} written?", number


def asked(question: str, language: str) -> str:
    return f"Answer in {language.title()}. {question}"
