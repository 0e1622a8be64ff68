"""Datasets by name: `SOURCE[:SUBSET][#SPLIT][@FORMAT][=WEIGHT]` to a list of examples.

SOURCE is a local file or directory (what exists on disk wins), a preset, or a hub id `org/name`.
"""

from __future__ import annotations

import difflib
import functools
import logging
import math
import os
import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from adafuse_jax.core.errors import UserError, quoted, shortened
from adafuse_jax.data.collecting import Loaded, Report, Survey, examples_of, survey
from adafuse_jax.data.examples import Example
from adafuse_jax.data.files import (
    DATA_SUFFIXES,
    canonical_split,
    folder_names,
    is_data_file,
    is_saved_dataset,
    is_stream,
    quiet,
    split_files,
)
from adafuse_jax.data.formats import check_format_name
from adafuse_jax.data.tables import FilesTable, HubTable, Table, open_saved

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SPEC_SYNTAX = "SOURCE[:SUBSET][#SPLIT][@FORMAT][=WEIGHT]"


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
    """One dataset of a mixture. A `split` of None is the one that the use calls for; a `weight` of None means in proportion
    to its size."""

    source: str
    subset: str | None = None
    split: str | None = None
    format: str = "auto"
    weight: float | None = None

    def __post_init__(self) -> None:
        check_format_name(self.format, self.source)
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight > 0):
            raise UserError(f"bad weight: {self.source}: {self.weight} must be a number above 0")

    @classmethod
    def parse(cls, text: str) -> DatasetSpec:
        """Parse `SOURCE[:SUBSET][#SPLIT][@FORMAT][=WEIGHT]`; a path that exists may hold `:`, `#`, `@` and `=` itself.

        Raises UserError for an empty source, subset or split, an unknown format and a weight that is not above 0."""
        rest, parts = os.path.expanduser(text.strip()), {}
        for mark in "=@#:":
            if mark in rest and not os.path.exists(rest):
                rest, _, parts[mark] = rest.rpartition(mark)
        weight = None
        if "=" in parts:
            try:
                weight = float(parts["="])
            except ValueError:
                raise UserError(f"bad weight: {text}: {quoted(parts['='])} must be a number above 0") from None
        if not rest or "" in (parts.get(":"), parts.get("#")):
            raise UserError(f"bad dataset: {quoted(text)}: write {SPEC_SYNTAX}")
        return cls(
            source=rest, subset=parts.get(":"), split=parts.get("#"), format=parts.get("@", "auto"), weight=weight
        )


def _local(spec: DatasetSpec) -> Path | None:
    """The file or directory of a local source; None for a preset or a hub id. Raises UserError for neither."""
    path = Path(spec.source)
    if os.path.exists(path):  # False, not an error, for names too long to be paths
        if not path.is_dir() and spec.subset is not None:
            raise UserError(f"no subset {quoted(spec.subset)}: {path}: a file has no subsets: leave out :{spec.subset}")
        if not path.is_dir() and not is_data_file(path) and not is_stream(path):
            raise UserError(f"unknown file type: {path}: use {', '.join(DATA_SUFFIXES)}")
        if spec.subset is not None:
            if not (path / spec.subset).is_dir():
                folders = shortened(", ".join(folder_names(path)), 120) or "(none)"
                raise UserError(f"no subset {quoted(spec.subset)}: {path}: its folders are {folders}")
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
    """`call(...)` of the `datasets` library on the hub, its many errors as one UserError."""
    hub_id, subset = _hub(spec)
    try:
        with quiet():
            return call(hub_id, subset, *args, **kwargs)
    except Exception as error:  # the libraries below raise errors of their own kinds
        reason = shortened(str(error), 120) or type(error).__name__
        advice = "check the name, the subset (SOURCE:SUBSET) and the connection, or give a local copy"
        raise UserError(f"cannot load from the hub: {hub_id}: {reason}: {advice}") from None


