"""Conversations to text: by the tokenizer's chat template, or else as Alpaca text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from adafuse_jax.core.errors import UserError
from adafuse_jax.data.examples import Message
from adafuse_jax.data.templates import TemplateRefusal, render_parts, template_of

MARK = "\ue000"
"""A character of private use, which no template writes: it shows where a template puts a reply."""
REASONING = ("reasoning_content", "thinking", "reasoning")
UNWRITTEN = ("tool_calls", "tool_call_id", *REASONING)
"""Keys of a turn that the Alpaca text has no place for."""


def render(messages: Sequence[Message], tokenizer: Any, *, add_generation_prompt: bool, tools: str = "") -> str:
    """The conversation as text: by the tokenizer's chat template, or else as Alpaca text.

    Raises UserError when the template refuses the conversation (roles that do not alternate, a system turn, ...) or takes
    too much time or memory, or when tools are used without a template."""
    return render_all([(messages, add_generation_prompt)], tokenizer, tools)[0]


def render_all(parts: Sequence[tuple[Sequence[Message], bool]], tokenizer: Any, tools: str = "") -> list[str]:
    """`render` of each (messages, add_generation_prompt)."""
    if not template_of(tokenizer, tools):
        return [_alpaca(messages, tokenizer, add, tools) for messages, add in parts]
    turns = [([message.turn() for message in messages], add) for messages, add in parts]
    try:
        return render_parts(tokenizer, turns, tools=json.loads(tools) if tools else None)
    except TemplateRefusal as error:
        calls = {True: " with tool calls", False: ""}
        roles = ", ".join(m.role + calls["tool_calls" in m.turn()] for m in parts[error.part][0]) or "none"
        hint = (
            "" if any(m.role == "system" for m in parts[error.part][0]) else ", or give a system turn if it needs one"
        )
        raise UserError(
            f"chat template: turns {roles}: {error}: change the data or the tokenizer's template{hint}"
        ) from None


def _alpaca(messages: Sequence[Message], tokenizer: Any, add_generation_prompt: bool, tools: str) -> str:
    blocks = []
    for m in messages:
        lost = [name for name in UNWRITTEN if name in m.turn()] or (["role tool"] if m.role == "tool" else [])
        if tools or lost:
            raise UserError(f"{lost[0] if lost else 'tools'}: the tokenizer has no chat template to write it; give one")
        if m.role == "assistant":
            blocks.append(f"### Response:\n{m.content}{tokenizer.eos_token}")
        else:
            blocks.append(f"### Instruction:\n{m.content}" if m.role == "user" else m.content)
    if add_generation_prompt:
        blocks.append("### Response:\n")
    return "\n\n".join(blocks)
