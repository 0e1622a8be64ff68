"""Rows to examples: which columns make which format, and what each row of it becomes.

    chat                  messages: turns                                                         -> Chat
    sharegpt              conversations | conversation: turns                                     -> Chat
    multiple_choice       question | question_stem, choices, answer | answerKey[, hint | context] -> MultipleChoice
    llm_adapters          alpaca + answer; instruction "... Answer format: answer1/answer2/..."   -> MultipleChoice
    alpaca                instruction[, input | context], output                                  -> Chat
    instruction_response  a pair of PAIRS, (prompt, completion) or (instruction[, context], response) or ... -> Chat
    text                  text                                                                    -> Text

Chats take the columns system | system_prompt, history and tools too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from adafuse_jax.core.errors import UserError, shortened
from adafuse_jax.data.choices import ANSWER_COLUMNS, ANSWER_FORMAT, QUESTION_COLUMNS, llm_adapters, multiple_choice
from adafuse_jax.data.conversations import CHAT_COLUMNS, conversation, exchange
from adafuse_jax.data.examples import Chat, Example, MultipleChoice, Text
from adafuse_jax.data.rows import Notes, Repeated, Row, RowError, SkipRow, first_given, is_blank, text_of

PAIRS = (
    ("problem", "solution"),
    ("query", "response"),
    ("question", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "response"),
    ("question", "response"),
    ("input", "output"),
)
CONTEXT_COLUMNS = ("input", "context")
"""Further text of a prompt that has an instruction."""

Convert = Callable[[Row, Notes], Example]


def _column(row: Row, name: str) -> str:
    return text_of(row.get(name), f"column {name!r}")


def _instruction(row: Row) -> str:
    contexts = (_column(row, name) for name in CONTEXT_COLUMNS if not is_blank(row.get(name)))
    return "\n\n".join([_column(row, "instruction"), *contexts])


def _alpaca(row: Row, notes: Notes) -> Chat:
    return exchange(_instruction(row), _column(row, "output"), row, notes)


def _llm_adapters(row: Row, notes: Notes) -> MultipleChoice:
    return llm_adapters(row, _instruction(row))


def _pair(prompt: str, reply: str) -> Convert:
    def convert_row(row: Row, notes: Notes) -> Chat:
        asked, answered = row.get(prompt), row.get(reply)
        if isinstance(asked, list) or isinstance(answered, list):  # turns on either side
            turns = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
            replies = answered if isinstance(answered, list) else [{"role": "assistant", "content": answered}]
            return conversation([*turns, *replies], row, f"{prompt}', '{reply}", notes)
        text = _instruction(row) if prompt == "instruction" else _column(row, prompt)
        return exchange(text, _column(row, reply), row, notes)

    return convert_row


def _plain_text(row: Row, notes: Notes) -> Text:
    text = _column(row, "text")
    if not text.strip():
        raise SkipRow("an empty text")
    return Text(text)


def _turns(*columns: str) -> Convert:
    def convert_row(row: Row, notes: Notes) -> Chat:
        empty = next((name for name in columns if row.get(name) is not None), columns[0])
        column = first_given(row, columns, notes) or empty
        return conversation(row.get(column), row, column, notes)

    return convert_row


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """`columns` are alternatives: each inner tuple is one set of columns that suffices. `optional` are read if present."""

    columns: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()
    convert: Convert

    def fits(self, columns: Sequence[str]) -> bool:
        return any(set(needed) <= set(columns) for needed in self.columns)

    def needs(self) -> str:
        return " | ".join(" + ".join(needed) for needed in self.columns)

    @property
    def uses(self) -> frozenset[str]:
        """All columns that it reads."""
        return frozenset(self.optional).union(*self.columns)


def _unbound(row: Row, notes: Notes) -> Example:
    return bound("instruction_response", list(row)).convert(row, notes)


# The order is that of recognition: a row with choices is a multiple-choice row whatever else it carries.
FORMATS: dict[str, Format] = {
    "chat": Format(columns=(("messages",),), optional=CHAT_COLUMNS, convert=_turns("messages")),
    "sharegpt": Format(
        columns=(("conversations",), ("conversation",)),
        optional=CHAT_COLUMNS,
        convert=_turns("conversations", "conversation"),
    ),
    "multiple_choice": Format(
        columns=tuple((q, "choices", a) for q in QUESTION_COLUMNS for a in ANSWER_COLUMNS),
        optional=("hint", "context"),
        convert=multiple_choice,
    ),
    "llm_adapters": Format(
        columns=(("instruction", "output", "answer"),), optional=CONTEXT_COLUMNS, convert=_llm_adapters
    ),
    "alpaca": Format(columns=(("instruction", "output"),), optional=(*CONTEXT_COLUMNS, *CHAT_COLUMNS), convert=_alpaca),
    "instruction_response": Format(columns=PAIRS, optional=(*CONTEXT_COLUMNS, *CHAT_COLUMNS), convert=_unbound),
    "text": Format(columns=(("text",),), convert=_plain_text),
}
USED_COLUMNS = frozenset({"image", "split"}).union(*(fmt.uses for fmt in FORMATS.values()))
"""Columns that some format reads, or the choice of rows."""


def bound(name: str, columns: Sequence[str]) -> Format:
    """The format for a table of these columns: of several pairs of columns the first one, for all its rows."""
    fmt = FORMATS[name]
    if name != "instruction_response":
        return fmt
    prompt, reply = next((pair for pair in PAIRS if set(pair) <= set(columns)), PAIRS[0])
    optional = (*CHAT_COLUMNS, *(CONTEXT_COLUMNS if prompt == "instruction" else ()))
    return replace(fmt, columns=((prompt, reply),), optional=optional, convert=_pair(prompt, reply))


def formats_help() -> str:
    """All formats with columns that suffice for each, in one line."""
    return ", ".join(f"{name} ({' + '.join(fmt.columns[0])})" for name, fmt in FORMATS.items())


def check_format_name(name: str, where: str) -> None:
    """Raises UserError unless `name` is "auto" or a format."""
    if name != "auto" and name not in FORMATS:
        raise UserError(f"unknown format: {where}: {shortened(repr(name), 60)} is none of auto, {', '.join(FORMATS)}")


def recognise(columns: Sequence[str], first_row: Row, wanted: str, where: str) -> str:
    """The format's name: `wanted` if its columns are there, or for "auto" the first format that fits.

    Raises UserError that lists the columns found and the formats."""
    check_format_name(wanted, where)
    found = f"the columns are {shortened(', '.join(columns) or '(none)', 100)}"
    if wanted != "auto":
        if not FORMATS[wanted].fits(columns):
            needs = shortened(FORMATS[wanted].needs(), 140)
            raise UserError(f"missing column: {where}: format {wanted} needs {needs}; {found}")
        return wanted
    for name, fmt in FORMATS.items():
        if not fmt.fits(columns):
            continue
        if name == "llm_adapters" and not ANSWER_FORMAT.search(str(first_row.get("instruction"))):
            continue  # alpaca rows may carry a short answer beside the full output
        return name
    raise UserError(f"unrecognised columns: {where}: {found}; rename them to a format: {formats_help()}")


def convert(row: Row, form: Format | str, where: str, notes: Notes | None = None) -> Example:
    """One row to one example, which carries `where` (the file and row).

    Raises UserError with `where` in it, and SkipRow for rows to count."""
    fmt = bound(form, list(row)) if isinstance(form, str) else form
    try:
        if row.get("image"):
            raise SkipRow("it needs an image")
        if type(row) is Repeated and row.key in fmt.uses:
            raise RowError(f"column {row.key!r} stands more than once: keep one of them")
        example = fmt.convert(row, Notes() if notes is None else notes)
    except RowError as error:
        raise UserError(f"bad row: {where}: {error}") from None
    except RecursionError:
        raise UserError(f"bad row: {where}: nested too deeply") from None
    object.__setattr__(example, "where", where)  # made just now, and nobody else's yet
    return example
