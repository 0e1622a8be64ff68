"""Records of the runs of a study: packed in one file, and new ones in a folder until they are merged into it.

RECORD.jsonl.gz   a line for each run, {"name": NAME, …}, by name; equal runs are equal bytes
RUNS/NAME.json    a new run, complete or not there at all
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adafuse_jax.core.atomic_files import new_file, write_text
from adafuse_jax.core.errors import UserError
from adafuse_jax.core.fields import require

Records = dict[str, dict[str, Any]]


def read_records(place: Path) -> Records:
    """Read the records of a packed file or of a folder; none if neither exists. Raises `UserError` for a damaged
    one."""
    try:
        if not place.is_dir():
            lines = gzip.decompress(place.read_bytes()).decode().splitlines() if place.exists() else []
            return {record.pop("name"): record for record in map(json.loads, lines)}
        return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(place.glob("*.json"))}
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{place}: cannot be read ({error}); restore it") from error


def pack(records: Records, file: Path) -> None:
    """Write a packed file, whole or not at all."""
    lines = "".join(json.dumps({"name": name} | records[name]) + "\n" for name in sorted(records))
    with new_file(file, text=False) as out:
        out.write(gzip.compress(lines.encode(), mtime=0))


class Runs:
    """The runs that are recorded in a packed file or a folder; new ones go to the folder."""

    def __init__(self, record: Path, folder: Path | None):
        self.record, self.folder = record, folder
        self.new: Records = {} if folder is None else read_records(folder)
        self.all: Records = read_records(record) | self.new

    def require_same(self, identity: dict[str, Any], is_current: Callable[[dict[str, Any]], bool]) -> None:
        """Raise `UserError` for runs of another identity, or whose settings are not `is_current`."""
        for name, record in self.all.items():
            where = f"{self.folder}/{name}.json" if name in self.new else f"{self.record}, run {name}"
            was = record["identity"]
            changed = [key for key in {**was, **identity} if was.get(key) != identity.get(key)]
            require(
                not changed,
                f"{where}: was made with { ({key: was.get(key) for key in changed}) }, this study has "
                f"{ ({key: identity.get(key) for key in changed}) }; give another --runs and --record",
            )
            run = record["run"]
            require(
                is_current(record),
                f"{where}: was made with {record['settings']}, which {run.get('method') or run['arm']} no longer is; "
                "remove it",
            )

    def add(self, name: str, record: dict[str, Any]) -> dict[str, Any]:
        """Write a run into the folder. Returns the record as JSON has it."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record)
        write_text(self.folder / f"{name}.json", text + "\n")
        self.all[name] = self.new[name] = json.loads(text)
        return self.all[name]


def add_flags(parser: argparse.ArgumentParser, record: Path) -> Any:
    """Flags of the records. Returns the group of the flags for what a call does other than train."""
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--report", action="store_true", help="remake the tables from the recorded runs")
    action.add_argument("--merge", action="store_true", help="merge the runs in --runs into --record")
    parser.add_argument("--record", type=Path, default=record, help="packed file of runs that are not run again")
    parser.add_argument("--runs", type=Path, help="folder of new runs, a JSON file each")
    return action


def merge(runs: Runs) -> None:
    """Pack everything that is recorded. Raises `UserError` if the folder has no run, or runs differ in identity."""
    require(bool(runs.new), f"--runs {runs.folder}: no run is there; give the folder of new runs")
    first = next(iter(runs.all.values()))
    runs.require_same(first["identity"], lambda _: True)
    pack(runs.all, runs.record)
