"""Rows of files to examples, in a stream: the format by the columns, each row converted as it is read, and an account of
what was not.

Files are read twice. `survey` counts: which splits there are, which rows give no example and what was altered stand in the
last row as in the first. `examples_of` then gives the examples of one split, so that never all of them are in memory.

Nothing is left out or altered without a line in the log: rows without an example, bad rows (if they may be left out), turns
that were dropped, columns that nothing reads.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from adafuse_jax.core.errors import UserError, shortened
from adafuse_jax.data.examples import Example
from adafuse_jax.data.files import FileRows
from adafuse_jax.data.formats import FORMATS, Format, bound, convert, recognise
from adafuse_jax.data.json_rows import Item
from adafuse_jax.data.rows import BadRow, Notes, Number, SkipRow

log = logging.getLogger(__name__)

SPLIT_COLUMN = "split"
MAX_SPLITS = 16
"""Most distinct values of a column `split` that names splits; with more, the column means something else."""
BAR: dict[str, Any] = {"unit": " rows", "leave": False, "disable": None, "delay": 3, "dynamic_ncols": True}
"""Settings of the progress bar: on a terminal, if it takes more than three seconds."""
SAMPLE_ROWS = 100
SAMPLE_CHARACTERS = 2**22
"""The format is recognised by the columns of a file's first rows: so many, or so much text."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The examples of a split, how many rows gave none, by reason, and how many rows were bad and left out."""

    examples: list[Example]
    skipped: dict[str, int]
    bad: int = 0


@dataclass(slots=True)
class Report:
    """The rows of a split: examples, and rows that gave none. `fault` is the first bad row, if bad rows are not left out."""

    examples: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    bad: int = 0
    first_bad: str = ""
    fault: UserError | None = None


@dataclass(slots=True)
class Survey:
    """Account of all rows of some files by split; rows of split None count for every split. `by_split` if there is a column
    that names the split of each row."""

    by_split: bool
    reports: dict[str | None, Report] = field(default_factory=dict)

    def report(self, split: str | None) -> Report:
        return self.reports.setdefault(split, Report())

    def names(self) -> tuple[str, ...]:
        """Names of the splits that have an example, in the order of the rows, then of those without; () without a column of
        splits."""
        named = sorted(self.reports.items(), key=lambda item: item[1].examples == 0)
        return tuple(name for name, _ in named if name is not None)

    def forget_splits(self) -> None:
        """Count every row for every split, as the column does not name splits. Raises the first fault."""
        reports, self.reports, self.by_split = list(self.reports.values()), {}, False
        total = self.report(None)
        for report in reports:
            if report.fault is not None:
                raise report.fault
            total.examples += report.examples
            total.skipped += report.skipped
            total.bad += report.bad
            total.first_bad = total.first_bad or report.first_bad

    def total(self, split: str | None, where: str) -> Report:
        """The rows of a split, those without an example logged. Raises UserError for a bad row in it, unless they are left
        out, and if no example is left."""
        reports = [self.reports[key] for key in dict.fromkeys((None, split)) if key in self.reports]
        fault = next((report.fault for report in reports if report.fault is not None), None)
        if fault is not None:
            raise fault
        skipped = sum((report.skipped for report in reports), Counter())
        total = Report(
            examples=sum(report.examples for report in reports), skipped=skipped, bad=sum(r.bad for r in reports)
        )
        counts = [f"{n}: {why}" if why.startswith("it") else f"{n} with {why}" for why, n in skipped.items()]
        if total.bad:
            first = next(report.first_bad for report in reports if report.bad)
            limit = 300 if total.examples else 200
            counts.append(f"{total.bad} bad rows, the first: {shortened(first, limit)}")
        listed = ", ".join(counts)
        if not total.examples:
            fault_text = f"no usable rows: {where}: skipped {listed}" if counts else f"no rows: {where}"
            raise UserError(f"{fault_text}: give rows with a text prompt and a reply")
        if counts:
            level = logging.WARNING if total.bad else logging.INFO
            log.log(level, "%s: %d examples; skipped %s", where, total.examples, listed)
        return total


