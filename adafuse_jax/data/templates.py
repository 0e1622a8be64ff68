"""Chat templates rendered in a process of their own (`template_worker`), which a template cannot keep busy for ever."""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from typing import Any

from adafuse_jax.core.errors import UserError

MAX_SECONDS = 3
"""Limit of processor time for one rendering. A template of a real model takes a millisecond."""
MAX_MEMORY = 2**29
"""Bytes of address space of the rendering process."""
MAX_CHARACTERS = 2**20
"""Characters that a rendered conversation may have beyond 16 times those of the conversation itself."""
BATCH_CHARACTERS = 2**20
"""Characters of all parts of conversations in one request, at most, unless those of one are more."""
Conversation = tuple[Sequence[tuple[Sequence[dict[str, Any]], bool]], Any]
"""Parts of a conversation, (turns, add_generation_prompt), and its tools."""
_date: ContextVar[datetime | None] = ContextVar("template_date", default=None)


class TemplateRefusal(Exception):
    """A conversation that the template cannot render, in the template's own words; `part` names the rendering."""

    def __init__(self, message: str, part: int):
        super().__init__(message)
        self.part = part


class TemplateLimit(UserError):
    """A template that takes too long, needs too much memory or has no process to render it, whatever the conversation."""


@contextmanager
def template_date(date: datetime | None = None) -> Iterator[datetime]:
    """A fixed date for all templates rendered inside that ask for the present one (`strftime_now`); default: the one that
    is fixed already, else now.

    The date enters the tokens, so a resumed run must be given that of its first start, which this yields."""
    now = date or _date.get() or _now()
    token = _date.set(now)
    try:
        yield now
    finally:
        _date.reset(token)


def _now() -> datetime:
    """Present time, by the clock that transformers' templates read where it is imported."""
    return getattr(sys.modules.get("transformers.utils.chat_template_utils"), "datetime", datetime).now()


class _Worker:
    """The rendering process: started when it is first needed, and restarted after a template ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0
        self._template: str | None = None

    def ask(self, template: str, request: dict[str, Any], where: str) -> list[dict[str, Any]]:
        """The answer of the process. Raises `TemplateLimit` when there is none; `where` names the tokenizer in it."""
        with self._lock:
            forked = self._owner != os.getpid()  # a forked process must not share the pipes
            if self._process is None or forked or self._process.poll() is not None:
                self._start()
            process = self._process
            assert process is not None
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                if template != self._template:
                    limits = {"seconds": MAX_SECONDS, "bytes": MAX_MEMORY}
                    process.stdin.write(json.dumps({"template": template, "limits": limits}) + "\n")
                    self._template = template
                process.stdin.write(json.dumps(request, default=str) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
            except BaseException:  # interrupted: its answer would be taken for the next one's
                self.stop()
                raise
            if line.endswith("\n"):
                return json.loads(line)
            code = self.stop()
        if code == -signal.SIGPROF:
            raise TemplateLimit(
                f"{where}: chat template: takes more than {MAX_SECONDS} seconds for one conversation; correct the template"
            )
        raise TemplateLimit(
            f"{where}: chat template: ended the process that rendered it (exit code {code}); correct the template"
        )

    def start(self) -> None:
        """Start the process before it is needed: it imports its library meanwhile."""
        with self._lock:
            if self._process is None:
                self._start()

    def _start(self) -> None:
        try:
            self._process = subprocess.Popen(
                # -P: the folder of the file, whose modules have names like `files`, is no place to import from
                [sys.executable, "-P", "-u", str(Path(__file__).with_name("template_worker.py"))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                encoding="utf-8", start_new_session=True,  # Ctrl-C is for the parent
            )  # fmt: skip
        except OSError as error:
            reason = error.strerror or error
            raise TemplateLimit(
                f"chat template: a process to render it cannot be started: {reason}: end other programs"
            ) from error
        self._owner, self._template = os.getpid(), None

    def stop(self) -> int | None:
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return None
        for pipe in (process.stdin, process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:
                pass
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


_worker = _Worker()
atexit.register(_worker.stop)
start_rendering = _worker.start


def template_of(tokenizer: Any, tools: Any = None) -> str | None:
    """The template that transformers takes: of several, `tool_use` where tools are given, else `default`; None without."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        name = "tool_use" if tools and "tool_use" in template else "default"
        if name not in template:
            raise UserError(
                f"the tokenizer has chat templates {', '.join(map(str, sorted(template)))} and no default; name one default"
            )
        template = template[name]
    return template or None


def dates_written(tokenizer: Any) -> list[str]:
    """Forms in which the present date, which `template_date` fixes, can enter texts: each that the template asks for; or
    all of it, where formats are not written out in the template."""
    date, template = _date.get() or _now(), json.dumps(tokenizer.chat_template)
    uses = re.sub(r"strftime_now\s+is\s+(not\s+)?(defined|none)\b", "", template)
    formats = re.findall(r"""strftime_now\(\s*(?:'([^'"\\]+)'|\\"([^'"\\]+)\\")\s*\)""", uses)
    if len(formats) < uses.count("strftime_now"):
        return [date.isoformat()]
    return [date.strftime(one or other) for one, other in formats]


def render_conversations(
    tokenizer: Any, conversations: Iterable[Conversation]
) -> Iterator[list[str] | TemplateRefusal]:
    """The texts of each conversation's parts by the tokenizer's chat template, or why the template refuses it: a
    `TemplateRefusal`, also for an error in the template. The process is asked for a mebibyte of text at a time, when the
    first of it is wanted.

    Raises:
      TemplateLimit: more than `MAX_SECONDS` of processor time, `MAX_MEMORY` or `MAX_CHARACTERS`.
    """
    for template, batch in _batches(tokenizer, conversations):
        request = {
            "variables": {**tokenizer.special_tokens_map, "documents": None},
            "date": (_date.get() or _now()).isoformat(),
            "conversations": batch,
        }
        yield from map(_texts, _worker.ask(template, request, tokenizer.name_or_path))


def _batches(tokenizer: Any, conversations: Iterable[Conversation]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Requests: conversations of one template, and at most `BATCH_CHARACTERS` of them or one."""
    batch: list[dict[str, Any]] = []
    template, characters = None, 0
    for parts, tools in conversations:
        own = template_of(tokenizer, tools)
        sizes = [sum(len(str(turn)) for turn in turns) + len(str(tools)) for turns, _ in parts]
        size = sum(sizes)
        if batch and (own != template or characters + size > BATCH_CHARACTERS):
            assert template is not None
            yield template, batch
            batch, characters = [], 0
        template, characters = own, characters + size
        batch.append(
            {
                "tools": tools,
                "characters": MAX_CHARACTERS + 16 * max(sizes, default=0),
                "parts": [
                    {"messages": [_aliased(turn) for turn in turns], "add_generation_prompt": add}
                    for turns, add in parts
                ],
            }
        )
    if batch:
        assert template is not None
        yield template, batch


def _texts(answer: dict[str, Any]) -> list[str] | TemplateRefusal:
    if "error" in answer:
        return TemplateRefusal(answer["error"], answer["part"])
    for part, text in enumerate(answer["texts"]):
        if text.isascii():
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return TemplateRefusal(f"writes half of a character ({error.object[error.start]!r})", part)
    return answer["texts"]


def _aliased(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn as transformers gives it to templates: no null values, reasoning under each name that templates read."""
    turn = {name: value for name, value in turn.items() if value is not None}
    reasoning = next((turn[name] for name in ("reasoning_content", "thinking", "reasoning") if name in turn), None)
    return turn if reasoning is None else {"thinking": reasoning, **turn, "reasoning_content": reasoning}
