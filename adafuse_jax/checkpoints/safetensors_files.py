"""Safetensors files: errors in one line, types and finiteness checked, tensors read one at a time."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from adafuse_jax.core.atomic_files import set_usual_mode
from adafuse_jax.core.errors import UserError, quoted, shortened
from adafuse_jax.core.tables import Table

INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
"""Types of tensors that are read, by their names in the files."""
INTEGERS = {"I32": "int32", "I64": "int64"}
"""Types of what describes quantised weights."""


@contextmanager
def safetensors_errors(path: Path, tensor: str = "") -> Iterator[None]:
    """Context in which a missing or broken safetensors file raises a `UserError` that names it."""
    where = f"{path}: {shortened(tensor, 120)}" if tensor else str(path)
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{where}: the file is missing; complete the directory") from error
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or shortened(str(error), 120) or type(error).__name__
        raise UserError(
            f"{where}: not a complete safetensors file ({reason}); it may be truncated, restore it"
        ) from error


def open_safetensors(path: Path) -> Any:
    """`safe_open` of a regular file: a pipe would wait for ever. Raises `UserError`."""
    with safetensors_errors(path):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path}: is not a regular file; restore it")
        return safe_open(path, framework="numpy")


def require_float(dtype: str, where: str) -> None:
    """Raise `UserError` unless a tensor's type, by its name in the file, is one of `DTYPES`. `where` names the tensor."""
    if dtype not in DTYPES:
        raise UserError(f"{where} is of type {shortened(dtype, 40)}; give weights of type {', '.join(DTYPES)}")


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a small file. Raises `UserError` for a broken file, a type that is not in `DTYPES`, or values that are
    NaN or infinite."""
    file, tensors = open_safetensors(path), {}
    with safetensors_errors(path):
        names = list(file.keys())
    for name in names:
        with safetensors_errors(path, name):
            require_float(file.get_slice(name).get_dtype(), f"{path}: tensor {shortened(name, 120)}")
            tensors[name] = file.get_tensor(name)
        if not np.isfinite(tensors[name]).all():
            raise UserError(f"{path}: tensor {shortened(name, 120)} holds NaN or infinite values; restore the file")
    return tensors


def write_tensors(path: Path, tensors: dict[str, np.ndarray], *, metadata: dict[str, str]) -> None:
    """A safetensors file with the permissions of any new file. Raises `OSError` or `SafetensorError`."""
    save_file(tensors, path, metadata=metadata)
    set_usual_mode(path)


class MappedFile:
    """A safetensors file, which `safe_open` has accepted, mapped into memory: the length of its header (8 bytes), the header
    in JSON, the tensors."""

    def __init__(self, path: Path):
        self._bytes = np.memmap(path, np.uint8, "r")
        begin = 8 + int(self._bytes[:8].view(np.uint64)[0])
        self._begin, self._header = begin, json.loads(self._bytes[8:begin].tobytes())

    def view(self, name: str) -> np.ndarray:
        entry = self._header[name]
        first, end = entry["data_offsets"]
        data = self._bytes[self._begin + first : self._begin + end]
        return np.require(data.view(jnp.dtype((DTYPES | INTEGERS)[entry["dtype"]])), requirements="A").reshape(
            entry["shape"]
        )


class Tensors:
    """The tensors of a model directory: name → shape and type, and reading of one at a time.

    Read are `model.safetensors`, else the files that `model.safetensors.index.json` names; `remarks` has a log line about
    files of weights that are not read. Raises `UserError` for files that are missing, broken or contradict each other.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        self._mapped: dict[str, MappedFile] = {}
        self._stored: dict[str, str] = {}
        self._is_stopped = False
        files = _weight_files(directory)
        for name in files:
            file = open_safetensors(directory / name)
            with safetensors_errors(directory / name):
                mapped = MappedFile(directory / name)  # at once: a file that replaces it later has other tensors
                for tensor in file.keys():  # noqa: SIM118 - not a dict
                    if tensor in self._open:
                        raise UserError(
                            f"{directory / name}: tensor {tensor} is in another file too; remove one of them"
                        )
                    entry = file.get_slice(tensor)
                    self.shapes[tensor], self.dtypes[tensor] = tuple(entry.get_shape()), entry.get_dtype()
                    self._open[tensor], self._mapped[tensor], self._stored[tensor] = file, mapped, tensor
        if not self._open:
            raise UserError(f"{directory}: its safetensors files hold no tensor; restore them")
        others = sorted(
            path.name
            for pattern in ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.pth", "*.gguf")
            for path in directory.glob(pattern)
            if path.name not in files
        )
        used_index = "model.safetensors" not in files
        others = [name for name in others if not (used_index and name == INDEX_FILE)]
        self.remarks: tuple[str, ...] = ()
        if others:
            read = files[0] if len(files) == 1 else f"{files[0]} … {files[-1]}"
            self.remarks = (shortened(f"{directory}: weights are read from {read}, not from {', '.join(others)}", 400),)

    def rename(self, names: Mapping[str, str]) -> None:
        """Give the tensors other names, new → present one. Those that have none are left out."""
        tables: list[dict[str, Any]] = [self.shapes, self.dtypes, self._open, self._mapped, self._stored]
        for by_name in tables:
            renamed = {new: by_name[old] for new, old in names.items()}
            by_name.clear()
            by_name.update(renamed)

    def read(self, name: str) -> np.ndarray:
        with safetensors_errors(self.directory, name):
            return self._open[name].get_tensor(self._stored[name])

    def stop(self) -> None:
        """End threads that read, at their next `view`."""
        self._is_stopped = True

    def view(self, name: str) -> np.ndarray:
        """`read` without a copy: the pages of the file, mapped into memory. Raises `CancelledError` after `stop`."""
        if self._is_stopped:
            raise CancelledError
        return self._mapped[name].view(self._stored[name])

    def identity(self) -> str:
        """SHA-256 over every tensor's name, type, shape and up to eight evenly spaced rows: another backbone differs."""
        digest = hashlib.sha256()
        for name in sorted(self.shapes):
            with safetensors_errors(self.directory, name):
                rows = self._open[name].get_slice(self._stored[name])
                digest.update(f"{name} {rows.get_dtype()} {self.shapes[name]}".encode())
                count = self.shapes[name][0] if self.shapes[name] else 0
                for i in np.linspace(0, count - 1, num=min(8, count), dtype=int):
                    digest.update(np.ascontiguousarray(rows[int(i) : int(i) + 1]).tobytes())
        return digest.hexdigest()


def _weight_files(directory: Path) -> list[str]:
    """Names of the safetensors files of a model directory, `model.safetensors` before those of the index."""
    if os.path.lexists(directory / "model.safetensors"):
        return ["model.safetensors"]
    index = directory / INDEX_FILE
    if not os.path.lexists(index):
        bins = any(any(directory.glob(pattern)) for pattern in ("*.bin", "*.pth", "*.pt"))
        others = sorted(path.name for path in directory.glob("*.safetensors"))
        hint = "convert the .bin file to safetensors first" if bins else "check the directory"
        if others:
            hint = f"{quoted(others[0])} has another name; rename it or restore the index"
        raise UserError(f"{directory}: has no model.safetensors and no {INDEX_FILE}; {hint}")
    table = Table.read(index)
    weight_map = table.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{index}: its weight_map does not name the shards; restore the file")
    files = sorted(set(weight_map.values()))
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name:
            raise UserError(f"{index}: its weight_map names {quoted(name)}, outside of the directory; restore the file")
    return files
