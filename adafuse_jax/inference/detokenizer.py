"""Detokenization of a stream of token ids: whole characters only, and never a part of a stop string.

The text is without special tokens. A stop string that holds one (`<|im_end|>`) is looked for in the text with them.
"""

from __future__ import annotations

from typing import Any

from adafuse_jax.data.tokenizer import special_token_texts
from adafuse_jax.inference.rows import Row


class _Decoder:
    """Text of ids as it becomes certain, with or without special tokens."""

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids: list[int] = []
        self._context = 0  # ids before this one are decoded for good
        self._decoded = 0  # ids before this one have given their text

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        new = self._new()
        # A trailing replacement character is half of a character whose other bytes are still to come.
        return "" if new.endswith("\ufffd") else self._take(new)

    def flush(self) -> str:
        return self._take(self._new())

    def _new(self) -> str:
        prefix, text = (
            self._tokenizer.decode(ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)
            for ids in (self._ids[self._context : self._decoded], self._ids[self._context :])
        )
        return text[len(prefix) :]

    def _take(self, new: str) -> str:
        if new:
            self._context, self._decoded = self._decoded, len(self._ids)
        return new


class TextStream:
    """Incremental detokenisation of one row.

    `push(id)` returns the text that has become certain; `stopped` is whether a stop string has appeared, in which case
    `text` ends before it. With `inside_special` every stop string is looked for in both texts, as lm-evaluation-harness
    does: an "e" stops at `<|im_end|>` too.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = (), *, inside_special: bool = False):
        special = special_token_texts(tokenizer) if stop else ()
        self._special_stop = tuple(s for s in stop if inside_special or any(token and token in s for token in special))
        self._stop = tuple(s for s in stop if inside_special or s not in self._special_stop)
        self._decoder = _Decoder(tokenizer, skip_special_tokens=True)
        self._whole = _Decoder(tokenizer, skip_special_tokens=False)
        self._tail: list[tuple[str, int]] = []  # characters with special tokens, and the length of the text before each
        self._held = ""  # may be the beginning of a stop string
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        whole = self._whole.push(token_id) if self._special_stop else ""
        return self._release(self._decoder.push(token_id), whole)

    def flush(self) -> str:
        """The text still held back, at the end of the generation."""
        if self.stopped:
            return ""
        released = self._release(self._decoder.flush(), self._whole.flush() if self._special_stop else "")
        if not self.stopped:
            released, self.text, self._held = released + self._held, self.text + self._held, ""
        return released

    def read(self, row: Row) -> str:
        """Text that the row's newest token makes certain, all of it at the row's end. A stop string ends the row."""
        ended_by_token = row.finish_reason == "stop"
        text = "" if ended_by_token else self.push(row.token_ids[-1])
        if self.stopped:
            row.finish_reason = "stop"
        return text + self.flush() if row.finish_reason else text

    def _release(self, new: str, whole: str) -> str:
        """Text that is no part of a stop string, after `new`, which is `whole` with special tokens."""
        begin, pending = len(self.text), self._held + new
        found = [begin + at for at in (pending.find(s) for s in self._stop) if at >= 0]
        certain = begin + len(pending) - max((_overlap(pending, s) for s in self._stop), default=0)
        if self._special_stop:
            lead = len(whole) - len(new) if whole.endswith(new) else len(whole)  # special tokens before the text
            self._tail += [(c, begin + len(self._held) + max(i - lead, 0)) for i, c in enumerate(whole)]
            text = "".join(c for c, _ in self._tail)
            found += [self._tail[at][1] for at in (text.find(s) for s in self._special_stop) if at >= 0]
            most = max(_overlap(text, s) for s in self._special_stop)
            self._tail = self._tail[len(text) - most :]
            certain = min([certain, *(at for _, at in self._tail[:1])])
        self.stopped = bool(found)
        end = min(found) if found else certain
        released, self._held = pending[: end - begin], "" if found else pending[end - begin :]
        self.text += released
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
