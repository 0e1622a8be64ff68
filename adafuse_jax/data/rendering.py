"""Conversations to text: by the tokenizer's chat template, or else as Alpaca text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from adafuse_jax.core.errors import UserError
from adafuse_jax.data import templates
from adafuse_jax.data.examples import Message
from adafuse_jax.data.templates import TemplateRefusal, template_of

MARK = "\ue000"
"""A character of private use, which no template writes: it shows where a template puts a reply."""
REASONING = ("reasoning_content", "thinking", "reasoning")
UNWRITTEN = ("tool_calls", "tool_call_id", *REASONING)
"""Keys of a turn that the Alpaca text has no place for."""
Part = tuple[Sequence[Message], bool]
"""Messages, and whether the start of an assistant turn follows them (add_generation_prompt)."""


def render(messages: Sequence[Message], tokenizer: Any, *, add_generation_prompt: bool, tools: str = "") -> str:
    """The conversation as text: by the tokenizer's chat template, or else as Alpaca text.

    Raises UserError when the template refuses the conversation (roles that do not alternate, a system turn, ...) or takes
    too much time or memory, or when tools are used without a template."""
    return render_all([(messages, add_generation_prompt)], tokenizer, tools)[0]


def render_all(parts: Sequence[Part], tokenizer: Any, tools: str = "") -> list[str]:
    """`render` of each part of one conversation."""
    (texts,) = render_conversations([(parts, tools)], tokenizer)
    if isinstance(texts, UserError):
        raise texts
    return texts


def render_conversations(
    conversations: Sequence[tuple[Sequence[Part], str]], tokenizer: Any
) -> Iterator[list[str] | UserError]:
    """`render` of the parts of each conversation, with its tools, some at a time; or the error of the conversation, not
    raised.

    Raises `TemplateLimit`, which is of the template."""

    def has_template(tools: str) -> bool:
        return template_of(tokenizer, tools) is not None

    given = (
        ([([message.turn() for message in messages], add) for messages, add in parts], json.loads(tools or "null"))
        for parts, tools in conversations
        if has_template(tools)
    )
    rendered = templates.render_conversations(tokenizer, given)
    for parts, tools in conversations:
        texts = next(rendered) if has_template(tools) else _alpaca_texts(parts, tokenizer, tools)
        yield _refused(parts, texts) if isinstance(texts, TemplateRefusal) else texts


def _refused(parts: Sequence[Part], error: TemplateRefusal) -> UserError:
    calls = {True: " with tool calls", False: ""}
    messages = parts[error.part][0]
    roles = ", ".join(m.role + calls["tool_calls" in m.turn()] for m in messages) or "none"
    hint = "" if any(m.role == "system" for m in messages) else ", or give a system turn if it needs one"
    return UserError(f"chat template: turns {roles}: {error}: change the data or the tokenizer's template{hint}")


def _alpaca_texts(parts: Sequence[Part], tokenizer: Any, tools: str) -> list[str] | UserError:
    try:
        return [_alpaca(messages, tokenizer, add, tools) for messages, add in parts]
    except UserError as error:
        return error


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
