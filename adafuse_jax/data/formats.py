"""Rows to examples: which columns make which format, and what each row of it becomes.

    chat                  messages: [{role, content}, ...]                                        -> Chat
    sharegpt              conversations: [{from, value}, ...]                                     -> Chat
    multiple_choice       question | question_stem, choices, answer | answerKey[, hint | context] -> MultipleChoice
    llm_adapters          alpaca + answer; instruction "... Answer format: answer1/answer2/..."   -> MultipleChoice
    alpaca                instruction[, input], output                                            -> Chat
    instruction_response  (problem, solution) | (query, response) | (question, free-text answer)  -> Chat
    text                  text                                                                    -> Text

`choices` is a list of texts, {label: [...], text: [...]}, a list of {label, text}, or {letter: text}. Prompts show the
letters A, B, ... whatever labels a dataset has (some ARC rows say 1-4), and the candidate responses are these letters.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adafuse_jax.core.errors import UserError
from adafuse_jax.data.examples import Chat, Example, Message, MultipleChoice, Role, Text

Row = Mapping[str, Any]

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
PAIRS = (("problem", "solution"), ("query", "response"), ("question", "answer"))
QUESTION_COLUMNS = ("question", "question_stem")
ANSWER_COLUMNS = ("answer", "answerKey")
ANSWER_FORMAT = re.compile(r"answer format:[ \t]*(\S+)\s*$", re.IGNORECASE)
ANSWER_INSTRUCTION = "Answer with the letter of the correct choice."


class RowError(Exception):
    """A row that cannot become an example; `convert` adds the place and raises it as a UserError."""


class SkipRow(Exception):
    """A row that is well formed but holds nothing to learn from; it is counted by its reason."""


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        raise RowError(f"column {column!r} is missing or null: every row needs it")
    if isinstance(value, bool | int | float):
        return str(value)
    if not isinstance(value, str):
        raise RowError(f"column {column!r} holds a {type(value).__name__}, not text")
    return value


def _first(row: Row, columns: Sequence[str]) -> str:
    return next((c for c in columns if row.get(c) is not None), columns[0])


def _pair(prompt: str, response: str) -> Chat:
    if not response.strip():
        raise SkipRow("an empty response")
    return Chat((Message("user", prompt), Message("assistant", response)))


def _instruction(row: Row) -> str:
    extra = row.get("input")
    prompt = _text(row, "instruction")
    return f"{prompt}\n\n{_text(row, 'input')}" if extra is not None and str(extra).strip() else prompt


def _alpaca(row: Row) -> Chat:
    return _pair(_instruction(row), _text(row, "output"))


def _instruction_response(row: Row) -> Chat:
    prompt, response = next((p for p in PAIRS if p[0] in row and p[1] in row), PAIRS[0])
    return _pair(_text(row, prompt), _text(row, response))


def _plain_text(row: Row) -> Text:
    text = _text(row, "text")
    if not text.strip():
        raise SkipRow("an empty text")
    return Text(text)


def _conversation(column: str, role_key: str, content_key: str) -> Callable[[Row], Chat]:
    """Turns from the first user turn on (system turns before it stay), up to the last assistant turn; a conversation
    ends before its first empty reply, which would teach the model to say nothing."""

    def convert_row(row: Row) -> Chat:
        turns = row.get(column)
        if not isinstance(turns, list | tuple):
            raise RowError(f"column {column!r} must hold a list of {{{role_key}, {content_key}}} objects")
        messages: list[Message] = []
        for n, turn in enumerate(turns, 1):
            if (
                not isinstance(turn, Mapping)
                or turn.get(role_key) is None
                or not isinstance(turn.get(content_key), str)
            ):
                raise RowError(f"column {column!r}, turn {n}: needs the text fields {role_key!r} and {content_key!r}")
            role = ROLES.get(str(turn[role_key]).lower())
            if role is None:
                raise RowError(f"column {column!r}, turn {n}: unknown role {turn[role_key]!r}: use {', '.join(ROLES)}")
            if role == "assistant":
                if not any(m.role == "user" for m in messages):
                    continue
                if not turn[content_key].strip():
                    break
            messages.append(Message(role, turn[content_key]))
        while messages and messages[-1].role != "assistant":
            messages.pop()
        if not messages:
            raise SkipRow("no assistant reply after a user turn")
        return Chat(tuple(messages))

    return convert_row


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
    return [str(label).strip() for label in labels], [str(t) for t in texts]


def _answer_index(answer: Any, labels: Sequence[str], column: str) -> int:
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(labels):
            raise RowError(f"column {column!r} is {answer}: an index must be from 0 to {len(labels) - 1}")
        return answer
    key = answer.strip() if isinstance(answer, str) else ""
    for names in (labels, string.ascii_uppercase[: len(labels)]):
        if key and key.upper() in [n.upper() for n in names]:
            return [n.upper() for n in names].index(key.upper())
    hint = " (this split may have no answers: use another)" if not key else ""
    raise RowError(f"column {column!r} is {answer!r}: it must be one of {', '.join(labels)} or an index from 0{hint}")


def _multiple_choice(row: Row) -> MultipleChoice:
    labels, texts = _labels_and_texts(row.get("choices"))
    column = _first(row, ANSWER_COLUMNS)
    answer = _answer_index(row.get(column), labels, column)
    letters = tuple(string.ascii_uppercase[: len(texts)])
    context = str(row.get("hint") or row.get("context") or "").strip()
    prompt = [f"Context: {context}\n"] if context else []
    prompt.append(f"Question: {_text(row, _first(row, QUESTION_COLUMNS)).strip()}")
    prompt += [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True)]
    prompt.append(f"\n{ANSWER_INSTRUCTION}")
    return MultipleChoice("\n".join(prompt), letters, answer)


def _llm_adapters(row: Row) -> MultipleChoice:
    found = ANSWER_FORMAT.search(_text(row, "instruction"))
    if found is None:
        raise RowError(
            "column 'instruction' must end in 'Answer format: answer1/answer2/...' for the format llm_adapters"
        )
    names, answer = found.group(1).split("/"), _text(row, "answer").strip()
    if answer not in names:
        raise RowError(f"column 'answer' is {answer!r}: it must be one of {', '.join(names)}")
    choices = tuple(f"the correct answer is {name}" for name in names)
    return MultipleChoice(_instruction(row), choices, names.index(answer))


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """`columns` are alternatives: each inner tuple is one set of columns that suffices. `uses` are all columns read."""

    columns: tuple[tuple[str, ...], ...]
    uses: tuple[str, ...]
    convert: Callable[[Row], Example]

    def fits(self, columns: Sequence[str]) -> bool:
        return any(set(needed) <= set(columns) for needed in self.columns)

    def needs(self) -> str:
        return " | ".join(" + ".join(needed) for needed in self.columns)


# The order is that of recognition: a row with choices is a multiple-choice row whatever else it carries.
FORMATS: dict[str, Format] = {
    "chat": Format(columns=(("messages",),), uses=("messages",), convert=_conversation("messages", "role", "content")),
    "sharegpt": Format(
        columns=(("conversations",),), uses=("conversations",), convert=_conversation("conversations", "from", "value")
    ),
    "multiple_choice": Format(
        columns=tuple((q, "choices", a) for q in QUESTION_COLUMNS for a in ANSWER_COLUMNS),
        uses=(*QUESTION_COLUMNS, *ANSWER_COLUMNS, "choices", "hint", "context"),
        convert=_multiple_choice,
    ),
    "llm_adapters": Format(
        columns=(("instruction", "output", "answer"),), uses=("instruction", "input", "answer"), convert=_llm_adapters
    ),
    "alpaca": Format(columns=(("instruction", "output"),), uses=("instruction", "input", "output"), convert=_alpaca),
    "instruction_response": Format(
        columns=PAIRS, uses=tuple(c for pair in PAIRS for c in pair), convert=_instruction_response
    ),
    "text": Format(columns=(("text",),), uses=("text",), convert=_plain_text),
}


def formats_help() -> str:
    """All formats with the columns that they need, in one line."""
    return ", ".join(f"{name} ({fmt.needs()})" for name, fmt in FORMATS.items())


def check_format_name(name: str, where: str) -> None:
    """Raises UserError unless `name` is "auto" or a format."""
    if name != "auto" and name not in FORMATS:
        raise UserError(f"unknown format: {where}: {name!r} is none of auto, {', '.join(FORMATS)}")


def recognise(columns: Sequence[str], first_row: Row, wanted: str, where: str) -> str:
    """The format's name: `wanted` if its columns are there, or for "auto" the first format that fits.

    Raises UserError that lists the columns found and the formats."""
    check_format_name(wanted, where)
    found = f"the columns are {', '.join(columns) or '(none)'}"
    if wanted != "auto":
        if not FORMATS[wanted].fits(columns):
            raise UserError(f"missing column: {where}: format {wanted} needs {FORMATS[wanted].needs()}; {found}")
        return wanted
    for name, fmt in FORMATS.items():
        if not fmt.fits(columns):
            continue
        if name == "llm_adapters" and not ANSWER_FORMAT.search(str(first_row.get("instruction"))):
            continue  # alpaca rows may carry a short answer beside the full output
        return name
    raise UserError(f"unrecognised columns: {where}: {found}; rename them to one of the formats {formats_help()}")


def convert(row: Row, format_name: str, where: str) -> Example:
    """One row to one example. Raises UserError with `where` (the file and row) in it, and SkipRow for rows to count."""
    if row.get("image"):
        raise SkipRow("it needs an image")
    try:
        return FORMATS[format_name].convert(row)
    except RowError as error:
        raise UserError(f"bad row: {where}: {error}") from None
