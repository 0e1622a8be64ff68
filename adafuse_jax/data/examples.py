"""Examples, one for a row of any data set: a conversation, a plain text, or a question with candidate answers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    `weight` 0 keeps the loss off an assistant turn. `extra` is a JSON object with the further keys that chat templates
    know (`tool_calls`, `tool_call_id`, `name`, `reasoning_content`), or ""."""

    role: Role
    content: str
    weight: int = 1
    extra: str = ""

    def turn(self) -> dict[str, Any]:
        """The turn as `apply_chat_template` takes it."""
        return {"role": self.role, "content": self.content, **(json.loads(self.extra) if self.extra else {})}


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that ends with an assistant turn; the loss is on every assistant turn whose weight is not 0.

    `tools` is a JSON list of the functions offered to the assistant, for the chat template, or "". `where` names the row
    for messages: "a.jsonl: line 3"."""

    messages: tuple[Message, ...]
    tools: str = ""
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text; the loss is on all of it. `where` names the row for messages."""

    text: str
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class MultipleChoice:
    """`question` is the whole user prompt with its labelled choices; `choices` are the candidate responses, of which
    `choices[answer]` is right. `where` names the row for messages."""

    question: str
    choices: tuple[str, ...]
    answer: int
    where: str = field(default="", compare=False)

    def chat(self, choice: int | None = None) -> Chat:
        """The conversation in which the assistant gives candidate `choice` (default: the right one)."""
        response = self.choices[self.answer if choice is None else choice]
        return Chat((Message("user", self.question), Message("assistant", response)), where=self.where)


Example = Chat | Text | MultipleChoice
