"""Examples to tokens: the chat template (or the Alpaca text) rendered and tokenised once, the loss on the responses.

    target t <=> token t starts inside a reply (a token that straddles the boundary belongs to the prompt)

Which text is a reply, and which conversations become several rows: `replies`.

loss_mask[t] is True iff token t is itself a target, predicted from t-1; token 0 never is.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64

from adafuse_jax.core.errors import UserError
from adafuse_jax.data.examples import Chat, Example, Message, MultipleChoice, Text
from adafuse_jax.data.left_out import LeftOut, require_last_turn
from adafuse_jax.data.rendering import MARK, render, render_all
from adafuse_jax.data.replies import Rendered, around_mark, first_special, replies, reply_parts, rows_of
from adafuse_jax.data.templates import TemplateLimit, template_date
from adafuse_jax.data.tokenizer import load_tokenizer as load_tokenizer
from adafuse_jax.data.tokens import tokens_and_starts

log = logging.getLogger(__name__)

CHUNK_EXAMPLES = 512
CHUNK_CHARACTERS = 2**20
"""Examples that are encoded at a time: so many, or so much text."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row: tokens int32 [T] and loss_mask bool [T]."""

    tokens: Int32[np.ndarray, " T"]
    loss_mask: Bool[np.ndarray, " T"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """The rows of some examples one behind the other, and counts of these examples by what became of them (`Encoding`)."""

    tokens: Int32[np.ndarray, " N"]
    loss_mask: Bool[np.ndarray, " N"]
    lengths: Int64[np.ndarray, " rows"]
    counts: Counter[str]
    refusals: list[str]
    """Messages of examples that the chat template refuses."""

    @classmethod
    def of(cls, row: Encoded) -> Chunk:
        """One row."""
        lengths = np.asarray([len(row.tokens)], np.int64)
        return cls(tokens=row.tokens, loss_mask=row.loss_mask, lengths=lengths, counts=Counter(), refusals=[])

    def rows(self) -> list[Encoded]:
        ends = np.cumsum(self.lengths)[:-1]
        parts = zip(np.split(self.tokens, ends), np.split(self.loss_mask, ends), strict=True)
        return [Encoded(tokens, mask) for tokens, mask in parts] if len(self.lengths) else []


@dataclass(slots=True, kw_only=True)
class Encoding:
    """Account of the encoding of a data set, and its log lines, which begin with `name`.

    counts: `examples`; of these `chats` are no plain text, `unfit` gave no row, as no target is left in them, and
    `conversations` became several rows, `turns` in all; `full` rows have the maximum length."""

    name: str
    skip_bad_rows: bool
    counts: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    first_refusal: str = ""

    @property
    def prefix(self) -> str:
        return f"{self.name}: " if self.name else ""

    def add(self, chunk: Chunk) -> None:
        """Count a chunk. Raises UserError for an example that the template refuses, unless these are left out."""
        if chunk.refusals and not self.skip_bad_rows:
            raise UserError(chunk.refusals[0])
        self.refused += len(chunk.refusals)
        self.first_refusal = self.first_refusal or next(iter(chunk.refusals), "")
        self.counts += chunk.counts

    def finish(self) -> None:
        """Log what was left out and divided. Raises UserError if the template refuses all examples."""
        if self.refused and self.refused == self.counts["examples"]:
            raise UserError(self.first_refusal)
        if self.refused:
            log.warning(
                "%s%d of %d examples left out, which the chat template refuses; the first: %s",
                self.prefix, self.refused, self.counts["examples"], self.first_refusal,
            )  # fmt: skip
        if self.counts["conversations"]:
            log.info(
                "%s%d conversations are trained as %d rows, one an assistant turn: the chat template rewrites earlier "
                "turns",
                self.prefix, self.counts["conversations"], self.counts["turns"],
            )  # fmt: skip


def stop_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a reply in training, at which decoding stops: EOS and the template's end-of-turn token.

    EOS alone where the template refuses a conversation of one question, with or without a system turn."""
    question, reply = Message("user", "?"), Message("assistant", MARK)
    for messages in ((question, reply), (Message("system", "."), question, reply)):
        try:
            _, tail = around_mark(messages, tokenizer)
        except TemplateLimit:
            raise
        except UserError:
            continue
        return tuple(sorted({tokenizer.eos_token_id, *_ids(tokenizer, first_special(tail, tokenizer)[1])}))
    return (tokenizer.eos_token_id,)


def _ids(tokenizer: Any, token: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(token)] if token else []


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]


def _encode_texts(rendered: Sequence[Rendered], tokenizer: Any) -> Iterator[Encoded]:
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
        yield Encoded(tokens.astype(np.int32, copy=False), mask)


def encode_chunk(examples: Sequence[Example], tokenizer: Any, max_length: int) -> Chunk:
    """The rows of some examples, as `encode_all` has them."""
    counts, refusals, fitting = Counter(examples=len(examples)), list[str](), list[Encoded]()
    for group in _groups(examples, rows_of(examples, tokenizer)):
        encoded = _encode_texts(
            [row for _, rows in group if not isinstance(rows, UserError) for row in rows], tokenizer
        )
        for example, rows in group:
            counts["chats"] += not isinstance(example, Text)
            if isinstance(rows, UserError):
                refusals.append(str(UserError(f"{example.where}: {rows}")) if example.where else str(rows))
                continue
            pieces = [next(encoded) for _ in rows]
            if isinstance(example, Text):
                pieces = list(_pieces(pieces[0], max_length))
            own = [row for piece in pieces if (row := _truncate(piece, max_length)) is not None]
            if len(rows) > 1:
                counts.update(conversations=1, turns=len(rows))
            counts["unfit"] += not own
            counts["full"] += sum(len(row.tokens) == max_length for row in own)
            fitting += own
    empty = [np.zeros(0, np.int32)], [np.zeros(0, bool)]
    return Chunk(
        tokens=np.concatenate([row.tokens for row in fitting] or empty[0]),
        loss_mask=np.concatenate([row.loss_mask for row in fitting] or empty[1]),
        lengths=np.asarray([len(row.tokens) for row in fitting], np.int64),
        counts=counts,
        refusals=refusals,
    )


def _groups(
    examples: Sequence[Example], found: Iterable[list[Rendered] | UserError]
) -> Iterator[list[tuple[Example, list[Rendered] | UserError]]]:
    """Examples and their rows, `CHUNK_CHARACTERS` at a time: a conversation of many rows has many times its own text."""
    group: list[tuple[Example, list[Rendered] | UserError]] = []
    characters = 0
    for example, rows in zip(examples, found, strict=True):
        group.append((example, rows))
        characters += 0 if isinstance(rows, UserError) else sum(len(row.text) for row in rows)
        if characters > CHUNK_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _truncate(encoded: Encoded, max_length: int) -> Encoded | None:
    truncated = Encoded(encoded.tokens[:max_length], encoded.loss_mask[:max_length])
    return truncated if truncated.loss_mask.any() else None


def _pieces(encoded: Encoded, max_length: int) -> Iterator[Encoded]:
    for start in range(0, len(encoded.tokens), max_length):
        piece = slice(start, start + max_length)
        mask = encoded.loss_mask[piece].copy()
        mask[0] = False
        yield Encoded(encoded.tokens[piece], mask)


def chunks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Lists of at most `CHUNK_EXAMPLES` examples and, unless one alone is longer, `CHUNK_CHARACTERS` characters."""
    chunk: list[Example] = []
    characters = 0
    for example in examples:
        size = _characters(example)
        if chunk and (len(chunk) == CHUNK_EXAMPLES or characters + size > CHUNK_CHARACTERS):
            yield chunk
            chunk, characters = [], 0
        chunk.append(example)
        characters += size
    if chunk:
        yield chunk


def _characters(example: Example) -> int:
    if isinstance(example, Text):
        return len(example.text)
    if isinstance(example, MultipleChoice):
        return len(example.question) + sum(map(len, example.choices))
    return len(example.tools) + sum([len(message.content) + len(message.extra) for message in example.messages])


def log_left_out(left_out: LeftOut, examples: Sequence[Example], encoding: Encoding) -> None:
    """Log what the chat template does not write of some examples, if that is new."""
    for what in left_out.found_in(examples):
        log.warning("%sthe chat template leaves %s out", encoding.prefix, what)


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
    encoding, encoded = Encoding(name=name, skip_bad_rows=skip_bad_rows), list[Encoded]()
    with template_date():
        log_left_out(LeftOut(tokenizer), examples, encoding)
        for some in chunks(examples):
            chunk = encode_chunk(some, tokenizer, max_length)
            encoding.add(chunk)
            encoded += chunk.rows()
    encoding.finish()
    return encoded, encoding.counts["unfit"]


def encode_prompt(messages: Sequence[Message], tokenizer: Any, *, tools: str = "") -> Int32[np.ndarray, " T"]:
    """The tokens that decoding starts from: the conversation so far and the start of an assistant turn; int32 [T].

    Raises UserError as `render`, and for a template that leaves the last turn out."""
    text = render(messages, tokenizer, add_generation_prompt=True, tools=tools)
    require_last_turn(messages, tokenizer)
    return next(_encode_texts([Rendered(text, (), append_eos=False)], tokenizer)).tokens


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
            chat = Chat((*before, *example.chat(i).messages))
            (reply,), _ = replies(chat, render_all(reply_parts(chat), tokenizer), tokenizer)
            own = example.choices[i].strip()
            at = reply.text.find(own, reply.content, reply.content_end)
            end = reply.content_end if at < 0 else at + len(own)
            rows.append(Rendered(reply.text[:end], ((reply.content, end),), append_eos=False))
    encoded = list(_encode_texts(rows, tokenizer))
    return encoded if all(len(e.tokens) <= max_length for e in encoded) else None
