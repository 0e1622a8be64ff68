"""The mixture as tokens: packed training rows, and the questions that are scored, in one .npz file that needs no tokenizer.

    loss weight of a target = 1 / (targets of its example)

so that every example counts the same, a letter as much as a program. Rows of T tokens hold examples of several sets;
`tasks` gives the index in SETS of every token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from adafuse_jax.core.atomic_files import new_file
from adafuse_jax.core.errors import UserError
from adafuse_jax.data.chat import Encoded, encode_all, encode_prompt, load_tokenizer, stop_tokens
from adafuse_jax.data.examples import Chat, Message, MultipleChoice
from adafuse_jax.data.packing import Rows, pack
from studies.accuracy import programs
from studies.accuracy.tasks import SETS, Example, final_number, read_task
from studies.questions import Packed, pack_candidates, prompts_of
from studies.training import Texts

PROMPTS = 200
"""Questions of gsm8k that are answered by decoding."""
ARRAYS = ("tokens", "positions", "segment_ids", "place", "wanted", "owner")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Prompts of gsm8k and then of `programs`, padded on the right, and the numbers that answer those of gsm8k."""

    tokens: Int[np.ndarray, "N P"]
    lengths: Int[np.ndarray, " N"]
    numbers: Float[np.ndarray, " M"]

    def without_programs(self) -> Prompts:
        """The first M, as wide as they need."""
        lengths = self.lengths[: len(self.numbers)]
        return Prompts(tokens=self.tokens[: len(lengths), : lengths.max()], lengths=lengths, numbers=self.numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """`scored`: set → its questions of `split`; a text without choices is a question with one."""

    training: Texts
    """Rows whose `loss_mask` is the targets' weights."""
    scored: dict[str, Packed]
    prompts: Prompts
    split: str
    stops: tuple[int, ...]
    digest: str
    """Hash of all arrays but those of programs; all runs of one study have the same."""
    programs: str | None
    """Hash of the programs' prompts and calls; None in a file that has none."""


def prepare(model: str, data: Path, out: Path, *, length: int, split: str, limit: int | None = None) -> dict[str, Any]:
    """Write the mixture file with the questions of `split` ("validation" or "test"), at most `limit` of each set and split.
    Returns its table of contents."""
    tokenizer = load_tokenizer(model)
    tasks = {name: read_task(name, data) for name in SETS}
    encoded: list[Encoded] = []
    task_of: list[int] = []
    for index, name in enumerate(SETS):
        of_set, _ = encode_all(tasks[name].training[:limit], tokenizer, length)
        encoded += of_set
        task_of += [index] * len(of_set)
    order = np.random.default_rng(0).permutation(len(encoded))
    rows = pack([encoded[i] for i in order], length)
    tables: dict[str, Any] = {
        "tokens": rows.tokens, "loss_mask": rows.loss_mask, "segment_ids": rows.segment_ids, "positions": rows.positions,
        "tasks": _tasks_of(rows, [encoded[i] for i in order], [task_of[i] for i in order]),
    }  # fmt: skip
    contents: dict[str, Any] = {"length": length, "split": split, "stops": stop_tokens(tokenizer), "sets": {}}
    for name in SETS:
        examples = getattr(tasks[name], split)[:limit]
        packed = _packed(examples, tokenizer, length)
        tables |= {f"{name}/{array}": getattr(packed, array) for array in ARRAYS}
        tables |= {f"{name}/choices": np.array(packed.choices), f"{name}/answers": np.array(packed.answers)}
        contents["sets"][name] = [task_of.count(SETS.index(name)), len(packed.answers), packed.left_out]
    tables |= _prompts(getattr(tasks["gsm8k"], split)[: min(PROMPTS, limit or PROMPTS)], tokenizer)
    contents["rows"] = len(rows)
    contents["digest"] = _digest(tables)
    asked = programs.problems(split)[:limit]
    tables |= _padded([encode_prompt((Message("user", p.question),), tokenizer) for p in asked], "programs")
    contents["programs"] = hashlib.sha256(repr(asked).encode()).hexdigest()[:16]
    small: dict[str, Any] = {name: _narrow(array) for name, array in tables.items()}
    with new_file(out, text=False) as file:
        np.savez_compressed(file, contents=np.array(json.dumps(contents)), **small)
    return contents


def load(path: Path, vocabulary: Int[np.ndarray, " V"] | None = None) -> Mixture:
    """Read a mixture file; its tokens become their places in `vocabulary`, if there is one. Raises `UserError` for a file
    that is missing, was not written by `prepare`, or has other tokens."""
    try:
        with np.load(path, allow_pickle=False) as file:
            tables = {name: file[name] for name in file.files}
        contents = json.loads(str(tables.pop("contents")))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--mixture {path}: cannot be read ({error}); make it with --prepare") from error
    wide = {name: _wide(array) for name, array in tables.items()}
    stops = np.array(contents["stops"], np.int32)
    if vocabulary is not None:
        try:
            stops = places(stops, vocabulary)
            wide |= {name: places(wide[name], vocabulary) for name in wide if name.endswith(("tokens", "wanted"))}
        except KeyError as error:
            raise UserError(
                f"--mixture {path}: the model has no token {error}; pack it again with --used {path}"
            ) from error
    rows = Rows(*(wide[f.name] for f in fields(Rows)))
    target_rows, target_places = np.nonzero(rows.loss_mask)
    scored = {
        name: Packed(
            **{array: wide[f"{name}/{array}"] for array in ARRAYS},
            choices=wide[f"{name}/choices"].tolist(),
            answers=wide[f"{name}/answers"].tolist(),
            left_out=contents["sets"][name][2],
        )
        for name in SETS
    }
    return Mixture(
        training=Texts(
            tokens=rows.tokens, positions=rows.positions, segment_ids=rows.segment_ids, loss_mask=weights_of(rows),
            tasks=wide["tasks"], prompts=prompts_of(rows.segment_ids, target_rows, target_places - 1),
        ),
        scored=scored,
        prompts=_all_prompts(wide, tables["prompts/numbers"]),
        split=contents["split"],
        stops=tuple(stops.tolist()),
        digest=contents["digest"],
        programs=contents.get("programs"),
    )  # fmt: skip


def places(tokens: Int[np.ndarray, "*shape"], vocabulary: Int[np.ndarray, " V"]) -> Int[np.ndarray, "*shape"]:
    """Place of every token in an ascending vocabulary. Raises KeyError for one that is not there."""
    found = np.minimum(np.searchsorted(vocabulary, tokens), len(vocabulary) - 1)
    if (missing := tokens[vocabulary[found] != tokens]).size:
        raise KeyError(int(missing[0]))
    return found.astype(np.int32)


def targets_of(
    rows: Rows,
) -> tuple[Int[np.ndarray, "N K"], Int[np.ndarray, "N K"], Bool[np.ndarray, "N K"]]:
    """(place, wanted, is_target): token `wanted[n, k]` follows token `place[n, k]` of row n, and is a target where
    `is_target[n, k]`. Few tokens of a row are targets, and logits of these alone are cheap. K = T / 8, or more if a row
    has more targets."""
    mask = rows.loss_mask[:, 1:]
    width = max(rows.length // 8, int(mask.sum(1).max()))
    place = np.argsort(~mask, axis=1, kind="stable")[:, :width].astype(np.int32)
    is_target = np.take_along_axis(mask, place, axis=1)
    return place, np.take_along_axis(rows.tokens, place + 1, axis=1), is_target


def weights_of(rows: Rows) -> Float[np.ndarray, "N T"]:
    """1 / (targets of its example) for every target, 0 elsewhere."""
    weights = np.zeros(rows.tokens.shape, np.float32)
    for row, (mask, segments) in enumerate(zip(rows.loss_mask, rows.segment_ids, strict=True)):
        counts = np.bincount(segments, weights=mask)
        weights[row, mask] = 1 / counts[segments[mask]]
    return weights


def _tasks_of(rows: Rows, encoded: Sequence[Encoded], task_of: Sequence[int]) -> Int[np.ndarray, "N T"]:
    """The set of every token: an example is found again by its tokens, in which its set's prompt is."""
    known = {e.tokens.tobytes(): task for e, task in zip(encoded, task_of, strict=True)}
    tasks = np.zeros(rows.tokens.shape, np.int32)
    for row, segments in enumerate(rows.segment_ids):
        for segment in range(1, segments.max() + 1):
            tasks[row, segments == segment] = known[rows.tokens[row, segments == segment].tobytes()]
    return tasks


def _packed(examples: Sequence[Example], tokenizer: Any, length: int) -> Packed:
    """Rows whose K is T: the questions of every set have one shape."""
    if isinstance(examples[0], MultipleChoice):
        packed = pack_candidates([e for e in examples if isinstance(e, MultipleChoice)], tokenizer, length)
        pad = ((0, 0), (0, length - packed.place.shape[1]))
        place, wanted, owner = np.pad(packed.place, pad), np.pad(packed.wanted, pad), packed.owner
        owner = np.pad(owner, pad, constant_values=-1)
        choices, answers, left_out = packed.choices, packed.answers, packed.left_out
        rows = Rows(packed.tokens, packed.owner[:, :0], packed.segment_ids, packed.positions)
    else:
        encoded, left_out = encode_all(examples, tokenizer, length)
        rows = pack(encoded, length)
        place, wanted, is_target = targets_of(rows)
        pad = ((0, 0), (0, length - place.shape[1]))
        texts = np.cumsum([0, *rows.segment_ids.max(1)])[:-1, None] - 1  # segments are counted from 1 in every row
        owner = np.where(is_target, texts + np.take_along_axis(rows.segment_ids, place, axis=1), -1)
        place, wanted, owner = np.pad(place, pad), np.pad(wanted, pad), np.pad(owner, pad, constant_values=-1)
        choices, answers = [1] * len(encoded), [0] * len(encoded)
    return Packed(
        tokens=rows.tokens, positions=rows.positions, segment_ids=rows.segment_ids, place=place, wanted=wanted,
        owner=owner, choices=choices, answers=answers, left_out=left_out,
    )  # fmt: skip


def _prompts(examples: Sequence[Example], tokenizer: Any) -> dict[str, np.ndarray]:
    chats = [e for e in examples if isinstance(e, Chat)]
    numbers = np.array([final_number(chat.messages[1].content) for chat in chats], np.float64)
    prompts = [encode_prompt(chat.messages[:1], tokenizer) for chat in chats]
    return _padded(prompts, "prompts") | {"prompts/numbers": numbers}


def _padded(prompts: Sequence[Int[np.ndarray, " P"]], name: str) -> dict[str, np.ndarray]:
    tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return {f"{name}/tokens": tokens, f"{name}/lengths": np.array([len(p) for p in prompts])}


def _all_prompts(tables: dict[str, np.ndarray], numbers: Float[np.ndarray, " M"]) -> Prompts:
    parts = [name for name in ("prompts", "programs") if f"{name}/tokens" in tables]
    width = max(tables[f"{name}/tokens"].shape[1] for name in parts)
    tokens = [np.pad(t, ((0, 0), (0, width - t.shape[1]))) for t in (tables[f"{name}/tokens"] for name in parts)]
    lengths = [tables[f"{name}/lengths"] for name in parts]
    return Prompts(tokens=np.concatenate(tokens), lengths=np.concatenate(lengths), numbers=numbers)


def _narrow(array: np.ndarray) -> np.ndarray:
    """Cast integers to 16 bits where the values fit."""
    if array.dtype.kind == "i" and array.size and np.iinfo(np.int16).min <= array.min() and array.max() < 2**15:
        return array.astype(np.int16)
    if array.dtype.kind == "i" and array.size and array.min() >= 0 and array.max() < 2**16:
        return array.astype(np.uint16)
    return array


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.int32) if array.dtype.kind in "iu" else array


def _digest(tables: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(tables.items()):
        digest.update(name.encode() + np.ascontiguousarray(array).astype(np.float64).tobytes())
    return digest.hexdigest()[:16]
