"""From token ids to text as they come: whole characters only, and never a part of a stop string."""

from __future__ import annotations

from typing import Any


class TextStream:
    """Incremental detokenisation of one row.

    `push(id)` returns the text that has become certain; `stopped` says whether a stop string has appeared, in which case
    `text` ends before it.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()):
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._context = 0  # ids before this one are decoded for good
        self._decoded = 0  # ids before this one have given their text
        self._held = ""  # may be the beginning of a stop string
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        prefix = self._decode(self._ids[self._context : self._decoded])
        whole = self._decode(self._ids[self._context :])
        # A trailing replacement character is half of a character whose other bytes are still to come.
        if len(whole) <= len(prefix) or whole.endswith("\ufffd"):
            return ""
        self._context, self._decoded = self._decoded, len(self._ids)
        return self._release(whole[len(prefix) :])

    def flush(self) -> str:
        """The text still held back, at the end of the generation."""
        if self.stopped:
            return ""
        prefix = self._decode(self._ids[self._context : self._decoded])
        rest = self._held + self._decode(self._ids[self._context :])[len(prefix) :]
        self._held, self._context, self._decoded = "", self._decoded, len(self._ids)
        self.text += rest
        return rest

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _release(self, new: str) -> str:
        pending = self._held + new
        found = [at for at in (pending.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            released = pending[: min(found)]
        else:
            keep = max((_overlap(pending, s) for s in self._stop), default=0)
            released, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += released
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