def survey(
    files: Iterable[FileRows], source: str, asked: str, *, skip_bad_rows: bool = False, by_split: bool = False
) -> Survey:
    """Convert all rows of the files, in the format `asked` ("auto": by their columns), and count. `by_split` heeds a column
    that names each row's split; then a bad row is a fault of its split, and otherwise raised at once.

    Raises UserError."""
    notes, found = Notes(), Survey(by_split)
    for file in files:
        sample = _sample(file)
        form = _form(sample, file, asked)
        found.by_split &= any(isinstance(row, Mapping) and SPLIT_COLUMN in row for _, row in sample)
        if not found.by_split:
            found.forget_splits()
        rows = tqdm(chain(sample, file.items), desc=f"reading {file.path.name}", **BAR)
        _count(rows, file.path, form, found, notes, skip_bad_rows)
        known = form.uses | {"image"} | ({SPLIT_COLUMN} if found.by_split else set())
        notes.unused |= {name or "(no name)": None for name in file.columns if name not in known}
    if notes.altered:
        log.info("%s: %s", source, "; ".join(f"{count} {what}" for what, count in notes.altered.items()))
    if notes.unused:
        log.info("%s: columns not used: %s", source, shortened(", ".join(notes.unused), 200))
    return found


def _where(path: Path, number: int, line: int) -> str:
    return f"{path}: row {number}, line {line}" if line else f"{path}: row {number}"


def _count(items: Iterable[Item], path: Path, form: Format, found: Survey, notes: Notes, skip_bad_rows: bool) -> None:
    """Add a file's rows to `found`, and end its `by_split` if the column turns out not to name splits."""
    known = {*form.uses, "image"} | ({SPLIT_COLUMN} if found.by_split else set())
    names: dict[str | None, None] = dict.fromkeys(found.names())
    for number, (line, row) in enumerate(items, 1):
        where = _where(path, number, line)
        split = None
        try:
            if isinstance(row, BadRow):
                raise UserError(f"{row.fault}: {where}: {row.detail}")
            if not row.keys() <= known:
                notes.unused |= {name or "(no name)": None for name in row if name not in known}
                known |= row.keys()
            if found.by_split:
                split = row.get(SPLIT_COLUMN)
                named = isinstance(split, str) and not isinstance(split, Number) and split.strip()
                names |= {split if named else None: None}
                if None in names or len(names) > MAX_SPLITS:
                    split = None
                    notes.unused[SPLIT_COLUMN] = None
                    found.forget_splits()
            convert(row, form, where, notes)
            found.report(split).examples += 1
        except SkipRow as reason:
            found.report(split).skipped[str(reason)] += 1
        except UserError as error:
            report = found.report(split)
            if skip_bad_rows:
                report.bad += 1
                report.first_bad = report.first_bad or str(error)
            elif split is None:
                raise
            else:
                report.fault = report.fault or error


def examples_of(files: Iterable[FileRows], asked: str, split: str | None) -> Iterator[Example]:
    """The examples of the rows of a split (None: of all rows) that `survey` counted."""
    notes = Notes()
    for file in files:
        sample = _sample(file)
        form = _form(sample, file, asked)
        for number, (line, row) in enumerate(chain(sample, file.items), 1):
            if isinstance(row, BadRow) or (split is not None and row.get(SPLIT_COLUMN) != split):
                continue
            try:
                yield convert(row, form, _where(file.path, number, line), notes)
            except (SkipRow, UserError):  # counted by `survey`
                continue


def _sample(file: FileRows) -> list[Item]:
    """A file's first rows. Raises UserError if there are none."""
    sample, characters = [], 0
    for item in file.items:
        sample.append(item)
        characters += _characters(item[1])
        if len(sample) == SAMPLE_ROWS or characters > SAMPLE_CHARACTERS:
            break
    if not sample:
        raise UserError(f"no rows: {file.path}: give a file with at least one")
    return sample


def _characters(value: Any) -> int:
    """Number of characters in all texts of a row."""
    total, inside = 0, [value]
    while inside:
        value = inside.pop()
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, Mapping):
            inside += value.values()
        elif isinstance(value, list):
            inside += value
    return total


def _form(sample: list[Item], file: FileRows, asked: str) -> Format:
    """The format by the columns that have a value in the sample. Raises UserError for none that fits, and the fault of the
    first row if all are bad."""
    rows = [row for _, row in sample if not isinstance(row, BadRow)]
    if not rows:
        line, bad = sample[0]
        assert isinstance(bad, BadRow)
        raise UserError(f"{bad.fault}: {file.path}: row 1{f', line {line}' if line else ''}: {bad.detail}")
    filled = list(dict.fromkeys(name for row in rows for name, value in row.items() if value is not None))
    if any(fmt.fits(filled) for fmt in FORMATS.values()):
        return bound(recognise(filled, rows[0], asked, str(file.path)), filled)
    columns = file.columns or tuple(dict.fromkeys(name for row in rows for name in row))
    return bound(recognise([name for name in columns if name], rows[0], asked, str(file.path)), columns)
