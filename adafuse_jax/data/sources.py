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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adafuse_jax.core.errors import UserError, quoted, shortened
from adafuse_jax.data.collecting import Collected, Loaded, collect
from adafuse_jax.data.examples import Example
from adafuse_jax.data.files import (
    DATA_SUFFIXES,
    FileRows,
    canonical_split,
    dataset_file_rows,
    file_kind,
    file_rows,
    folder_names,
    is_data_file,
    is_saved_dataset,
    is_stream,
    quiet,
    split_files,
)
from adafuse_jax.data.formats import check_format_name

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
    """A data set, opened: its splits, and the examples of each. A file is read once, also when several of its splits are
    loaded; a pipe can be read only so.

    `splits` are names as `datasets` gives them, with `val`, `dev`, ... as `validation` unless there is one of that name.
    `skip_bad_rows` leaves bad rows out, counts them and logs the reason of the first."""

    def __init__(self, spec: DatasetSpec, *, skip_bad_rows: bool = False):
        """Raises UserError for a source that does not exist or cannot be read, and for what `load` raises of a file."""
        self.spec = spec
        self._skip_bad_rows = skip_bad_rows
        self._table: Collected | None = None
        self._readers: dict[str, Callable[[], Iterable[FileRows]]] = {}
        self._open()
        shown = [canonical_split(name) for name in self._readers]
        self._names = {
            alias if alias == name or (alias not in self._readers and shown.count(alias) == 1) else name: name
            for alias, name in zip(shown, self._readers, strict=True)
        }

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._names)

    def _open(self) -> None:
        path = _local(self.spec)
        if path is None:
            self._open_hub()
            return
        if not path.is_dir():
            self._open_table([path])
        elif is_saved_dataset(path):
            self._open_saved(path)
        else:
            files = split_files(path)
            if list(files) == ["train"]:
                self._open_table(files["train"])
            else:
                self._readers = {name: functools.partial(_rows_of_files, paths) for name, paths in files.items()}

    def _open_hub(self) -> None:
        import datasets

        def read(name: str) -> Iterable[FileRows]:
            return [
                dataset_file_rows(_hub_call(self.spec, datasets.load_dataset, split=name), f"{self.spec.source}#{name}")
            ]

        names = [str(name) for name in _hub_call(self.spec, datasets.get_dataset_split_names)]
        self._readers = {name: functools.partial(read, name) for name in names}

    def _open_saved(self, path: Path) -> None:
        import datasets

        try:
            with quiet():
                data = datasets.load_from_disk(str(path))
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
            reason = shortened(str(error), 120)
            raise UserError(f"cannot read: {path}: {reason}: save it again with save_to_disk") from None
        if isinstance(data, datasets.DatasetDict):
            self._readers = {
                str(name): functools.partial(lambda part, name: [dataset_file_rows(part, f"{path}#{name}")], part, name)
                for name, part in data.items()
            }
        else:
            self._collect_table([dataset_file_rows(data, str(path))])

    def _open_table(self, paths: Sequence[Path]) -> None:
        self._collect_table(_rows_of_files(paths))

    def _collect_table(self, files: Iterable[FileRows]) -> None:
        """Read all rows now: which splits there are stands in them."""
        self._table = self._collect(files, by_split=True)
        self._readers = dict.fromkeys(self._table.names() or ("train",), tuple)

    def _collect(self, files: Iterable[FileRows], *, by_split: bool = False) -> Collected:
        preset = PRESETS.get(self.spec.source) if _local(self.spec) is None else None
        asked = preset.format if preset and self.spec.format == "auto" else self.spec.format
        return collect(files, self.spec.source, asked, skip_bad_rows=self._skip_bad_rows, by_split=by_split)

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

    def load(self, split: str | None = None) -> Loaded:
        """The examples of a split (default: `training_split`).

        Raises UserError for a split that does not exist, columns that are not recognised, a row that does not fit its
        format, and a split without a usable row."""
        asked = split or self.training_split()
        name = self.find(asked)
        if name is None:
            raise self._no_split(asked)
        real = self._names[name]
        table = self._table or self._collect(self._readers[real]())
        where = f"{self.spec.source}, split {shortened(name, 60)}"
        return table.loaded(real if table.splits else None, where)


def _rows_of_files(paths: Sequence[Path]) -> Iterator[FileRows]:
    if len({file_kind(path).removesuffix("l") for path in paths}) != 1:
        names = shortened(", ".join(map(str, paths)), 200)
        raise UserError(f"mixed file types: {names}: keep one type a split")
    yield from map(file_rows, paths)


def available_splits(spec: DatasetSpec) -> tuple[str, ...]:
    """`Dataset.splits` of a spec."""
    return Dataset(spec).splits


def load(spec: DatasetSpec, split: str | None = None, *, skip_bad_rows: bool = False) -> Loaded:
    """`Dataset.load` of a spec."""
    return Dataset(spec, skip_bad_rows=skip_bad_rows).load(split)


def load_examples(spec: DatasetSpec, split: str | None = None) -> list[Example]:
    """`load` without the counts."""
    return load(spec, split).examples


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