class Dataset:
    """A data set, opened: its splits, and the examples of each, in a stream. Its rows are read when the first of them is
    asked for; a pipe is copied to disk, as rows are read twice.

    `splits` are names as `datasets` gives them, with `val`, `dev`, ... as `validation` unless there is one of that name.
    `skip_bad_rows` leaves bad rows out, counts them and logs the reason of the first."""

    def __init__(self, spec: DatasetSpec, *, skip_bad_rows: bool = False):
        """Raises UserError for a source that does not exist or cannot be opened."""
        self.spec = spec
        self._skip_bad_rows = skip_bad_rows
        preset = PRESETS.get(spec.source) if _local(spec) is None else None
        self._format = preset.format if preset and spec.format == "auto" else spec.format
        self._tables, self._rows_name_splits = _open_tables(spec)
        self._surveys: dict[str, Survey] = {}

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        """The splits as they are shown, and as they are named in the data. Raises what `load` raises of a file."""
        real = tuple(self._tables)
        if self._rows_name_splits:
            real = self._survey(real[0]).names() or real
        shown = [canonical_split(name) for name in real]
        return {
            alias if alias == name or (alias not in real and shown.count(alias) == 1) else name: name
            for alias, name in zip(shown, real, strict=True)
        }

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._names)

    def digest(self) -> dict[str, Any]:
        """Digests of the contents of all files, by split. No row is read."""
        return {name: table.digest() for name, table in self._tables.items()}

    def _survey(self, table: str) -> Survey:
        if table not in self._surveys:
            rows, by_split = self._tables[table].rows(), self._rows_name_splits
            self._surveys[table] = survey(
                rows, self.spec.source, self._format, skip_bad_rows=self._skip_bad_rows, by_split=by_split
            )
        return self._surveys[table]

    def _place(self, split: str) -> tuple[str, str | None, str]:
        """The table of a split, its name in the rows there, and its name for messages. Raises UserError without it."""
        name = self.find(split)
        if name is None:
            raise self._no_split(split)
        real = self._names[name]
        table = next(iter(self._tables)) if self._rows_name_splits else real
        return table, real if self._survey(table).by_split else None, f"{self.spec.source}, split {shortened(name, 60)}"

    def count(self, split: str) -> Report:
        """The number of examples of a split, and what gave none, which is logged.

        Raises UserError for a split that does not exist, columns that are not recognised, a row that does not fit its
        format, and a split without a usable row."""
        table, real, where = self._place(split)
        return self._survey(table).total(real, where)

    def examples(self, split: str) -> Generator[Example]:
        """The examples of a split that `count` counted."""
        table, real, where = self._place(split)
        found = 0
        for example in examples_of(self._tables[table].rows(), self._format, real):
            found += 1
            yield example
        if found != sum(r.examples for name, r in self._survey(table).reports.items() if name in (None, real)):
            raise UserError(f"{where}: changed while it was read; start again when it is written")

    def load(self, split: str | None = None) -> Loaded:
        """The examples of a split (default: `training_split`) as a list. Raises UserError as `count`."""
        split = split or self.training_split()
        total = self.count(split)
        return Loaded(list(self.examples(split)), dict(total.skipped), total.bad)

    def find(self, split: str) -> str | None:
        """The name among `splits` of a split: itself, or what it is an alias of."""
        if split in self._names:
            return split
        alias = canonical_split(split)
        return alias if alias in self._names else None

    def training_split(self) -> str:
        """The split to train on, logged unless its name is train: the only one that begins with train, or the only one, if
        it is none for tests. Raises UserError, which lists them, if that leaves none or several."""
        if self.spec.split is not None:
            return self.spec.split
        among = [name for name in self._names if name.lower().startswith("train")]
        if "train" in among:
            rest = ", ".join(name for name in among if name != "train")
            if rest:
                log.info("%s: training on the split train, not on %s", self.spec.source, shortened(rest, 120))
            return "train"
        if not among and len(self._names) == 1:
            among = [name for name in self._names if not name.lower().startswith("test")]
        if len(among) != 1:
            raise self._no_split("train")
        name = shortened(among[0], 60)
        log.info("%s: no split train; training on %s (its splits: %s)", self.spec.source, name, self._listed())
        return among[0]

    def held_out_split(self, kinds: Sequence[str] = ("validation", "test"), besides: str | None = None) -> str | None:
        """The split to score on: of the first of `kinds` that there is one, not `besides`, the training split. With a
        training split train_sft, validation_sft and test_sft come first. None if there is none, or no single one."""
        ending = re.sub("^train", "", besides or "")
        names = [name for name in self._names if name != besides]
        for kind in kinds:
            for exact in (kind + ending, kind):
                if exact in names:
                    return exact
            among = [name for name in names if name.lower().startswith(kind)]
            if len(among) == 1:
                log.info("%s: no split %s; held out is %s", self.spec.source, kind, shortened(among[0], 60))
                return among[0]
        return None

    def evaluation_split(self, kinds: Sequence[str]) -> str:
        """The spec's split, `held_out_split`, or the only split. Raises UserError if there are several."""
        split = self.spec.split or self.held_out_split(kinds)
        if split is None and len(self._names) != 1:
            raise self._no_split(kinds[0])
        return split or self.splits[0]

    def _listed(self) -> str:
        return shortened(", ".join(self._names), 120)

    def _no_split(self, split: str) -> UserError:
        source = self.spec.source + (f":{self.spec.subset}" if self.spec.subset else "")
        first = shortened(min(self.splits, key=lambda name: not name.lower().startswith(split)), 60)
        choose = f"choose one, as {source}#{first}"
        return UserError(f"no split {quoted(split)}: {source}: its splits are {self._listed()}: {choose}")


