"""Parts of a conversation that a chat template does not write: refused where a model would learn or answer without them
(tools, their calls and results, the last turn), logged where it would still see the rest (system turns, reasoning)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from adafuse_jax.core.errors import UserError
from adafuse_jax.data.examples import Chat, Example, Message
from adafuse_jax.data.rendering import MARK, REASONING, render, render_all
from adafuse_jax.data.templates import TemplateLimit

log = logging.getLogger(__name__)


def require_written(messages: Sequence[Message], text: str, tokenizer: Any, tools: str) -> None:
    """Raise UserError if the conversation's text is the same without its tools, tool calls or results: most templates do not
    write them, and leave them out without an error."""

    def without_calls(message: Message) -> Message:
        extra = json.loads(message.extra) if message.extra else {}
        return replace(message, extra=json.dumps({k: v for k, v in extra.items() if k != "tool_calls"}))

    changed = {
        "the tools": (messages, ""),
        "tool calls": ([without_calls(message) for message in messages], tools),
        "results of tools": ([replace(m, content=MARK) if m.role == "tool" else m for m in messages], tools),
    }
    present = (tools, any("tool_calls" in m.turn() for m in messages), any(m.role == "tool" for m in messages))
    for (what, (turns, offered)), is_present in zip(changed.items(), present, strict=True):
        try:
            other = render(turns, tokenizer, add_generation_prompt=False, tools=offered) if is_present else ""
        except TemplateLimit:
            raise
        except UserError:  # it refuses the changed conversation: so it reads what was changed
            continue
        if other == text:
            raise UserError(f"chat template: leaves out {what}: use a model whose template writes them, or other data")


class LeftOut:
    """Search of the examples of a data set, some at a time, for what the tokenizer's chat template does not write."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._unseen: dict[str, Callable[[Message], Message]] = {}
        if tokenizer.chat_template:
            self._unseen = {
                "system turns": _other_system,
                "the reasoning of assistant turns": _other_reasoning,
                "the text beside tool calls": _other_text_of_calls,
            }

    def found_in(self, examples: Sequence[Example]) -> list[str]:
        """System turns, the reasoning of assistant turns and their text beside tool calls, where the text of the data set's
        first conversation that has them is among these examples and the same whatever they hold."""
        chats = [example.messages for example in examples if isinstance(example, Chat)]
        found = []
        for what, changed in list(self._unseen.items()):
            messages = next((turns for turns in chats if any(changed(m) is not m for m in turns)), None)
            if messages is not None:
                del self._unseen[what]
                if _same(messages, changed, self._tokenizer):
                    found.append(what)
        return found


def _same(messages: Sequence[Message], changed: Callable[[Message], Message], tokenizer: Any) -> bool:
    """True if the conversation's text is the same with every message changed."""
    try:
        texts = render_all([(messages, False), ([changed(m) for m in messages], False)], tokenizer)
    except TemplateLimit:
        raise
    except UserError:  # reported for its row
        return False
    return texts[0] == texts[1]


def _other_system(message: Message) -> Message:
    return replace(message, content=MARK) if message.role == "system" else message


def require_last_turn(messages: Sequence[Message], tokenizer: Any) -> None:
    """Raise UserError if the conversation's text does not depend on the content of its last turn."""

    def other_last(message: Message) -> Message:
        return replace(message, content=MARK) if message is messages[-1] else message

    if messages and messages[-1].content.strip() and _same(messages, other_last, tokenizer):
        raise UserError(f"chat template: leaves the {messages[-1].role} turn out; correct the template")


def _other_reasoning(message: Message) -> Message:
    extra = json.loads(message.extra) if message.extra and message.role == "assistant" else {}
    if not any(name in extra for name in REASONING):
        return message
    return replace(message, extra=json.dumps({k: MARK if k in REASONING else value for k, value in extra.items()}))


def _other_text_of_calls(message: Message) -> Message:
    has_both = message.extra and message.content.strip() and "tool_calls" in message.turn()
    return replace(message, content=MARK) if has_both else message


def log_unwritten_system(tokenizer: Any, where: str) -> None:
    """Log if the tokenizer's chat template leaves system turns out."""
    turns = (Message("system", "."), Message("user", "?"))
    if tokenizer.chat_template and _same(turns, _other_system, tokenizer):
        log.warning("%s: the chat template leaves system turns out", where)
