"""A slow reference of prepared data: whole lists, transformers' template rendering, a loop a token."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from adafuse_jax.data.chat import Encoded
from adafuse_jax.data.packing import Rows

OPEN_ROWS = 64


def encoded(tokenizer: PreTrainedTokenizerBase, prompt: str, reply: str, max_length: int) -> Encoded | None:
    """One exchange by transformers' own `apply_chat_template`: the loss on tokens that begin in the reply, with its end."""
    asked = [{"role": "user", "content": prompt}]
    before = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": reply}], tokenize=False)
    assert whole.startswith(before)
    whole = whole[: whole.index(tokenizer.eos_token, len(before)) + len(tokenizer.eos_token)]
    given = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    mask = np.array([start >= len(before) for start, _ in given["offset_mapping"]])[:max_length]
    return Encoded(np.array(given["input_ids"], np.int32)[:max_length], mask) if mask.any() else None


def packed(rows: Sequence[Encoded], max_length: int, *, packing: bool = True) -> Rows:
    """First fit into at most `OPEN_ROWS` open rows, the fullest of which is closed; or an example a row."""
    plan: list[list[Encoded]] = []
    is_open: list[int] = []

    def free(row: int) -> int:
        return max_length - sum(len(e.tokens) for e in plan[row])

    for example in rows:
        fitting = [row for row in is_open if len(example.tokens) <= free(row)] if packing else []
        if fitting:
            plan[fitting[0]].append(example)
            continue
        plan.append([example])
        is_open.append(len(plan) - 1)
        if len(is_open) > OPEN_ROWS:
            is_open.remove(min(is_open, key=lambda row: (free(row), row)))
    longest = max(len(e.tokens) for e in rows)
    width = max_length if packing else min(max_length, (longest + 63) // 64 * 64)
    out = Rows(*(np.zeros((len(plan), width), dtype) for dtype in (np.int32, bool, np.int32, np.int32)))
    for row, examples in enumerate(plan):
        at = 0
        for segment, example in enumerate(examples, 1):
            for i, (token, target) in enumerate(zip(example.tokens, example.loss_mask, strict=True)):
                out.tokens[row, at] = token
                out.loss_mask[row, at] = target and i > 0
                out.segment_ids[row, at] = segment
                out.positions[row, at] = i
                at += 1
    return out


def fingerprint(weights: tuple[float, ...] | None, sources: Sequence[Rows]) -> str:
    """SHA-256 of weights, shapes and arrays; without weights of all sources as one, padded to the longest rows."""
    width = max(rows.tokens.shape[1] for rows in sources)
    wide = [
        [np.pad(a, ((0, 0), (0, width - a.shape[1]))) for a in (rows.tokens, rows.loss_mask, rows.segment_ids)]
        for rows in sources
    ]
    if weights is None:
        wide = [[np.concatenate(arrays) for arrays in zip(*wide, strict=True)]]
    digest = hashlib.sha256(repr((weights, [arrays[0].shape for arrays in wide])).encode())
    for arrays in wide:
        for array in arrays:
            digest.update(array.tobytes())
    return digest.hexdigest()
