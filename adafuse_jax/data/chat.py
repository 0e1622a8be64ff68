"""Examples to tokens: the chat template (or the Alpaca text) rendered and tokenised once, the loss on the responses.

    text      = template(messages)                                         one string
    prefix_i  = template(messages[:i], add_generation_prompt=True)         what decoding is given before reply i
    reply_i   = text[len(prefix_i) : end of the end-of-turn token]         where the loss is
    target t <=> token t starts inside a reply (a token that straddles the boundary belongs to the prompt)

loss_mask[t] is True iff token t is itself a target, predicted from t-1; token 0 never is.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from jaxtyping import Bool, Int32

from adafuse_jax.core.errors import UserError
from adafuse_jax.data.examples import Chat, Example, Message, MultipleChoice, Text
from adafuse_jax.data.files import without_logs
from adafuse_jax.data.tokens import tokens_and_starts

ENCODE_CHUNK = 1024
_date: ContextVar[datetime | None] = ContextVar("template_date", default=None)


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example: tokens int32 [T] and loss_mask bool [T]."""

    tokens: Int32[np.ndarray, " T"]
    loss_mask: Bool[np.ndarray, " T"]


@dataclass(frozen=True, slots=True)
class _Rendered:
    """Text, the character spans that are targets, and whether an EOS token, also a target, follows the text."""

    text: str
    targets: tuple[tuple[int, int], ...]
    append_eos: bool


