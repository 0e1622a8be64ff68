"""Prompts as people give them: files and pipes of text or JSON lines, and lines typed or piped to stdin."""

from __future__ import annotations

import codecs
import io
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adafuse_jax.core.errors import UserError, quoted, shortened
from adafuse_jax.core.fields import require_text
from adafuse_jax.core.tables import read_text
from adafuse_jax.data.conversations import messages_of, tools_of
from adafuse_jax.data.examples import Chat
from adafuse_jax.data.json_rows import DECODER
from adafuse_jax.data.rows import Notes, Repeated, RowError

log = logging.getLogger(__name__)

LINE_END = re.compile(r"\r\n|\n|\r")
Prompt = str | Chat
"""Text, or the turns before the answer."""


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a file or a pipe, one a line: text, or in a .jsonl file an object with `prompt` or `messages`.

    Raises `UserError` for a file that cannot be read, is not UTF-8, or has no prompt; and for a bad line, by number.
    """
    text = read_text(path, what="--prompts-file ", advice="give an existing file of prompts", pipe=True)
    prompts: list[Prompt] = []
    notes = Notes()
    for number, line in enumerate(LINE_END.split(text), 1):
        where = f"--prompts-file {path}, line {number}"
        if line.strip() and path.suffix.lower() == ".jsonl":
            prompts.append(_json_prompt(line, where, notes))
        elif line.strip():
            require_text(where, line)
            prompts.append(line)
    if not prompts:
        raise UserError(f"--prompts-file {path}: has no prompt; write one a line")
    if notes.altered:
        log.info("--prompts-file %s: %s", path, "; ".join(f"{n} {what}" for what, n in notes.altered.items()))
    if notes.unused:
        log.warning("--prompts-file %s: keys not used: %s", path, shortened(", ".join(notes.unused), 200))
    return prompts


def _json_prompt(line: str, where: str, notes: Notes) -> Prompt:
    """The prompt of a line. `notes` gets keys of the object and of its turns that nothing reads."""
    try:
        table: Any = DECODER.decode(line.strip())
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict) or (not isinstance(table.get("prompt"), str) and not table.get("messages")):
        raise UserError(f'{where}: give {{"prompt": TEXT}} or {{"messages": [{{"role", "content"}}, …]}}')
    if type(table) is Repeated:
        raise UserError(f"{where}: has the key {quoted(table.key)} more than once; keep one of them")
    prompt: Prompt
    if isinstance(table.get("prompt"), str):
        prompt, read = str(table["prompt"]), {"prompt"}
        require_text(where, prompt)
    else:
        prompt, read = _conversation(table, where, notes), {"messages", "tools"}
    notes.unused |= {name: None for name, value in table.items() if name not in read and value is not None}
    return prompt


def _conversation(table: dict[str, Any], where: str, notes: Notes) -> Chat:
    """The turns as training reads them."""
    turns = table["messages"]
    if not isinstance(turns, list):
        raise UserError(f"{where}: messages is {quoted(turns)}; it must be a list of turns")
    try:
        messages = messages_of(turns, notes)
    except RowError as error:
        raise UserError(f"{where}: {error}") from None
    require_text(where, "".join(m.content for m in messages))
    try:
        return Chat(tuple(messages), tools=tools_of(table))
    except RowError as error:
        raise UserError(f"{where}: {error}") from None


def stdin_lines(ask: str = "") -> Iterator[str]:
    """Lines with text, without the byte order mark that the first may begin with."""
    if sys.stdin is None:
        raise UserError("stdin is closed; give --prompt or --prompts-file")
    interactive = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # a C locale lets broken bytes through
    first = True
    while True:
        if interactive and ask:
            print(ask, end="", flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            utf16 = first and error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            fault = "is UTF-16" if utf16 else f"not UTF-8 (byte {error.start})"
            raise UserError(f"stdin: {fault}; give UTF-8 text") from error
        if not line:
            return
        if first:
            line, first = line.removeprefix("\ufeff"), False
        if line.strip():
            require_text("stdin", line)
            yield line.rstrip("\r\n")
