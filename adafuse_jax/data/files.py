"""Local data: which files and splits a path holds, and the rows of a file.

Splits have the names that `datasets` gives them: `train_sft-00000-of-00002.parquet` is of train_sft, `my_dev.jsonl` of
validation. A pipe is copied to a file, its format taken from its first bytes.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import logging
import os
import re
import select
import stat
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfileobj
from typing import IO, Any

from adafuse_jax.core.errors import UserError, shortened
from adafuse_jax.data.formats import USED_COLUMNS
from adafuse_jax.data.json_rows import Item, empty_file, json_rows
from adafuse_jax.data.table_rows import csv_rows, dataset_rows, parquet_columns, parquet_rows

log = logging.getLogger(__name__)

DATA_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".json.gz", ".jsonl.gz", ".csv.gz")
SPLIT_ALIASES = {
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
KEYWORDS = "train|training|validation|valid|val|dev|eval|evaluation|test|testing"
SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}(?:-\w+)?")
KEYWORD_FIRST = re.compile(rf"({KEYWORDS})(?:[-_ ]?(?:part|shard|chunk|of|v)?[-_ ]?\d+)*")
KEYWORD_AND_WORD = re.compile(rf"({KEYWORDS})[-_ ].+")
KEYWORD_LAST = re.compile(rf".*[-_ ]({KEYWORDS})(?:[-_ ]?\d+)*")
METADATA_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "manifest.json"}
NOISY_LOGGERS = ("datasets", "huggingface_hub", "fsspec")
PEEK = 2**16
WRITER_SECONDS = 10
"""Seconds to wait until a process opens a named pipe for writing."""


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


def is_stream(path: Path) -> bool:
    """True for a pipe, and for what /dev/stdin and /dev/fd/N are."""
    descriptor = str(path).startswith(("/dev/", "/proc/")) and not is_data_file(path)
    return os.path.exists(path) and not path.is_dir() and (descriptor or not path.is_file())


def is_saved_dataset(path: Path) -> bool:
    """True for a directory written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


def split_in_name(name: str) -> str | None:
    """The split in the name of a file (without suffix) or folder, or None.

    `NAME-00000-of-00001` is of NAME; `train`, `train-2`, `my_dev`, `x.test` of train, train, validation, test;
    `train_sft` of train_sft. A keyword in the middle (my_test_chats) names none."""
    shard = SHARD.fullmatch(name)
    if shard:
        return shard[1]
    for piece in name.split("."):
        found = KEYWORD_FIRST.fullmatch(piece.lower())
        if found:
            return canonical_split(found[1])
        if KEYWORD_AND_WORD.fullmatch(piece.lower()):
            return piece
        found = KEYWORD_LAST.fullmatch(piece.lower())
        if found:
            return canonical_split(found[1])
    return None


def folder_names(path: Path) -> list[str]:
    """Names of the visible folders in a directory. Raises UserError if the directory cannot be read."""
    try:
        return sorted(f.name for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))
    except OSError as error:
        raise _unreadable(path, error) from None


def split_files(path: Path) -> dict[str, list[Path]]:
    """The data files of a directory, or of its `data/`, or of its folders with the names of splits, by split. Files whose
    names hold no split are "train", unless others are named so.

    Raises UserError when there are no data files."""
    folders = folder_names(path)
    for folder in (path, path / "data"):
        files = _data_files(folder)
        if not files:
            continue
        splits: dict[str, list[Path]] = {}
        rest = []
        for file in files:
            name = split_in_name(file.name[: -len(_suffix(file))])
            rest.append(file) if name is None else splits.setdefault(name, []).append(file)
        if rest and any(name.startswith("train") for name in splits):
            log.info("%s: files not used, as others are named train: %s", path, _names(rest))
        elif rest:
            splits = {"train": rest, **splits}
            if len(splits) > 1:
                log.info("%s: files of the split train: %s", path, _names(rest))
        if folder == path and "data" in folders and _data_files(path / "data"):
            log.info("%s: files in its folder data are not used, as there are others beside it", path)
        return splits
    for parent in (path, path / "data"):
        splits = {}
        for folder in sorted(parent.glob("*")):
            split = split_in_name(folder.name)
            if split is not None and folder.is_dir() and _data_files(folder):
                splits.setdefault(split, []).extend(_data_files(folder))
        if splits:
            return splits
    hint = f"; its folders are {shortened(', '.join(folders), 80)}: name one as {path}:FOLDER" if folders else ""
    raise UserError(f"no data files: {path}: put {', '.join(DATA_SUFFIXES)} files there{hint}")


def _data_files(folder: Path) -> list[Path]:
    return sorted(
        f for f in folder.glob("*") if f.is_file() and is_data_file(f) and f.name.lower() not in METADATA_FILES
    )


def _names(files: list[Path]) -> str:
    return shortened(", ".join(file.name for file in files), 200)


def _suffix(path: Path) -> str:
    """The longest of DATA_SUFFIXES that the name ends in, or ""."""
    return max((s for s in DATA_SUFFIXES if path.name.lower().endswith(s)), key=len, default="")