def load_tokenizer(path_or_hub_id: str | Path) -> Any:
    """The fast tokenizer of a local model directory or a hub id.

    Raises UserError when it cannot be loaded, has no offsets (a slow tokenizer) or has no EOS token."""
    name = str(path_or_hub_id)
    local = Path(name).is_dir()
    if not local and (Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(
            f"no tokenizer: {name}: not a directory: give a Hugging Face model directory or a hub id org/name"
        )
    try:
        # transformers warns on import when torch is missing, which is no fault here
        with mock.patch.dict(os.environ, {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}), without_logs():
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
    except Exception as error:  # the library raises anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        advice = "it needs tokenizer.json and tokenizer_config.json" if local else "check the name and the connection"
        raise UserError(f"cannot load the tokenizer: {name}: {reason}: {advice}") from None
    if not tokenizer.is_fast:
        raise UserError(f"slow tokenizer: {name}: offsets are needed: provide a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise UserError(f"no EOS token: {name}: set eos_token in tokenizer_config.json")
    return tokenizer


@contextmanager
def template_date(date: datetime | None = None) -> Iterator[datetime]:
    """A fixed date for all templates rendered inside that ask for the present one (`strftime_now`); default: now.

    The date enters the tokens, so a resumed run must be given that of its first start, which this yields."""
    now = date or datetime.now()
    token = _date.set(now)
    try:
        yield now
    finally:
        _date.reset(token)


@contextmanager
def _fixed_clock() -> Iterator[None]:
    from transformers.utils import chat_template_utils

    date = _date.get()
    if date is None:
        yield
        return

    class Fixed(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return date

    with mock.patch.object(chat_template_utils, "datetime", Fixed):
        yield


def render(messages: Sequence[Message], tokenizer: Any, *, add_generation_prompt: bool) -> str:
    """The conversation as text: by the tokenizer's chat template, or else as Alpaca text.

    Raises UserError when the template refuses the conversation (roles that do not alternate, a system turn, ...)."""
    if tokenizer.chat_template:
        turns = [m.turn() for m in messages]
        try:
            with _fixed_clock():
                return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template raises what it likes
            roles = ", ".join(m.role for m in messages)
            raise UserError(
                f"chat template: turns {roles}: {error}: change the data or the tokenizer's template"
            ) from None
    blocks = []
    for m in messages:
        if m.role == "assistant":
            blocks.append(f"### Response:\n{m.content}{tokenizer.eos_token}")
        else:
            blocks.append(f"### Instruction:\n{m.content}" if m.role == "user" else m.content)
    if add_generation_prompt:
        blocks.append("### Response:\n")
    return "\n\n".join(blocks)


@functools.lru_cache(maxsize=8)
def _special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """All special tokens, of which `all_special_tokens` has only those with a role (BOS, EOS, ...)."""
    added = (t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
    return tuple({*tokenizer.all_special_tokens, *added})


def stop_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a reply in training, at which decoding stops: EOS and the template's end-of-turn token."""
    ids = {tokenizer.eos_token_id}
    chat = Chat((Message("user", "?"), Message("assistant", "!")))
    row = next(_encode_texts([_render_example(chat, tokenizer, with_end=True)], tokenizer))
    return tuple(sorted(ids | {int(row.tokens[-1])}))


def _end_of_turn(turn: str, content: str, tokenizer: Any) -> tuple[int, int]:
    """(start, end) of the end-of-turn token in an assistant turn's text: its first special token behind the content.
    Without one, both are the end of the turn's text."""
    found_at = turn.find(content.strip())
    behind = found_at + len(content.strip()) if found_at >= 0 else 0
    hits = [(turn.find(token, behind), len(token)) for token in _special_tokens(tokenizer)]
    hits = [(at, -size) for at, size in hits if at >= 0]
    if not hits:
        return len(turn.rstrip()), len(turn.rstrip())
    at, size = min(hits)
    return at, at - size


def _render_example(example: Example, tokenizer: Any, *, with_end: bool) -> _Rendered:
    if isinstance(example, Text):
        return _Rendered(example.text, ((0, len(example.text)),), append_eos=True)
    messages = example.chat().messages if isinstance(example, MultipleChoice) else example.messages
    spans: list[tuple[int, int]] = []
    text, closed = "", True
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prefix = render(messages[:i], tokenizer, add_generation_prompt=True)
        longer = render(messages[: i + 1], tokenizer, add_generation_prompt=False)
        if not longer.startswith(prefix) or not longer.startswith(text):
            raise UserError(
                f"chat template: assistant turn {len(spans) + 1}: the conversation does not continue the text of its "
                "prompt, so no token-by-token loss exists: use a template that only appends"
            )
        start, end = _end_of_turn(longer[len(prefix) :], message.content, tokenizer)
        closed = end > start
        spans.append((len(prefix), len(prefix) + (end if with_end else start)))
        text = longer
    stop = spans[-1][1] if spans else 0
    return _Rendered(text[:stop], tuple(spans), append_eos=with_end and bool(spans) and not closed)


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]


def _encode_texts(rendered: Sequence[_Rendered], tokenizer: Any) -> Iterator[Encoded]:
    adds_bos = _adds_bos(tokenizer)
    encoded = tokens_and_starts([r.text for r in rendered], tokenizer)
    for r, (tokens, starts) in zip(rendered, encoded, strict=True):
        mask = np.zeros(len(tokens), bool)
        for start, stop in r.targets:
            mask |= (starts >= start) & (starts < stop)
        if adds_bos and tokens[:1].tolist() != [tokenizer.bos_token_id]:
            tokens, mask = np.insert(tokens, 0, tokenizer.bos_token_id), np.insert(mask, 0, False)
        if r.append_eos:
            tokens, mask = np.append(tokens, np.int32(tokenizer.eos_token_id)), np.append(mask, True)
        mask[:1] = False
        yield Encoded(tokens.astype(np.int32), mask)


def _truncate(encoded: Encoded, max_length: int) -> Encoded | None:
    cut = Encoded(encoded.tokens[:max_length], encoded.loss_mask[:max_length])
    return cut if cut.loss_mask.any() else None


def encode(example: Example, tokenizer: Any, max_length: int) -> Encoded | None:
    """Tokens and loss mask of an example, cut at `max_length` tokens; None when no target is left.

    Chats and the right answer of a multiple choice: targets are every assistant turn with its end-of-turn token; what a
    template writes after the last one is left out. A template without a special token at the end of a turn gets an EOS
    after the last one. Text: all tokens, then EOS. BOS comes first, once, if the tokenizer or the template adds it.
    Raises UserError when the chat template refuses the turns or rewrites earlier ones."""
    return _truncate(next(_encode_texts([_render_example(example, tokenizer, with_end=True)], tokenizer)), max_length)


def encode_all(examples: Sequence[Example], tokenizer: Any, max_length: int) -> tuple[list[Encoded], int]:
    """`encode` of many examples (faster than one by one), and how many gave nothing. A long `Text` is not cut but goes
    on in further pieces of `max_length` tokens, each without its first token as a target."""
    kept: list[Encoded] = []
    dropped = 0
    for at in range(0, len(examples), ENCODE_CHUNK):
        chunk = examples[at : at + ENCODE_CHUNK]
        rendered = [_render_example(e, tokenizer, with_end=True) for e in chunk]
        for example, encoded in zip(chunk, _encode_texts(rendered, tokenizer), strict=True):
            pieces = _pieces(encoded, max_length) if isinstance(example, Text) else [encoded]
            whole = [cut for piece in pieces if (cut := _truncate(piece, max_length)) is not None]
            kept += whole
            dropped += not whole
    return kept, dropped


def _pieces(encoded: Encoded, max_length: int) -> Iterator[Encoded]:
    for start in range(0, len(encoded.tokens), max_length):
        piece = slice(start, start + max_length)
        mask = encoded.loss_mask[piece].copy()
        mask[0] = False
        yield Encoded(encoded.tokens[piece], mask)


def encode_prompt(messages: Sequence[Message], tokenizer: Any) -> Int32[np.ndarray, " T"]:
    """The tokens that decoding starts from: the conversation so far and the start of an assistant turn; int32 [T]."""
    text = render(messages, tokenizer, add_generation_prompt=True)
    return next(_encode_texts([_Rendered(text, (), append_eos=False)], tokenizer)).tokens


def encode_choices(example: MultipleChoice, tokenizer: Any, max_length: int) -> list[Encoded] | None:
    """One `Encoded` a candidate, its mask on the candidate's own tokens (no end-of-turn token: its probability says
    nothing about the choice). None when a candidate does not fit `max_length`: cut candidates cannot be compared."""
    chats = [example.chat(i) for i in range(len(example.choices))]
    encoded = list(_encode_texts([_render_example(chat, tokenizer, with_end=False) for chat in chats], tokenizer))
    return encoded if all(len(e.tokens) <= max_length for e in encoded) else None
