"""Mistakes a user can make, each reported in one line: the fault, the place, and the remedy."""

from __future__ import annotations

from typing import Any

EXIT_CODE = 2
MAX_MESSAGE = 400
"""Characters of a message, at most: input that is echoed never floods a terminal."""


class UserError(ValueError):
    """Bad input. The message is one line that names the fault, the place and the remedy; nothing on disk has changed.

    A message of more than `MAX_MESSAGE` characters loses its middle: the place stands at its beginning, the remedy at its
    end.
    """

    def __init__(self, message: str):
        super().__init__(shortened(message, MAX_MESSAGE))


def shortened(text: str, limit: int) -> str:
    """`text` as one line of at most `limit` characters: white space collapsed, control characters escaped, its middle
    replaced by `…` if it is longer."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    if len(line) <= limit:
        return line
    tail = limit * 2 // 5
    return f"{line[: limit - tail - 1]}…{line[len(line) - tail :]}"


def quoted(value: Any, limit: int = 60) -> str:
    """`repr(value)` for a message, in at most `limit` characters. Large integers and containers are never spelled out."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str | bytes):
        value = value[: limit + 1]
    elif isinstance(value, list | tuple | set | dict) and len(value) > 16:
        return f"a {type(value).__name__} of {len(value)} entries"
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__}"
    return shortened(text, limit)