@dataclass(frozen=True, slots=True)
class FileRows:
    """The rows of a file, to be read once. `columns` are those that a table is known to have before its rows are read."""

    path: Path
    columns: tuple[str, ...]
    items: Iterator[Item]


def file_kind(path: Path) -> str:
    """json, jsonl, csv or parquet, by the name of a file; "" for a pipe, whose format shows in its first bytes."""
    return "" if is_stream(path) else _suffix(path).split(".")[1] if _suffix(path) else ""


def file_rows(path: Path, copy: IO[bytes] | None = None) -> FileRows:
    """The rows of a data file, or of the `copy` of a pipe. Raises UserError, here or later, with the file (and line)."""
    with read_errors(path):
        file = raw = _open(path) if copy is None else from_start(copy)
        if not file.peek(1):
            raise empty_file(path)
        kind = file_kind(path)
        if kind == "parquet" or (not kind and file.peek(4).startswith(b"PAR1")):
            return _parquet(file, path)
        if _suffix(path).endswith(".gz") or file.peek(2).startswith(b"\x1f\x8b"):
            file = io.BufferedReader(gzip.GzipFile(fileobj=file), PEEK)  # type: ignore[arg-type]
            if not file.peek(1):
                raise empty_file(path)
        begins = file.peek(PEEK).removeprefix(b"\xef\xbb\xbf").lstrip()[:1].decode("latin-1")
        if kind == "csv" or (not kind and begins not in ("{", "[")):
            text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
            items = csv_rows(text, path, USED_COLUMNS)
        else:
            text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape")
            items = json_rows(text, path, starts_with=begins, lines_only=kind == "jsonl")
    return FileRows(path, (), _guarded(items, path, text, raw))


def _open(path: Path) -> Any:
    """A file for reading bytes. For a process to open a named pipe for writing there are WRITER_SECONDS."""
    mode = os.stat(path).st_mode
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise UserError(f"cannot read: {path}: it is a device: give a file, a pipe or a directory")
    if not stat.S_ISFIFO(mode):
        return open(path, "rb", PEEK)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while not poll.poll(1000 * WRITER_SECONDS):
        with contextlib.suppress(BlockingIOError):  # raised if there is a writer, which takes its time
            os.read(descriptor, 1)
            os.close(descriptor)
            raise UserError(f"cannot read: {path}: it is a pipe that no process writes to: give a file, or start one")
    os.set_blocking(descriptor, True)
    return open(descriptor, "rb", PEEK)


def copy_of_pipe(path: Path) -> IO[bytes]:
    """The bytes of a pipe, which can be read once, in a temporary file without a name. Raises UserError."""
    with read_errors(path):
        pipe = _open(path)
    with pipe:
        try:
            copy = tempfile.TemporaryFile(prefix="adafuse-data-")  # noqa: SIM115  its user closes it
            copyfileobj(pipe, copy)
            copy.flush()
        except OSError as error:
            raise UserError(
                f"cannot copy: {path}: {error.strerror or error}: a pipe is copied to {tempfile.gettempdir()}, as it is "
                "read more than once: free space there, or set TMPDIR"
            ) from None
    return copy


def from_start(copy: IO[bytes]) -> Any:
    """Another file object of an open file, at its start. Both have one position."""
    file = open(os.dup(copy.fileno()), "rb", PEEK)  # noqa: SIM115  its reader closes it
    file.seek(0)
    return file


def _parquet(file: Any, path: Path) -> FileRows:
    import pyarrow.parquet as parquet

    reader = parquet.ParquetFile(file)
    columns = parquet_columns(reader, path, USED_COLUMNS)
    used = [name for name in columns if name in USED_COLUMNS]
    rows = parquet_rows(reader, used) if used else iter([(0, {})] * min(1, reader.metadata.num_rows))
    return FileRows(path, tuple(columns), _guarded(rows, path, file))


def dataset_file_rows(data: Any, where: str) -> FileRows:
    """The rows of a `datasets.Dataset`, of the columns that are used."""
    columns = tuple(data.column_names)
    used = [name for name in columns if name in USED_COLUMNS]
    rows = dataset_rows(data, used) if used else iter([(0, {})] * min(1, len(data)))
    return FileRows(Path(where), columns, _guarded(rows, Path(where)))


def _guarded(items: Iterator[Item], path: Path, *files: IO[Any]) -> Iterator[Item]:
    """The items; then the files are closed."""
    with contextlib.ExitStack() as stack, read_errors(path):
        for file in reversed(files):
            stack.callback(file.close)
        yield from items


@contextlib.contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Context in which errors of the file readers become a `UserError`."""
    import pyarrow

    try:
        yield
    except EOFError:
        raise UserError(f"truncated gzip file: {path}: it ends early: copy or download it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        advice = "download it again, or drop .gz from its name if it is not compressed"
        raise UserError(f"broken gzip file: {path}: {error}: {advice}") from None
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = shortened(str(error), 120)
        raise UserError(f"cannot read: {path}: {reason}: check that the file is what its name says") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> UserError:
    reason = shortened(error.strerror or str(error), 120)
    return UserError(f"cannot read: {path}: {reason}: check the file and its permissions")