def _open_tables(spec: DatasetSpec) -> tuple[dict[str, Table], bool]:
    """The tables of a data set by split; or one table, and whether its rows may name their splits."""
    path = _local(spec)
    if path is None:
        import datasets

        names = [str(name) for name in _hub_call(spec, datasets.get_dataset_split_names)]
        load = functools.partial(_hub_call, spec, datasets.load_dataset)
        return {name: HubTable(functools.partial(load, split=name), f"{spec.source}#{name}") for name in names}, False
    if not path.is_dir():
        return {"train": FilesTable([path])}, True
    if is_saved_dataset(path):
        saved, is_one = open_saved(path)
        return dict(saved), is_one
    files = split_files(path)
    return {name: FilesTable(paths) for name, paths in files.items()}, list(files) == ["train"]


def available_splits(spec: DatasetSpec) -> tuple[str, ...]:
    """`Dataset.splits` of a spec."""
    return Dataset(spec).splits


def load(spec: DatasetSpec, split: str | None = None, *, skip_bad_rows: bool = False) -> Loaded:
    """`Dataset.load` of a spec."""
    return Dataset(spec, skip_bad_rows=skip_bad_rows).load(split)


def load_examples(spec: DatasetSpec, split: str | None = None) -> list[Example]:
    """`load` without the counts."""
    return load(spec, split).examples


def held_out_indices(count: int, fraction: float, seed: int) -> Int[np.ndarray, " held"]:
    """A random `fraction` (at least one) of `count` examples, the same for the same seed, in ascending order. Raises
    UserError for a fraction outside (0, 1) and for fewer than two examples."""
    if not 0 < fraction < 1:
        raise UserError(f"bad held-out fraction: {fraction}: give a number between 0 and 1")
    if count < 2:
        raise UserError(f"cannot hold out: {count} example(s): give at least two, or a dataset with a validation split")
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, count]))).permutation(count)
    return np.sort(order[: min(max(1, round(count * fraction)), count - 1)])


def held_out_split(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples, by `held_out_indices`; both keep the order of `examples`."""
    held = set(held_out_indices(len(examples), fraction, seed).tolist())
    return [e for i, e in enumerate(examples) if i not in held], [e for i, e in enumerate(examples) if i in held]
