"""Examples to tokens: the chat template (or the Alpaca text) rendered and tokenised once, the loss on the responses.

    prompt_i  = template(messages[:i], add_generation_prompt=True)         what decoding is given before reply i
    whole_i   = template(messages[:i + 1])
    reply_i   = whole_i[len(prompt_i) : end of the end-of-turn token]      where the loss is
    target t <=> token t starts inside a reply (a token that straddles the boundary belongs to the prompt)

A conversation is one row if each whole_i begins with prompt_i and with the whole of the reply before: the template only
appends. Templates of reasoning models do not: some leave the reasoning of earlier turns out, some begin a reply in the
generation prompt ("<think>") that the finished conversation writes otherwise. Then each assistant turn becomes a row of its
own, prompt_i + reply_i, with the loss on that turn; where whole_i does not begin with prompt_i, reply_i is the message's
content, less what the generation prompt has already begun of it, and the template's end-of-turn token. So what training sees
before a reply is always what decoding is given.

loss_mask[t] is True iff token t is itself a target, predicted from t-1; token 0 never is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from adafuse_jax.core.errors import UserError
from adafuse_jax.data.examples import Chat, Example, Message, MultipleChoice, Text
from adafuse_jax.data.left_out import left_out, require_last_turn, require_written
from adafuse_jax.data.rendering import MARK, render, render_all
from adafuse_jax.data.templates import TemplateLimit, template_date
from adafuse_jax.data.tokenizer import load_tokenizer as load_tokenizer
from adafuse_jax.data.tokenizer import special_token_texts
from adafuse_jax.data.tokens import tokens_and_starts

log = logging.getLogger(__name__)

ENCODE_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row: tokens int32 [T] and loss_mask bool [T]."""

    tokens: Int32[np.ndarray, " T"]
    loss_mask: Bool[np.ndarray, " T"]


@dataclass(frozen=True, slots=True)
class _Rendered:
    """Text, the character spans that are targets, and whether an EOS token, also a target, follows the text."""

    text: str
    targets: tuple[tuple[int, int], ...]
    append_eos: bool


@dataclass(frozen=True, slots=True)
class _Reply:
    """An assistant turn in its row's text: text[start:end] with its end-of-turn token, if it has one (`closed`), of which
    text[content:content_end] is the message's own."""

    text: str
    start: int
    content: int
    content_end: int
    end: int

    @property
    def closed(self) -> bool:
        return self.end > self.content_end


