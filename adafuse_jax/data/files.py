"""Local data: which files and splits a path holds, and reading them with `datasets`, leaving nothing beside them.

`datasets` reports a bad file in many ways (wrapped, delayed until a row is read, or as StopIteration); a failed read is
therefore diagnosed here, line by line, and told as one UserError.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import logging
import re
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from adafuse_jax.core.errors import UserError

LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
DATA_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".json.gz", ".jsonl.gz", ".csv.gz")
SPLIT_ALIASES = {
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "eval": "validation",
    "testing": "test",
}
SPLIT_IN_NAME = re.compile(r"(?:^|[-_. ])(train|training|validation|valid|val|dev|eval|test|testing)(?=$|[-_. ])")
METADATA_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "manifest.json"}
NOISY_LOGGERS = ("datasets", "huggingface_hub", "fsspec")


def canonical_split(name: str) -> str:
    """`val`, `dev`, ... are `validation`; other names stay."""
    return SPLIT_ALIASES.get(name.lower(), name)


@contextlib.contextmanager
def without_logs() -> Iterator[None]:
    """No log lines from the libraries of the hub and of data while it lasts."""
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Neither log lines nor the progress bars of `datasets` while it lasts."""
    import datasets

    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with without_logs():
            yield
    finally:
        if not bars:
            datasets.enable_progress_bars()


def is_data_file(path: Path) -> bool:
    return path.name.lower().endswith(DATA_SUFFIXES) and not path.name.startswith(".")


def is_saved_dataset(path: Path) -> bool:
    """True for a directory written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


def split_files(path: Path) -> dict[str, list[Path]]:
    """The data files of a directory (or of its `data/`) by the split in their names; files whose names say nothing are
    "train", unless other names do say something. Raises UserError when there are none."""
    for folder in (path, path / "data"):
        files = sorted(
            f for f in folder.glob("*") if f.is_file() and is_data_file(f) and f.name.lower() not in METADATA_FILES
        )
        if not files:
            continue
        splits: dict[str, list[Path]] = {}
        for file in files:
            found = SPLIT_IN_NAME.search(file.name.lower())
            if found:
                splits.setdefault(canonical_split(found.group(1)), []).append(file)
        return splits or {"train": files}
    folders = sorted(f.name for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))
    hint = f"; its folders are {', '.join(folders)}: name one as {path}:FOLDER" if folders else ""
    raise UserError(f"no data files: {path}: put {', '.join(DATA_SUFFIXES)} files there{hint}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, read strictly. Raises UserError for bytes that are not UTF-8 and for broken gzip files."""
    open_file = gzip.open if path.suffix == ".gz" else open
    try:
        with open_file(path, "rb") as file:  # type: ignore[operator]
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"not UTF-8: {path}: line {number}: byte 0x{error.object[error.start]:02x}: convert the file to UTF-8"
        ) from None
    except EOFError:
        raise UserError(f"truncated gzip file: {path}: it ends early: copy or download it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        advice = "download it again, or drop .gz from its name if it is not compressed"
        raise UserError(f"broken gzip file: {path}: {error}: {advice}") from None
    except OSError as error:
        raise UserError(f"cannot read: {path}: {error.strerror or error}: check the file and its permissions") from None


def _check_text(path: Path) -> None:
    """Raises UserError for a file without rows, bytes that are not UTF-8 (`datasets` would fail at that row, much
    later) and broken gzip files."""
    if path.stat().st_size == 0 or not sum(line.strip() != "" for _, line in _lines(path)):
        raise UserError(f"empty file: {path}: it has no rows: give a file with at least one")


def _diagnose(paths: Sequence[Path], error: BaseException) -> UserError:
    """The reason for a failed read: the first JSON mistake, else what `datasets` said."""
    for path in paths:
        if path.name.endswith(".parquet"):
            continue
        text = "".join(line for _, line in _lines(path))
        if ".jsonl" in path.name:
            for number, line in enumerate(text.split("\n"), 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as bad:
                    return UserError(
                        f"malformed JSON: {path}: line {number}, column {bad.colno}: {bad.msg}: fix that line"
                    )
                if not isinstance(row, dict):
                    return UserError(
                        f"malformed row: {path}: line {number}: not a JSON object: write one object a line"
                    )
        elif ".json" in path.name:
            try:
                rows = json.loads(text)
            except json.JSONDecodeError as bad:
                return UserError(
                    f"malformed JSON: {path}: line {bad.lineno}, column {bad.colno}: {bad.msg}: fix it there"
                )
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                return UserError(
                    f"malformed rows: {path}: write a JSON list of objects, or one object a line as .jsonl"
                )
    cause = error.__cause__ or error
    if "corresponds to no data" in str(cause):
        return UserError(f"no rows: {', '.join(map(str, paths))}: give a file with at least one")
    reason = str(cause).split("\n")[0][:300] or type(cause).__name__
    return UserError(f"cannot read: {', '.join(map(str, paths))}: {reason}: check that the file is what its name says")


def _csv_options(paths: Sequence[Path]) -> dict[str, Any]:
    """Every CSV cell stays the text that it is: no numbers, no nulls for "NA" or "None"."""
    import datasets

    header = next(csv.reader(line for _, line in _lines(paths[0])))
    if len(set(header)) != len(header):
        raise UserError(
            f"repeated column: {paths[0]}: line 1: the columns are {', '.join(header)}: give each its own name"
        )
    features = datasets.Features({name: datasets.Value("string") for name in header})
    return {"features": features, "keep_default_na": False, "na_filter": False}


def read_files(paths: Sequence[Path]) -> Any:
    """The rows of the files as one `datasets.Dataset` in memory. Raises UserError naming the file (and line)."""
    import datasets

    kinds = {LOADERS[p.with_suffix("").suffix if p.suffix == ".gz" else p.suffix] for p in paths}
    if len(kinds) != 1:
        raise UserError(f"mixed file types: {', '.join(map(str, paths))}: keep one type a split")
    kind = kinds.pop()
    for path in paths:
        if kind != "parquet" or path.stat().st_size == 0:
            _check_text(path)
    options = _csv_options(paths) if kind == "csv" else {}
    with tempfile.TemporaryDirectory(prefix="adafuse-data-") as cache, quiet():
        try:
            data = datasets.load_dataset(
                kind,
                data_files=[str(p) for p in paths],
                split="train",
                cache_dir=cache,
                keep_in_memory=True,  # the cache goes with this block
                **options,
            )
        except Exception as error:
            raise _diagnose(paths, error) from None
    return data
