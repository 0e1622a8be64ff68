"""What a row of any dataset becomes: a conversation, a plain text, or a question with candidate answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that ends with an assistant turn; the loss is on every assistant turn."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text; the loss is on all of it."""

    text: str


@dataclass(frozen=True, slots=True)
class MultipleChoice:
    """`question` is the whole user prompt with its labelled choices; `choices` are the candidate responses, of which
    `choices[answer]` is right."""

    question: str
    choices: tuple[str, ...]
    answer: int

    def chat(self, choice: int | None = None) -> Chat:
        """The conversation in which the assistant gives candidate `choice` (default: the right one)."""
        response = self.choices[self.answer if choice is None else choice]
        return Chat((Message("user", self.question), Message("assistant", response)))


Example = Chat | Text | MultipleChoice