def stop_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a reply in training, at which decoding stops: EOS and the template's end-of-turn token.

    EOS alone where the template refuses a conversation of one question, with or without a system turn."""
    question, reply = Message("user", "?"), Message("assistant", MARK)
    for messages in ((question, reply), (Message("system", "."), question, reply)):
        try:
            _, tail = _around_mark(messages, tokenizer)
        except TemplateLimit:
            raise
        except UserError:
            continue
        return tuple(sorted({tokenizer.eos_token_id, *_ids(tokenizer, _first_special(tail, tokenizer)[1])}))
    return (tokenizer.eos_token_id,)


def _ids(tokenizer: Any, token: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(token)] if token else []


def _around_mark(messages: Sequence[Message], tokenizer: Any, tools: str = "") -> tuple[str, str]:
    """Text that a template writes before and after the content of the last message, which is `MARK`."""
    text = render(messages, tokenizer, add_generation_prompt=False, tools=tools)
    at = text.rfind(MARK)
    if at < 0:
        raise UserError("chat template: does not write the content of an assistant turn; correct the template")
    return text[:at], text[at + 1 :]


def _first_special(text: str, tokenizer: Any, *, last: bool = False) -> tuple[int, str]:
    """(where, which) of the first, or last, special token in `text`; (its length without trailing space, "") without one."""
    find = text.rfind if last else text.find
    hits = [(at, token) for token in special_token_texts(tokenizer) if token and (at := find(token)) >= 0]
    if not hits:
        return len(text.rstrip()), ""
    return max(hits) if last else min(hits, key=lambda hit: (hit[0], -len(hit[1])))


def _appended(prompt: str, whole: str, messages: Sequence[Message], tokenizer: Any, tools: str) -> _Reply:
    """A reply whose text continues that of its prompt. Its end is the first special token behind the content; of a turn
    with tool calls, which special tokens may enclose, the last one."""
    turn, content = whole[len(prompt) :], messages[-1].content.strip()
    found_at = max(turn.find(content), 0)
    if turn[:found_at].strip():  # a reasoning block, say, which may hold the content too
        header, _ = _around_mark((*messages[:-1], replace(messages[-1], content=MARK)), tokenizer, tools)
        found_at = max(turn.find(content, len(header.rstrip()) - len(prompt)), found_at)
    if content not in turn and "tool_calls" not in messages[-1].turn():
        _around_mark((*messages[:-1], replace(messages[-1], content=MARK)), tokenizer, tools)
    behind = found_at + (len(content) if content in turn else 0)
    at, token = _first_special(turn[behind:], tokenizer, last="tool_calls" in messages[-1].turn())
    # Space before the content may be one token with it.
    start = len(prompt) + len(turn[:found_at].rstrip())
    content_end = len(prompt) + behind + at
    return _Reply(whole, len(prompt), start, content_end, content_end + len(token))


def _composed(prompt: str, whole: str, messages: Sequence[Message], tokenizer: Any, tools: str) -> _Reply:
    """A reply whose text in the finished conversation does not continue its prompt. What the template writes around the
    content is part of the reply, unless the conversation before it is another one, too."""
    message = messages[-1]
    if not whole.startswith(_before_reply(prompt, messages, tokenizer, tools)):
        return _rewritten(prompt, messages, tokenizer, tools)
    header, tail = _around_mark((*messages[:-1], replace(message, content=MARK)), tokenizer, tools)
    if "tool_calls" in message.turn():
        body = whole[_common(whole, prompt) :]
        at, token = _first_special(body, tokenizer, last=True)
        body = body[:at]
    else:
        common = _common(prompt, header)
        begun, body = prompt[common:], message.content if message.content in whole else message.content.strip()
        if begun.strip() and body.lstrip().startswith(begun.strip()):
            body = body.lstrip()[len(begun.strip()) :].removeprefix(begun[len(begun.rstrip()) :])
        at, token = _first_special(tail, tokenizer)
        body = header[common:] + body + tail[:at]
    content_end = len(prompt) + len(body)
    return _Reply(prompt + body + token, len(prompt), len(prompt), content_end, content_end + len(token))


def _before_reply(prompt: str, messages: Sequence[Message], tokenizer: Any, tools: str) -> str:
    """The prompt's text before the assistant's turn begins, without trailing space; empty if the template rewrites it."""
    text = render(messages[:-1], tokenizer, add_generation_prompt=False, tools=tools).rstrip()
    return text if prompt.startswith(text) else ""


def _rewritten(prompt: str, messages: Sequence[Message], tokenizer: Any, tools: str) -> _Reply:
    """A reply of the message's content and the end-of-turn token alone."""
    if "tool_calls" in messages[-1].turn():
        raise UserError(
            "chat template: rewrites the conversation before a tool call; use a model whose template does not"
        )
    _, tail = _around_mark((*messages[:-1], replace(messages[-1], content=MARK)), tokenizer, tools)
    at, token = _first_special(tail, tokenizer)
    body = messages[-1].content.strip() + tail[:at]
    content_end = len(prompt) + len(body)
    return _Reply(prompt + body + token, len(prompt), len(prompt), content_end, content_end + len(token))


