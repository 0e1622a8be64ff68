"""Prompts of random tokens, as long as the first questions of conversations: only their lengths count."""

from __future__ import annotations

import argparse
import gzip
import json
import math
from pathlib import Path

import numpy as np

from benchmarks.decode.costs import Shapes

BYTES_PER_TOKEN = 4
RANDOM_PROMPT = 128


def first_exchanges(path: Path) -> list[tuple[str, str]]:
    """The first message of the user in every conversation and the message after it ("" without one), ShareGPT's
    `conversations` or chat `messages`."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        content = file.read()
    if content.lstrip().startswith("["):
        table = json.loads(content)
    else:
        table = [json.loads(line) for line in content.split("\n") if line.strip()]
    found = []
    for row in table:
        turns = row.get("conversations") or row.get("messages") or []
        texts = [turn.get("value") or turn.get("content") or "" for turn in turns]
        asked = [(turn.get("from") or turn.get("role")) in ("human", "user") for turn in turns]
        if True in asked:
            at = asked.index(True)
            found.append((texts[at], texts[at + 1] if at + 1 < len(texts) else ""))
    return [(question, reply) for question, reply in found if question]


def conversation_texts(path: Path) -> list[str]:
    """The first message of the user in every conversation."""
    return [question for question, _ in first_exchanges(path)]


def make_prompts(arguments: argparse.Namespace, shapes: Shapes) -> tuple[list[list[int]], int, str]:
    """(prompts, number to decode one by one, description): random tokens, as many as the conversations' first messages have;
    prompts are added until no batch has one twice."""
    rng = np.random.default_rng(0)
    most = shapes.max_position_embeddings - arguments.new_tokens
    if arguments.conversations is None:
        lengths = [min(RANDOM_PROMPT, most)] * arguments.queries
        description = f"{arguments.queries} random prompts of {lengths[0]} tokens"
    else:
        low, high = arguments.prompt_tokens
        texts = conversation_texts(arguments.conversations)
        counts = [math.ceil(len(text.encode()) / BYTES_PER_TOKEN) for text in texts]
        lengths = [n for n in counts if low <= n <= min(high, most)][: arguments.queries]
        if not lengths:
            raise SystemExit(
                f"--conversations {arguments.conversations}: none of its {len(texts)} questions has {low} to {high} tokens"
            )
        description = (
            f"{len(lengths)} prompts as long as the first questions of {arguments.conversations.name} that have {low} to "
            f"{high} tokens ({BYTES_PER_TOKEN} bytes each), {sum(lengths) / len(lengths):.0f} on average"
        )
    count = max(len(lengths), *arguments.batches)
    return (
        [rng.integers(3, shapes.vocab_size, lengths[i % len(lengths)]).tolist() for i in range(count)],
        len(lengths),
        description,
    )
