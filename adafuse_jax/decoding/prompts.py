"""Prompts as people give them: files and pipes of text or JSON lines, and lines typed or piped to stdin."""

from __future__ import annotations

import codecs
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from adafuse_jax.core.errors import UserError
from adafuse_jax.core.fields import require_text
from adafuse_jax.core.tables import read_text
from adafuse_jax.data.examples import Chat, Message, Role

TURN_KEYS = ("tool_calls", "tool_call_id", "name", "reasoning_content")
"""Of a turn in a prompt, beside its role and its content."""
Prompt = str | Chat
"""Text, or the turns before the answer."""


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a file or a pipe, one a line: text, or in a .jsonl file an object with `prompt` or `messages`.

    Raises `UserError` for a file that cannot be read, is not UTF-8, or has no prompt; and for a bad line, by number.
    """
    text = read_text(path, what="--prompts-file ", advice="give an existing file of prompts", pipe=True)
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            is_json, where = path.suffix == ".jsonl", f"--prompts-file {path}, line {number}"
            prompts.append(_json_prompt(line, where) if is_json else line.rstrip("\r"))
    if not prompts:
        raise UserError(f"--prompts-file {path}: has no prompt; write one a line")
    return prompts


def _json_prompt(line: str, where: str) -> Prompt:
    try:
        table: Any = json.loads(line)
        if isinstance(table, dict) and isinstance(table.get("prompt"), str):
            require_text(where, table["prompt"])
            return table["prompt"]
        messages = tuple(_message(turn) for turn in table["messages"])
        tools = table.get("tools")
        if messages and all(m.role in get_args(Role) for m in messages) and isinstance(tools, list | None):
            require_text(where, "".join(m.content for m in messages))
            return Chat(messages, tools=json.dumps(tools) if tools else "")
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    roles = ", ".join(get_args(Role))
    raise UserError(f'{where}: give {{"prompt": TEXT}} or {{"messages": [{{"role", "content"}}, …]}} of roles {roles}')


def _message(turn: dict[str, Any]) -> Message:
    """A turn of a prompt with the further keys that templates know. Its content is text, or nothing beside tool calls."""
    extra = {name: turn[name] for name in TURN_KEYS if turn.get(name) is not None}
    content = turn.get("content") if "tool_calls" in extra else turn["content"]
    if not isinstance(content or "", str):
        raise TypeError
    return Message(turn["role"], content or "", extra=json.dumps(extra) if extra else "")


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
            yield line.rstrip("\r\n")