def _common(one: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low


def _replies(chat: Chat, tokenizer: Any) -> tuple[list[_Reply], bool]:
    """The assistant turns with weight, and whether all of them are in one text, that of the last."""
    messages = chat.messages
    asked = [i for i, message in enumerate(messages) if message.role == "assistant" and message.weight]
    parts = [part for i in asked for part in ((messages[:i], True), (messages[: i + 1], False))]
    texts = render_all(parts, tokenizer, chat.tools)
    if asked and (chat.tools or any(message.extra or message.role == "tool" for message in messages)):
        require_written(messages[: asked[-1] + 1], texts[-1], tokenizer, chat.tools)
    replies = []
    appends = True
    for n, i in enumerate(asked):
        prompt, whole = texts[2 * n : 2 * n + 2]
        if whole.startswith(prompt):
            replies.append(_appended(prompt, whole, messages[: i + 1], tokenizer, chat.tools))
        else:
            replies.append(_composed(prompt, whole, messages[: i + 1], tokenizer, chat.tools))
        appends &= whole.startswith(prompt) and whole.startswith(texts[2 * n - 1] if n else "")
    return replies, appends


def _rows(example: Example, tokenizer: Any) -> list[_Rendered]:
    if isinstance(example, Text):
        return [_Rendered(example.text, ((0, len(example.text)),), append_eos=True)]
    replies, appends = _replies(example.chat() if isinstance(example, MultipleChoice) else example, tokenizer)
    if not replies:
        return [_Rendered("", (), append_eos=False)]
    if not appends:
        return [_Rendered(r.text[: r.end], ((r.start, r.end),), append_eos=not r.closed) for r in replies]
    last = replies[-1]
    return [
        _Rendered(last.text[: last.end], tuple((r.start, r.end) for r in replies), append_eos=not last.closed)
    ]  # fmt: skip


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
    truncated = Encoded(encoded.tokens[:max_length], encoded.loss_mask[:max_length])
    return truncated if truncated.loss_mask.any() else None


def encode_all(
    examples: Sequence[Example], tokenizer: Any, max_length: int, *, name: str = "", skip_bad_rows: bool = False
) -> tuple[list[Encoded], int]:
    """Rows of tokens with their loss masks, truncated at `max_length` tokens, and how many examples gave none, as no target
    is left in them.

    Chats and the right answer of a multiple choice: targets are the assistant turns of weight 1 with their end-of-turn
    tokens; what a template writes after the last one is left out. A template without a special token at the end of a turn
    gets an EOS after the last one. Text: all tokens, then EOS; a long one is not truncated but goes on in further rows of
    `max_length` tokens, each without its first token as a target. BOS comes first, once, if the tokenizer or the template
    adds it.

    `name`, of the data set, begins the log lines: of conversations that became several rows, and of examples that the
    template refuses and `skip_bad_rows` leaves out. Raises UserError, with the place of the row, for the first of those
    without it, and where it would leave out all of them."""
    encoded_rows: list[Encoded] = []
    refusals: list[UserError] = []
    unfit = conversations = turns = 0
    prefix = f"{name}: " if name else ""
    with template_date():
        for what in left_out(examples, tokenizer):
            log.warning("%sthe chat template leaves %s out", prefix, what)
        for at in range(0, len(examples), ENCODE_CHUNK):
            rendered: list[tuple[Example, list[_Rendered]]] = []
            for example in examples[at : at + ENCODE_CHUNK]:
                try:
                    rendered.append((example, _rows(example, tokenizer)))
                except TemplateLimit:
                    raise
                except UserError as error:
                    placed = UserError(f"{example.where}: {error}") if example.where else error
                    if not skip_bad_rows:
                        raise placed from None
                    refusals.append(placed)
            encoded = _encode_texts([row for _, rows in rendered for row in rows], tokenizer) if rendered else iter(())
            for example, rows in rendered:
                pieces = [next(encoded) for _ in rows]
                if isinstance(example, Text):
                    pieces = list(_pieces(pieces[0], max_length))
                fitting = [row for piece in pieces if (row := _truncate(piece, max_length)) is not None]
                conversations, turns = conversations + (len(rows) > 1), turns + (len(rows) > 1) * len(rows)
                unfit += not fitting
                encoded_rows += fitting
    if refusals and len(refusals) == len(examples):
        raise refusals[0]
    if refusals:
        log.warning(
            "%s%d of %d examples left out, which the chat template refuses; the first: %s",
            prefix, len(refusals), len(examples), refusals[0],
        )  # fmt: skip
    if conversations:
        log.info(
            "%s%d conversations are trained as %d rows, one an assistant turn: the chat template rewrites earlier turns",
            prefix, conversations, turns,
        )  # fmt: skip
    return encoded_rows, unfit


def _pieces(encoded: Encoded, max_length: int) -> Iterator[Encoded]:
    for start in range(0, len(encoded.tokens), max_length):
        piece = slice(start, start + max_length)
        mask = encoded.loss_mask[piece].copy()
        mask[0] = False
        yield Encoded(encoded.tokens[piece], mask)


def encode_prompt(messages: Sequence[Message], tokenizer: Any, *, tools: str = "") -> Int32[np.ndarray, " T"]:
    """The tokens that decoding starts from: the conversation so far and the start of an assistant turn; int32 [T].

    Raises UserError as `render`, and for a template that leaves the last turn out."""
    text = render(messages, tokenizer, add_generation_prompt=True, tools=tools)
    require_last_turn(messages, tokenizer)
    return next(_encode_texts([_Rendered(text, (), append_eos=False)], tokenizer)).tokens


def encode_choices(
    example: MultipleChoice, tokenizer: Any, max_length: int, *, system: str | None = None
) -> list[Encoded] | None:
    """One `Encoded` a candidate, its mask on the candidate's own tokens (no reasoning block before it, and nothing behind
    it, such as the end-of-turn token: its probability does not depend on the choice). None when a candidate does not fit
    `max_length`: truncated candidates cannot be compared."""
    rows = []
    before = () if system is None else (Message("system", system),)
    with template_date():
        for i in range(len(example.choices)):
            (reply,), _ = _replies(Chat((*before, *example.chat(i).messages)), tokenizer)
            own = example.choices[i].strip()
            at = reply.text.find(own, reply.content, reply.content_end)
            end = reply.content_end if at < 0 else at + len(own)
            rows.append(_Rendered(reply.text[:end], ((reply.content, end),), append_eos=False))
    encoded = list(_encode_texts(rows, tokenizer))
    return encoded if all(len(e.tokens) <= max_length for e in encoded) else None
