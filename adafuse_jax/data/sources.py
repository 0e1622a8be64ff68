"""Datasets by name: `SOURCE[:SUBSET][@FORMAT][=WEIGHT]` to a list of examples.

SOURCE is a local file or directory (what exists on disk wins), a preset, or a hub id `org/name`.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adafuse_jax.core.errors import UserError
from adafuse_jax.data.examples import Example
from adafuse_jax.data.files import (
    DATA_SUFFIXES,
    canonical_split,
    is_data_file,
    is_saved_dataset,
    quiet,
    read_files,
    split_files,
)
from adafuse_jax.data.formats import FORMATS, SkipRow, check_format_name, convert, recognise

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SPLIT_COLUMN = "split"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A hub dataset with the subset and format that it is read with."""

    hub_id: str
    subset: str | None = None
    format: str


PRESETS = {
    "slimorca": Preset(hub_id="Open-Orca/SlimOrca", format="sharegpt"),
    "magicoder": Preset(hub_id="ise-uiuc/Magicoder-OSS-Instruct-75K", format="instruction_response"),
    "metamathqa": Preset(hub_id="meta-math/MetaMathQA", format="instruction_response"),
    "scienceqa": Preset(hub_id="derek-thomas/ScienceQA", format="multiple_choice"),
    "commonsenseqa": Preset(hub_id="tau/commonsense_qa", format="multiple_choice"),
    "openbookqa": Preset(hub_id="allenai/openbookqa", subset="main", format="multiple_choice"),
    "arc-easy": Preset(hub_id="allenai/ai2_arc", subset="ARC-Easy", format="multiple_choice"),
    "arc-challenge": Preset(hub_id="allenai/ai2_arc", subset="ARC-Challenge", format="multiple_choice"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """One dataset of a mixture. `split` is the one that `load_examples` reads when not told otherwise; a `weight` of
    None means in proportion to its size."""

    source: str
    subset: str | None = None
    split: str = "train"
    format: str = "auto"
    weight: float | None = None

    def __post_init__(self) -> None:
        check_format_name(self.format, self.source)
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight > 0):
            raise UserError(f"bad weight: {self.source}: {self.weight} must be a number above 0")

    @classmethod
    def parse(cls, text: str) -> DatasetSpec:
        """From `SOURCE[:SUBSET][@FORMAT][=WEIGHT]`; a path that exists may hold `:`, `@` and `=` itself.

        Raises UserError for an empty source, an unknown format and a weight that is not above 0."""
        rest, weight, fmt, subset = text.strip(), None, "auto", None
        if "=" in rest and not os.path.exists(rest):
            rest, _, number = rest.rpartition("=")
            try:
                weight = float(number)
            except ValueError:
                raise UserError(f"bad weight: {text}: {number!r} must be a number above 0") from None
        if "@" in rest and not os.path.exists(rest):
            rest, _, fmt = rest.rpartition("@")
        if ":" in rest and not os.path.exists(rest):
            rest, _, subset = rest.rpartition(":")
        if not rest or subset == "":
            raise UserError(f"bad dataset: {text!r}: write SOURCE[:SUBSET][@FORMAT][=WEIGHT]")
        return cls(source=rest, subset=subset, format=fmt, weight=weight)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The examples of a split, and how many rows gave none, by reason."""

    examples: list[Example]
    skipped: dict[str, int]


def _local(spec: DatasetSpec) -> Path | None:
    """The file or directory of a local source; None for a preset or a hub id. Raises UserError for neither."""
    path = Path(spec.source)
    if os.path.exists(path):  # False, not an error, for names too long to be paths
        if path.is_file() and spec.subset is not None:
            raise UserError(f"no subset {spec.subset!r}: {path}: a file has no subsets: leave out :{spec.subset}")
        if path.is_file() and not is_data_file(path):
            raise UserError(f"unknown file type: {path}: use {', '.join(DATA_SUFFIXES)}")
        if spec.subset is not None:
            if not (path / spec.subset).is_dir():
                folders = sorted(f.name for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))
                raise UserError(f"no subset {spec.subset!r}: {path}: its folders are {', '.join(folders) or '(none)'}")
            path /= spec.subset
        return path
    if spec.source in PRESETS:
        return None
    looks_local = spec.source.startswith((".", "/", "~")) or spec.source.lower().endswith(DATA_SUFFIXES)
    if looks_local or not HUB_ID.fullmatch(spec.source):
        near = difflib.get_close_matches(spec.source.lower(), PRESETS, n=1)
        hint = (
            f"; did you mean {near[0]}?"
            if near
            else f": give a file, a directory, org/name or one of {', '.join(PRESETS)}"
        )
        raise UserError(f"no such dataset: {spec.source}: not a path, a preset or a hub id{hint}")
    return None


def _hub(spec: DatasetSpec) -> tuple[str, str | None]:
    preset = PRESETS.get(spec.source)
    if preset is None:
        return spec.source, spec.subset
    return preset.hub_id, spec.subset or preset.subset


def _hub_call(spec: DatasetSpec, call: Any, *args: Any, **kwargs: Any) -> Any:
    """`call(...)` of the `datasets` library on the hub, its many errors told as one UserError."""
    hub_id, subset = _hub(spec)
    try:
        with quiet():
            return call(hub_id, subset, *args, **kwargs)
    except Exception as error:  # the libraries below raise errors of their own kinds
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        advice = "check the name, the subset (SOURCE:SUBSET) and the connection, or give a local copy"
        raise UserError(f"cannot load from the hub: {hub_id}: {reason}: {advice}") from None


def _rows_by_split(data: Any) -> dict[str, list[int]]:
    """Row indices by the `split` column; all of them under "train" without one."""
    names = data[SPLIT_COLUMN] if SPLIT_COLUMN in data.column_names else []
    if not len(names) or not all(isinstance(name, str) for name in names):
        return {"train": list(range(len(data)))}
    rows: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        rows.setdefault(canonical_split(name), []).append(i)
    return rows


def _select(data: Any, split: str | None) -> tuple[Any, list[str]]:
    """The rows of one split of a table that may carry a split column, and the names of its splits."""
    rows = _rows_by_split(data)
    if split is None or split not in rows or len(rows) == 1:
        return data, list(rows)
    return data.select(rows[split]), list(rows)


def _read(spec: DatasetSpec, split: str | None) -> tuple[Any, list[str]]:
    """(table of `split`, names of all splits). The table is to be used only if `split` is among the names; with a split
    of None only the names count."""
    path = _local(spec)
    if path is None:
        import datasets

        names = [str(name) for name in _hub_call(spec, datasets.get_dataset_split_names)]
        actual = {canonical_split(name): name for name in names}
        if split not in actual:
            return None, list(actual)
        return _hub_call(spec, datasets.load_dataset, split=actual[split]), list(actual)
    if path.is_file():
        return _select(read_files([path]), split)
    if is_saved_dataset(path):
        return _read_saved(path, split)
    files = split_files(path)
    if list(files) == ["train"]:
        return _select(read_files(files["train"]), split)
    return (read_files(files[split]) if split in files else None), list(files)


def _read_saved(path: Path, split: str | None) -> tuple[Any, list[str]]:
    import datasets

    try:
        with quiet():
            data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"cannot read: {path}: {reason}: save it again with save_to_disk") from None
    if not isinstance(data, datasets.DatasetDict):
        return _select(data, split)
    actual = {canonical_split(str(name)): name for name in data}
    return (data[actual[split]] if split in actual else None), list(actual)


def available_splits(spec: DatasetSpec) -> tuple[str, ...]:
    """The names of a dataset's splits (`val`, `dev`, ... are `validation`). A local file without a `split` column has
    ("train",) only. Raises UserError as `load_examples` does."""
    return tuple(_read(spec, None)[1])


def load(spec: DatasetSpec, split: str | None = None) -> Loaded:
    """All examples of a split (default: `spec.split`) and the counts of rows without one.

    Raises UserError for a source that does not exist or cannot be read, a split that does not exist, columns that are
    not recognised, a row that does not fit its format, and a split without a usable row."""
    wanted = canonical_split(split or spec.split)
    data, names = _read(spec, wanted)
    if wanted not in names:
        raise UserError(f"no split {wanted!r}: {spec.source}: its splits are {', '.join(names)}")
    where = f"{spec.source}, split {wanted}"
    if not len(data):
        raise UserError(f"no rows: {where}: give a dataset with at least one")

    preset = PRESETS.get(spec.source) if _local(spec) is None else None
    asked = preset.format if preset and spec.format == "auto" else spec.format
    data = _without_image_decoding(data)
    columns = data.column_names
    format_name = recognise(columns, data[0], asked, where)
    data = data.select_columns([c for c in columns if c in FORMATS[format_name].uses or c == "image"])

    examples: list[Example] = []
    skipped: dict[str, int] = {}
    for number, row in enumerate(data, 1):
        try:
            examples.append(convert(row, format_name, f"{where}, row {number}"))
        except SkipRow as reason:
            skipped[str(reason)] = skipped.get(str(reason), 0) + 1
    counts = ", ".join(
        f"{n} with {reason}" if not reason.startswith("it") else f"{n}: {reason}" for reason, n in skipped.items()
    )
    if not examples:
        raise UserError(
            f"no usable rows: {where}: skipped {counts} ({format_name}): give rows with a text prompt and a reply"
        )
    if skipped:
        log.info("%s: %d examples; skipped %s", where, len(examples), counts)
    return Loaded(examples, skipped)


def load_examples(spec: DatasetSpec, split: str | None = None) -> list[Example]:
    """`load` without the counts."""
    return load(spec, split).examples


def _without_image_decoding(data: Any) -> Any:
    import datasets

    if isinstance(data.features.get("image"), datasets.Image):
        return data.cast_column("image", datasets.Image(decode=False))  # only whether there is one matters
    return data


def held_out_split(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples: a random `fraction` (at least one) is held out, the same for the same seed; both
    keep the order of `examples`. Raises UserError for a fraction outside (0, 1) and for fewer than two examples."""
    if not 0 < fraction < 1:
        raise UserError(f"bad held-out fraction: {fraction}: give a number between 0 and 1")
    if len(examples) < 2:
        raise UserError(
            f"cannot hold out: {len(examples)} example(s): give at least two, or a dataset with a validation split"
        )
    count = min(max(1, round(len(examples) * fraction)), len(examples) - 1)
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, len(examples)]))).permutation(
        len(examples)
    )
    held = set(order[:count].tolist())
    return [e for i, e in enumerate(examples) if i not in held], [e for i, e in enumerate(examples) if i in held]
