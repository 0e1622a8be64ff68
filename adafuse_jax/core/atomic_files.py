"""Files and directories that appear complete or not at all, a lock on a directory, and digests of what was written.

Everything is written under a temporary name of its own, made by the operating system so that it never exists before, beside
the final one; a rename gives it its name. No path that this process did not make is ever removed, but for the file or
directory that is asked to be replaced.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from adafuse_jax.core.errors import UserError, shortened

log = logging.getLogger(__name__)

DIGESTS_FILE = "digests.json"
LOCK_FILE = ".lock"


@contextlib.contextmanager
def new_file(path: Path, *, text: bool = True) -> Iterator[IO[Any]]:
    """Open a file for writing (UTF-8 text, or bytes); at the end of the block it becomes `path`, in place of an existing
    file. After an exception nothing has changed. Of a symbolic link the target is written.

    Raises:
      UserError: `path` is a device, a pipe or a directory, which a file must not replace.
      OSError: a disk that refuses.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is not a regular file; name another one")
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path), suffix=".partial")
    try:
        with os.fdopen(descriptor, "w" if text else "wb", encoding="utf-8" if text else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        set_usual_mode(Path(name))
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def set_usual_mode(path: Path) -> None:
    """Give a file the permissions that a new one has; those of temporary files, and of safetensors, are the owner's only."""
    os.chmod(path, 0o666 & ~_umask())


def write_text(path: Path, text: str) -> None:
    """`text` as the UTF-8 file `path`, atomically."""
    with new_file(path) as file:
        file.write(text)


def write_json(path: Path, table: Any) -> None:
    """`table` as an indented JSON file, atomically."""
    write_text(path, json.dumps(table, indent=2) + "\n")


@contextlib.contextmanager
def new_directory(out: Path, *, replace: bool = False, keep_others: bool = False) -> Iterator[Path]:
    """Yield an empty directory to fill; at the end of the block it becomes `out`. After an exception it is gone, and `out`
    is as it was.

    `out` must not exist or be empty, unless `replace` is given: then it takes the place of the directory that is there. A
    kill between the two renames of a replacement leaves the old one beside it, as `.NAME.*.old`. With `keep_others` what the
    old one holds under other names than the new one is copied into it. Parents are made. Of a symbolic link the target is
    written.

    Raises:
      UserError: `out` exists, is not an empty directory, and is not to be replaced.
      OSError: a disk that refuses.
    """
    if not replace:
        require_free(out)
    out = Path(os.path.realpath(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=_prefix(out), suffix=".partial"))
    try:
        os.chmod(partial, 0o777 & ~_umask())
        yield partial
        if not replace or not out.exists() or not any(out.iterdir()):
            os.rename(partial, out)  # onto an empty directory, too; not onto one that was filled meanwhile
            return
        if keep_others:
            _copy_others(out, partial)
        aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=_prefix(out), suffix=".old"))
        os.rename(out, aside)
        try:
            os.rename(partial, out)
        except BaseException:
            os.rename(aside, out)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _copy_others(old: Path, new: Path) -> None:
    others = [path for path in sorted(old.iterdir()) if not os.path.lexists(new / path.name)]
    for path in others:
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new / path.name, follow_symlinks=False)
    if others:
        log.info("%s: files that are not of this run stay: %s", old, shortened(", ".join(p.name for p in others), 200))


def require_free(out: Path, name: str = "") -> None:
    """Raise `UserError` if `out` exists and is not an empty directory. `name` is the flag that gave it, for the message."""
    where = f"{name} {out}" if name else str(out)
    try:
        taken = os.path.lexists(out) and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}; give another directory") from error
    if taken:
        raise UserError(f"{where}: exists and is not an empty directory; give another one")


@contextlib.contextmanager
def locked(directory: Path, *, what: str, wait: bool = False) -> Iterator[None]:
    """Lock `directory`, which exists, for this process; the operating system frees it if the process dies. With `wait` this
    waits, with a line in the log, for another process that holds it.

    Raises:
      UserError: another process holds it. `what` names it for the message: "--output runs/a".
      OSError: a disk that refuses.
    """
    descriptor = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if wait:
                log.info("%s: waiting for another process that is writing it", what)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield
                return
            raise UserError(f"{what}: another process is using it; wait for its end, or give another one") from error
        yield
    finally:
        os.close(descriptor)


def write_digests(directory: Path) -> None:
    """`digests.json` in `directory`: the SHA-256 and size of every other file below it."""
    write_json(directory / DIGESTS_FILE, {name: _digest(directory / name) for name in _files(directory)})


def check_digests(directory: Path) -> None:
    """Compare every file below `directory` with what `write_digests` wrote there.

    Raises:
      UserError: a file is missing, was added, or has other bytes; or the directory has no digests that can be read.
    """
    from adafuse_jax.core.tables import read_json

    expected = read_json(directory / DIGESTS_FILE)
    for name in sorted(expected.keys() | _files(directory)):
        path = directory / name
        if name not in expected or not path.is_file():
            fault = "is not among the files that were written" if name not in expected else "is missing"
            raise UserError(f"{path}: {fault}; restore the directory")
        if _digest(path) != expected[name]:
            raise UserError(f"{path}: has other bytes than were written (by its SHA-256); restore the file")


def _files(directory: Path) -> set[str]:
    paths = (Path(root) / name for root, _, names in os.walk(directory) for name in names)
    return {str(path.relative_to(directory)) for path in paths} - {DIGESTS_FILE}


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises `OSError`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _prefix(path: Path) -> str:
    return f".{path.name[:40]}."


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
