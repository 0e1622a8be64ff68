"""The data cache: built once, read later, whole or built anew; with the log lines of the build."""

from __future__ import annotations

import errno
import json
import logging
import logging.handlers
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adafuse_jax.core.errors import UserError
from adafuse_jax.data.cache import default_directory, prepared

KEY = {"data": 1}
LINE = "a.jsonl: 3 of 9 examples left out"


class Builder:
    """Builds a file of one array, and counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, directory: Path) -> dict[str, Any]:
        self.times += 1
        np.arange(1000).tofile(directory / "array")
        logging.getLogger("adafuse_jax.data.chat").warning(LINE)
        logging.getLogger("adafuse_jax.data.chat").info("%d conversations", 7)
        return {"count": 1000}


def read(directory: Path, build: Callable[[Path], dict[str, Any]], key: dict[str, Any] = KEY) -> np.ndarray:
    with prepared(directory, key, build) as (files, facts):
        assert facts["count"] == 1000
        array = np.memmap(files / "array", np.int64, "r")
    np.testing.assert_array_equal(array, np.arange(1000))  # also after the block
    return array


def entry_of(directory: Path) -> Path:
    (entry,) = directory.iterdir()
    return entry


def test_built_once_for_a_key(tmp_path):
    build = Builder()
    read(tmp_path, build)
    read(tmp_path, build)
    assert build.times == 1
    read(tmp_path, build, {"data": 2})
    assert build.times == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_a_start_that_reads_logs_the_lines_of_the_build(tmp_path, caplog):
    """Also those that were not shown to the one that built."""
    build = Builder()
    with caplog.at_level(logging.WARNING, "adafuse_jax"):
        read(tmp_path, build)
    assert caplog.messages == [LINE]
    caplog.clear()
    with caplog.at_level(logging.INFO, "adafuse_jax"):
        read(tmp_path, build)
    assert caplog.messages[:2] == [LINE, "7 conversations"]
    assert "is read" in caplog.messages[2]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "INFO"]
    assert caplog.records[0].name == "adafuse_jax.data.chat"


@pytest.mark.parametrize("propagate", [True, False])
def test_lines_of_the_build_are_shown_where_others_are(tmp_path, caplog, monkeypatch, propagate):
    """Once, and not by the handlers of the root where the program's logger has its own alone."""
    logger, own = logging.getLogger("adafuse_jax"), logging.handlers.BufferingHandler(100)
    monkeypatch.setattr(logger, "propagate", propagate)
    monkeypatch.setattr(logger, "handlers", [own])
    read(tmp_path, Builder())
    assert [record.getMessage() for record in own.buffer].count(LINE) == 1
    assert caplog.messages.count(LINE) == propagate


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit": lambda files: (files / "array").write_bytes(b"\x01" + (files / "array").read_bytes()[1:]),
    "its end": lambda files: os.truncate(files / "array", 100),
    "a file": lambda files: (files / "array").unlink(),
    "facts": lambda files: (files / "facts.json").write_text("{"),
    "digests": lambda files: (files / "digests.json").write_text("[]"),
    "all files": lambda files: [path.unlink() for path in files.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cache_is_built_anew(tmp_path, caplog, damage):
    build = Builder()
    read(tmp_path, build)
    damage(entry_of(tmp_path) / "prepared")
    caplog.clear()
    read(tmp_path, build)
    assert build.times == 2
    assert len([message for message in caplog.messages if ": damaged (" in message]) == 1
    caplog.clear()
    read(tmp_path, build)
    assert build.times == 2
    assert ": damaged (" not in caplog.text


def test_what_a_killed_process_left_is_removed(tmp_path):
    build = Builder()
    read(tmp_path, build)
    entry = entry_of(tmp_path)
    (entry / ".prepared.ab12cd_3.partial").mkdir()
    (entry / "prepared" / "array").unlink()
    read(tmp_path, build)
    assert {path.name for path in entry.iterdir()} == {"prepared", ".lock"}


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def fails(directory: Path) -> dict[str, Any]:
        (directory / "array").write_bytes(b"half")
        raise UserError("a.jsonl: row 3: bad")

    with pytest.raises(UserError, match="row 3"):
        read(tmp_path, fails)
    assert [path.name for path in entry_of(tmp_path).iterdir()] == [".lock"]
    read(tmp_path, Builder())


def test_a_full_disk_is_one_line(tmp_path):
    def fails(directory: Path) -> dict[str, Any]:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"--data-cache .*No space left on device.*free space"):
        read(tmp_path, fails)
    assert not (entry_of(tmp_path) / "prepared").exists()


def test_without_a_place_to_write_the_data_is_there_for_this_start_only(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    build = Builder()
    for times in (1, 2):
        caplog.clear()
        read(tmp_path / "file", build)
        assert build.times == times
        assert caplog.messages[0].startswith(f"--data-cache {tmp_path / 'file'}: cannot be written (Not a directory)")
    assert not list(Path(os.environ.get("TMPDIR", "/tmp")).glob("adafuse-data-*/prepared"))


CONCURRENT = """
import json, sys, time
from pathlib import Path
from adafuse_jax.data.cache import prepared

def build(directory):
    with open(sys.argv[2], "a") as log:
        log.write("b")
    time.sleep(float(sys.argv[3]))
    (directory / "array").write_bytes(b"whole" * 1000)
    return {}

with prepared(Path(sys.argv[1]), {}, build) as (files, _):
    assert (files / "array").read_bytes() == b"whole" * 1000
"""


def start(directory: Path, log: Path, seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CONCURRENT, str(directory), str(log), str(seconds)])


def test_of_processes_that_start_at_once_one_builds(tmp_path):
    processes = [start(tmp_path / "cache", tmp_path / "log", 0.5) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "b"


def test_a_killed_process_holds_nobody_up(tmp_path):
    first = start(tmp_path / "cache", tmp_path / "log", 100)
    while not (tmp_path / "log").exists():
        time.sleep(0.02)
    second = start(tmp_path / "cache", tmp_path / "log", 0)
    time.sleep(0.5)
    assert second.poll() is None, "it waits"
    first.send_signal(signal.SIGKILL)
    assert second.wait(60) == 0
    assert (tmp_path / "log").read_text() == "bb"
    assert {path.name for path in entry_of(tmp_path / "cache").iterdir()} == {"prepared", ".lock"}


def test_the_key_is_kept_for_people(tmp_path):
    read(tmp_path, Builder(), {"settings": {"max_length": 8}})
    facts = json.loads((entry_of(tmp_path) / "prepared" / "facts.json").read_text())
    assert facts["key"] == {"settings": {"max_length": 8}}


def test_default_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "adafuse-jax" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_directory() == tmp_path / "home" / ".cache" / "adafuse-jax" / "data"
