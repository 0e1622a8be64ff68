"""Tables that rows are read from, as often as they are needed, with digests of their contents."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from adafuse_jax.core.atomic_files import sha256
from adafuse_jax.core.errors import UserError, shortened
from adafuse_jax.data.files import (
    FileRows,
    copy_of_pipe,
    dataset_file_rows,
    file_kind,
    file_rows,
    from_start,
    is_stream,
    quiet,
    read_errors,
)


class Table(Protocol):
    """Rows of one split, or of several."""

    def rows(self) -> Iterable[FileRows]:
        """The rows, from the first. Raises UserError."""

    def digest(self) -> list[list[str]]:
        """Names of files, and digests of their contents. Raises UserError."""


class FilesTable:
    """Data files or pipes. A pipe is copied when the table is made."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths
        self._copies: dict[Path, IO[bytes]] = {path: copy_of_pipe(path) for path in paths if is_stream(path)}

    def rows(self) -> Iterator[FileRows]:
        if len({file_kind(path).removesuffix("l") for path in self._paths}) != 1:
            names = shortened(", ".join(map(str, self._paths)), 200)
            raise UserError(f"mixed file types: {names}: keep one type a split")
        for path in self._paths:
            yield file_rows(path, self._copies.get(path))

    def digest(self) -> list[list[str]]:
        return [[path.name, self._sha256(path)] for path in self._paths]

    def _sha256(self, path: Path) -> str:
        copy = self._copies.get(path)
        if copy is None:
            return _sha256(path)
        with from_start(copy) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(path: Path) -> str:
    with read_errors(path):
        return sha256(path)


class SavedTable:
    """A `datasets.Dataset` in the files that `save_to_disk` wrote into `directory`, called `where` in messages."""

    def __init__(self, data: Any, directory: Path, where: str):
        self._data, self._directory, self._where = data, directory, where

    def rows(self) -> list[FileRows]:
        return [dataset_file_rows(self._data, self._where)]

    def digest(self) -> list[list[str]]:
        with read_errors(self._directory):
            paths = sorted(path for path in self._directory.iterdir() if path.is_file())
        return [[path.name, _sha256(path)] for path in paths]


class HubTable:
    """A split of a data set of the hub, called `where` in messages; `load` gives it."""

    def __init__(self, load: Callable[[], Any], where: str):
        self._load, self._where = functools.cache(load), where

    def rows(self) -> list[FileRows]:
        return [dataset_file_rows(self._load(), self._where)]

    def digest(self) -> list[list[str]]:
        """The fingerprint of the `datasets` library, which is of the repository's commit, and the files in its cache, which
        nobody edits, by size and time."""
        data = self._load()
        stats = [(file["filename"], Path(file["filename"]).stat()) for file in data.cache_files]
        return [[data._fingerprint, ""], *([name, f"{stat.st_size} {stat.st_mtime_ns}"] for name, stat in stats)]


def open_saved(path: Path) -> tuple[dict[str, SavedTable], bool]:
    """The data sets in a directory of `save_to_disk`, each with its name for messages, by split; or one, whose rows may name
    their splits, and True. Raises UserError."""
    import datasets

    try:
        with quiet():
            data = datasets.load_from_disk(str(path), keep_in_memory=False)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        reason = shortened(str(error), 120)
        raise UserError(f"cannot read: {path}: {reason}: save it again with save_to_disk") from None
    if isinstance(data, datasets.DatasetDict):
        return {str(name): SavedTable(part, path / name, f"{path}#{name}") for name, part in data.items()}, False
    return {"train": SavedTable(data, path, str(path))}, True
