"""Text in and out: requests to token ids, ids to the text of single tokens, and rows to text as it becomes certain."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from adafuse_jax.core.errors import UserError
from adafuse_jax.data.chat import encode_prompt
from adafuse_jax.data.examples import Message
from adafuse_jax.data.tokenizer import special_token_texts
from adafuse_jax.inference.detokenizer import TextStream
from adafuse_jax.inference.rows import check_prompt
from adafuse_jax.serving.errors import invalid
from adafuse_jax.serving.models import ServedModel
from adafuse_jax.serving.protocol import ChatMessage
from adafuse_jax.serving.work import Begun, FinishReason, Token

ROLES: dict[str, Any] = {"developer": "system"}
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""A token of one byte, as SentencePiece writes it."""


def prompt_ids(model: ServedModel, prompt: str | list[int], *, max_tokens: int, vocab_size: int) -> list[int]:
    """Token ids of a text, as `decode.py --raw` has them, or ids as they are. Raises `APIError` 400."""
    if isinstance(prompt, list):
        return checked(prompt, max_tokens, vocab_size, "prompt")
    longest = longest_token(model.tokenizer)
    if len(prompt) > longest * max_tokens:  # before a tokenizer works on it
        raise too_long(f"{len(prompt)} characters", max_tokens, "prompt")
    ids = list(model.tokenizer(prompt)["input_ids"])
    bos = model.tokenizer.bos_token_id
    return checked(ids or ([] if bos is None else [bos]), max_tokens, vocab_size, "prompt")


def chat_ids(model: ServedModel, messages: Sequence[ChatMessage], *, max_tokens: int, vocab_size: int) -> list[int]:
    """Token ids of a conversation and the beginning of the assistant's turn. Raises `APIError` 400."""
    turns = [Message(ROLES.get(m.role, m.role), content_of(m)) for m in messages]
    characters = sum(len(turn.content) for turn in turns)
    if characters > longest_token(model.tokenizer) * max_tokens:
        raise too_long(f"{characters} characters", max_tokens, "messages")
    try:
        ids = encode_prompt(turns, model.tokenizer).tolist()
    except UserError as error:
        raise invalid(str(error), "messages") from error
    return checked(ids, max_tokens, vocab_size, "messages")


def content_of(message: ChatMessage) -> str:
    """The text of a message; parts follow each other as they are."""
    return message.content if isinstance(message.content, str) else "".join(part.text for part in message.content)


def checked(ids: list[int], max_tokens: int, vocab_size: int, param: str) -> list[int]:
    """`ids`, if they leave room for an answer within `max_tokens`. Raises `APIError` 400."""
    if len(ids) >= max_tokens:
        raise too_long(f"{len(ids)} tokens", max_tokens, param)
    try:
        check_prompt(ids, vocab_size)
    except UserError as error:
        raise invalid(str(error), param) from error
    return ids


def too_long(size: str, max_tokens: int, param: str) -> Exception:
    return invalid(
        f"{param}: has {size}, and the model's context holds {max_tokens} tokens, the answer included; shorten it",
        param,
        "context_length_exceeded",
    )


@functools.lru_cache(maxsize=64)
def longest_token(tokenizer: Any) -> int:
    """Characters of the longest token."""
    return max(map(len, tokenizer.get_vocab()))


@functools.lru_cache(maxsize=64)
def special_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that are no part of a text."""
    return frozenset(map(tokenizer.convert_tokens_to_ids, special_token_texts(tokenizer)))


@functools.lru_cache(maxsize=2**16)
def token_text(tokenizer: Any, token_id: int) -> str:
    """The text of one token within a text: with its leading space, which tokenizers drop at the beginning of one."""
    before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    context, both = (
        tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for ids in (before, [*before, token_id])
    )
    return both[len(context) :]


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """The bytes of one token within a text: of a part of a character, too, whose text is a replacement character."""
    text = token_text(tokenizer, token_id)
    if "\ufffd" not in text:
        return text.encode()
    token = tokenizer.convert_ids_to_tokens(token_id)
    if byte := BYTE_TOKEN.fullmatch(token):
        return bytes([int(byte[1], 16)])
    values = [byte_values().get(c) for c in token]
    return text.encode() if None in values else bytes(values)  # type: ignore[arg-type]


@functools.cache
def byte_values() -> dict[str, int]:
    """Character → byte of byte-level tokenizers (GPT-2's table): visible characters stand for themselves, the others follow
    from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


class Answer:
    """One row's answer so far."""

    def __init__(self, model: ServedModel, stops: tuple[str, ...], prompt: Sequence[int]):
        self.tokenizer, self.prompt = model.tokenizer, prompt
        self._stream = TextStream(model.tokenizer, stops)
        self.cached = 0
        self.prompt_logprobs: list[Any] | None = None
        self.tokens: list[Token] = []
        self.finish_reason: FinishReason | None = None

    @property
    def leading_space(self) -> str:
        """The space that the text lacks at its beginning, where tokenizers drop the first word's."""
        first = "" if not self.tokens or self.tokens[0].id is None else token_text(self.tokenizer, self.tokens[0].id)
        return " " if first.startswith(" ") and not self.text.startswith(" ") else ""

    def begin(self, event: Begun) -> None:
        self.cached, self.prompt_logprobs = event.cached, event.prompt_logprobs

    def take(self, token: Token) -> str:
        """The text that a token makes certain. It ends the answer if it completes a stop string."""
        self.tokens.append(token)
        text = "" if token.id is None else self._stream.push(token.id)
        self.finish_reason = "stop" if self._stream.stopped else token.finish_reason
        return text + self._stream.flush() if self.finish_reason else text

    @property
    def text(self) -> str:
        return self._stream.text

    @property
    def num_tokens(self) -> int:
        """Tokens generated, the one that ended the row left out."""
        return sum(token.id is not None for token in self.tokens)
