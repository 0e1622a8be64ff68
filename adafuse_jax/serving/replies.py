"""Bodies of answers as OpenAI has them: completions and chats, whole and as chunks of a stream."""

from __future__ import annotations

import codecs
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

from adafuse_jax.serving.text import Answer, special_ids, token_bytes, token_text
from adafuse_jax.serving.work import Token

LEAST_LOGPROB = -9999.0
"""In the place of −∞, which JSON has not."""
DONE = b"data: [DONE]\n\n"


def server_sent(table: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def usage(answers: Sequence[Answer], per_prompt: int) -> dict[str, Any]:
    """Tokens of all answers; a prompt counts once for its `per_prompt` answers."""
    prompts = answers[::per_prompt]
    prompt, generated = sum(len(a.prompt) for a in prompts), sum(a.num_tokens for a in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(a.cached for a in prompts)},
    }


def experts_of(tokens: Sequence[Token]) -> list[list[list[float]]]:
    """[[expert, gate], …] of each token that was read after the prompt."""
    return [[[expert, round(gate, 4)] for expert, gate in token.experts] for token in tokens if token.experts]


class Reply(ABC):
    """The replies to one request, of the same id."""

    prefix, kind, chunk_kind = "", "", ""

    def __init__(self, model: str, *, logprobs: int | None, with_experts: bool):
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._logprobs, self._with_experts = logprobs, with_experts
        self.joins_tokens = logprobs is None and not with_experts

    def whole(self, answers: Sequence[Answer], per_prompt: int) -> dict[str, Any]:
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage(answers, per_prompt)}

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": [choice]}

    def usage_chunk(self, answers: Sequence[Answer], per_prompt: int) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": [], "usage": usage(answers, per_prompt)}

    @abstractmethod
    def first(self, index: int, answer: Answer) -> dict[str, Any] | None:
        """The choice of the chunk before the first token; None: there is none."""

    @abstractmethod
    def piece(self, index: int, answer: Answer, text: str, token: Token) -> dict[str, Any]:
        """The choice of a token's chunk; the experts are those of the token before."""

    @abstractmethod
    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """The choice of a whole answer."""

    def _extra(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {"experts": experts_of(tokens)} if self._with_experts else {}


class CompletionReply(Reply):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, prompts: Sequence[str] | None, per_prompt: int, **options: Any):
        """`prompts`: texts that come before the answers, for `echo`."""
        super().__init__(model, **options)
        self._prompts, self._per_prompt = prompts, per_prompt
        self._offsets: dict[int, int] = {}
        decoder = codecs.getincrementaldecoder("utf-8")  # of characters that several tokens make
        self._characters: dict[int, codecs.IncrementalDecoder] = defaultdict(partial(decoder, "replace"))
        self._joined: set[int] = set()  # answers whose text follows their prompt's

    def first(self, index: int, answer: Answer) -> dict[str, Any] | None:
        if self._prompts is None:
            return None
        return {
            "index": index,
            "text": self._before(index),
            "logprobs": self._of_prompt(index, answer),
            "finish_reason": None,
        }

    def piece(self, index: int, answer: Answer, text: str, token: Token) -> dict[str, Any]:
        logprobs = self._lists(index, answer, [] if token.logprobs is None else [token.logprobs])
        extra = self._extra([token])
        if text and self._before(index) and index not in self._joined:
            self._joined.add(index)
            text = answer.leading_space + text
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": answer.finish_reason, **extra}

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        before = self._before(index)
        prompt = self._of_prompt(index, answer)
        own = self._lists(index, answer, [t.logprobs for t in answer.tokens if t.logprobs is not None])
        if prompt is not None and own is not None:
            own = {name: prompt[name] + own[name] for name in own}
        extra = self._extra(answer.tokens)
        join = answer.leading_space if before and answer.text else ""
        text, reason = before + join + answer.text, answer.finish_reason
        return {"index": index, "text": text, "logprobs": own, "finish_reason": reason, **extra}

    def _before(self, index: int) -> str:
        return "" if self._prompts is None else self._prompts[index // self._per_prompt]

    def _of_prompt(self, index: int, answer: Answer) -> dict[str, Any] | None:
        return None if answer.prompt_logprobs is None else self._lists(index, answer, answer.prompt_logprobs)

    def _lists(self, index: int, answer: Answer, entries: Sequence[Any]) -> dict[str, Any] | None:
        """Entries as parallel lists; None, the first token of a prompt, has no probability."""
        if self._logprobs is None:
            return None
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            token = answer.prompt[0] if entry is None else entry.token
            text = token_text(answer.tokenizer, token)
            found["tokens"].append(text)
            found["token_logprobs"].append(None if entry is None else finite(entry.logprob))
            found["top_logprobs"].append(None if entry is None else self._top(answer, entry))
            found["text_offset"].append(self._offsets.get(index, 0))
            if token not in special_ids(answer.tokenizer):
                whole = self._characters[index].decode(token_bytes(answer.tokenizer, token))
                self._offsets[index] = self._offsets.get(index, 0) + len(whole)
        return found

    def _top(self, answer: Answer, entry: Any) -> dict[str, float]:
        """Text → log-probability of the likeliest tokens and of the chosen one; of tokens with one text, the likelier."""
        found: dict[str, float] = {}
        for token, logprob in sorted([*entry.top, (entry.token, entry.logprob)], key=lambda pair: -pair[1]):
            found.setdefault(token_text(answer.tokenizer, token), finite(logprob))
        return found


class ChatReply(Reply):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self, index: int, answer: Answer) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, answer: Answer, text: str, token: Token) -> dict[str, Any]:
        logprobs = self._lists(answer, [token])
        extra = self._extra([token])
        delta = {"content": text} if text or not answer.finish_reason else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": answer.finish_reason, **extra}

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        logprobs, reason = self._lists(answer, answer.tokens), answer.finish_reason
        extra = self._extra(answer.tokens)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason, **extra}

    def _lists(self, answer: Answer, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        entries = [token.logprobs for token in tokens if token.logprobs is not None]
        return {"content": [self._entry(answer, entry) for entry in entries], "refusal": None}

    def _entry(self, answer: Answer, entry: Any) -> dict[str, Any]:
        def one(token: int, logprob: float) -> dict[str, Any]:
            text = token_text(answer.tokenizer, token)
            return {"token": text, "logprob": finite(logprob), "bytes": [*token_bytes(answer.tokenizer, token)]}

        return one(entry.token, entry.logprob) | {"top_logprobs": [one(*pair) for pair in entry.top]}


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
