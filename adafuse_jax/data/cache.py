"""Prepared data in a directory on disk, built once for a key, and read by every later start of the same key.

    DIR/KEY/prepared/      what was built: its files, facts.json and digests.json
    DIR/KEY/.lock          held by the process that builds; others of the same key wait for it

KEY is a digest of all that the result depends on. The files are written under a name of their own and get theirs in one
rename. At every start they are compared with their SHA-256, and built anew if they are damaged. Log lines of the build are
stored beside them and logged again, so that a start says the same whether it builds or reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from adafuse_jax.core.atomic_files import check_digests, locked, new_directory, write_digests, write_json
from adafuse_jax.core.errors import UserError, shortened
from adafuse_jax.core.tables import read_json

log = logging.getLogger(__name__)

PREPARED, FACTS_FILE = "prepared", "facts.json"
LEFTOVER = re.compile(rf"\.{PREPARED}\.\w{{8}}\.(partial|old)")
"""Directories of a process that was killed while it built."""
LIBRARIES = ("tokenizers", "transformers", "jinja2", "datasets", "pyarrow", "numpy")
"""Packages whose versions are part of every key."""


def default_directory() -> Path:
    """`adafuse-jax/data` in XDG_CACHE_HOME or ~/.cache; of a user without a home, below the current directory."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    with contextlib.suppress(RuntimeError):  # neither HOME nor an entry of the user
        return Path(home).expanduser() / "adafuse-jax" / "data"
    return Path(".cache") / "adafuse-jax" / "data"


@cache
def code_version(*sources: Path) -> dict[str, str]:
    """Versions of the code that makes a result: a digest of this package's source files and of `sources`, versions of
    libraries, byte order."""
    digest = hashlib.sha256()
    for path in (*sorted(Path(__file__).parent.glob("*.py")), *sources):
        digest.update(path.read_bytes())
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"code": digest.hexdigest(), "byteorder": sys.byteorder, **versions}


@contextlib.contextmanager
def prepared(
    directory: Path, key: dict[str, Any], build: Callable[[Path], dict[str, Any]]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The files that `build` writes into the directory that it is given, and the facts (JSON) that it returns: from the
    cache in `directory`, or built. Memory maps of the files stay valid after the block.

    A cache that cannot be written is logged, and the files are built in a temporary directory.

    Raises:
      UserError: the disk is full, or what `build` raises.
    """
    entry = directory / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    with contextlib.ExitStack() as held:
        if _fault(entry) is not None:
            try:
                entry.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(entry, what=f"data cache {entry}", wait=True))
            except OSError as error:
                log.warning(
                    "--data-cache %s: cannot be written (%s): the data is prepared for this start only; give another one",
                    directory, error.strerror or error,
                )  # fmt: skip
                entry = Path(held.enter_context(_temporary(directory)))
            fault = _fault(entry)
            if fault is not None:
                if fault:
                    log.warning("data cache %s: damaged (%s); it is built anew", entry, shortened(fault, 200))
                _build(entry, key, build)
                if entry.parent == directory:
                    log.info("all of --data-cache %s: %.3g GB", directory, _size(directory) / 1e9)
                yield entry / PREPARED, read_json(entry / PREPARED / FACTS_FILE)
                return
        facts = read_json(entry / PREPARED / FACTS_FILE)
        for name, level, message in facts["log"]:
            logging.getLogger(name).log(level, "%s", message)
        log.info("data cache %s: is read (%.3g GB)", entry, _size(entry) / 1e9)
        yield entry / PREPARED, facts


def _fault(entry: Path) -> str | None:
    """None if the entry is whole, "" if there is none, otherwise its damage."""
    try:
        if not (entry / PREPARED).exists():
            return ""
        check_digests(entry / PREPARED)
    except (UserError, OSError) as error:
        return str(error)
    return None


def _build(entry: Path, key: dict[str, Any], build: Callable[[Path], dict[str, Any]]) -> None:
    begun = time.perf_counter()
    try:
        for path in entry.iterdir():
            if LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
        with new_directory(entry / PREPARED, replace=True) as partial:
            with _recorded() as lines:
                facts = build(partial)
            write_json(partial / FACTS_FILE, {"key": key, "log": lines, **facts})
            write_digests(partial)
    except OSError as error:
        raise UserError(
            f"--data-cache {entry.parent}: cannot be written ({error.strerror or error}); free space there, or give another "
            "directory"
        ) from error
    log.info("data cache %s: built in %.1f s (%.3g GB)", entry, time.perf_counter() - begun, _size(entry) / 1e9)


@contextlib.contextmanager
def _temporary(directory: Path) -> Iterator[str]:
    try:
        path = tempfile.mkdtemp(prefix="adafuse-data-")
    except OSError as error:
        raise UserError(
            f"--data-cache {directory}: neither it nor {tempfile.gettempdir()} can be written "
            f"({error.strerror or error}); give another directory"
        ) from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _size(directory: Path) -> int:
    """Bytes of all files; others may be removed meanwhile."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(folder, name)).st_size
    return total


class _Recorder(logging.Handler):
    """Keeps every record of a logger, and passes on those of its own level and above."""

    def __init__(self, logger: logging.Logger):
        super().__init__()
        self.lines: list[list[Any]] = []
        self._parent = logger.parent if logger.propagate else None
        self._level = logger.getEffectiveLevel()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append([record.name, record.levelno, record.getMessage()])
        if self._parent is not None and record.levelno >= self._level:
            self._parent.callHandlers(record)


@contextlib.contextmanager
def _recorded() -> Iterator[list[list[Any]]]:
    """[logger, level, message] of this program's log lines within, of INFO and above, also if they are not shown now."""
    logger = logging.getLogger("adafuse_jax")
    recorder, level, propagate = _Recorder(logger), logger.level, logger.propagate
    logger.addHandler(recorder)
    logger.setLevel(min(logger.getEffectiveLevel(), logging.INFO))
    logger.propagate = False
    try:
        yield recorder.lines
    finally:
        logger.removeHandler(recorder)
        logger.setLevel(level)
        logger.propagate = propagate
