"""Rows of files to examples: the format by the columns, every row converted as it is read, and a count of what was not.

Nothing is left out or altered without a line in the log: rows without an example, bad rows (if they may be left out), turns
that were dropped, columns that nothing reads.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

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
    """Rows of a split that gave no example. `fault` is the first bad row, if bad rows are not left out."""

    skipped: Counter[str] = field(default_factory=Counter)
    bad: int = 0
    first_bad: str = ""
    fault: UserError | None = None


@dataclass(slots=True)
class Collected:
    """The examples of all rows of some files; with a column of splits, `splits` has the split of each.

    `reports` are by split; those of None count for every split."""

    examples: list[Example] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    reports: dict[str | None, Report] = field(default_factory=dict)

    def report(self, split: str | None) -> Report:
        return self.reports.setdefault(split, Report())

    def names(self) -> tuple[str, ...]:
        """Names of the splits, in the order of the rows; () without a column of splits."""
        return tuple(dict.fromkeys([*self.splits, *(name for name in self.reports if name is not None)]))

    def forget_splits(self) -> None:
        """Count every row for every split, as the column does not name splits. Raises the first fault."""
        reports, self.reports, self.splits = list(self.reports.values()), {}, []
        total = self.report(None)
        for report in reports:
            if report.fault is not None:
                raise report.fault
            total.skipped += report.skipped
            total.bad += report.bad
            total.first_bad = total.first_bad or report.first_bad

    def loaded(self, split: str | None, where: str) -> Loaded:
        """The examples of a split. Raises UserError for a bad row in it, unless they are left out, and if none is left."""
        reports = [self.reports[key] for key in dict.fromkeys((None, split)) if key in self.reports]
        fault = next((report.fault for report in reports if report.fault is not None), None)
        if fault is not None:
            raise fault
        examples = self.examples
        if self.splits:
            examples = [e for e, name in zip(examples, self.splits, strict=True) if name == split]
        skipped = sum((report.skipped for report in reports), Counter())
        counts = [f"{n}: {why}" if why.startswith("it") else f"{n} with {why}" for why, n in skipped.items()]
        bad = sum(report.bad for report in reports)
        if bad:
            first = next(report.first_bad for report in reports if report.bad)
            counts.append(f"{bad} bad rows, the first: {shortened(first, 300 if examples else 200)}")
        listed = ", ".join(counts)
        if not examples:
            fault_text = f"no usable rows: {where}: skipped {listed}" if counts else f"no rows: {where}"
            raise UserError(f"{fault_text}: give rows with a text prompt and a reply")
        if counts:
            log.log(
                logging.WARNING if bad else logging.INFO, "%s: %d examples; skipped %s", where, len(examples), listed
            )
        return Loaded(examples, dict(skipped), bad)


def collect(
    files: Iterable[FileRows], source: str, asked: str, *, skip_bad_rows: bool = False, by_split: bool = False
) -> Collected:
    """Examples of all rows of the files, in the format `asked` ("auto": by their columns). `by_split` heeds a column that
    names each row's split; then a bad row is a fault of its split, and otherwise raised at once.

    Raises UserError."""
    notes, found = Notes(), Collected()
    with _no_cycles():
        for file in files:
            sample = _sample(file)
            form = _form(sample, file, asked)
            by_split = by_split and any(isinstance(row, Mapping) and SPLIT_COLUMN in row for _, row in sample)
            if not by_split:
                found.forget_splits()
            by_split = _convert_all(chain(sample, file.items), file.path, form, found, notes, skip_bad_rows, by_split)
            known = form.uses | {"image"} | ({SPLIT_COLUMN} if by_split else set())
            notes.unused |= {name or "(no name)": None for name in file.columns if name not in known}
    if notes.altered:
        log.info("%s: %s", source, "; ".join(f"{count} {what}" for what, count in notes.altered.items()))
    if notes.unused:
        log.info("%s: columns not used: %s", source, shortened(", ".join(notes.unused), 200))
    return found


@contextlib.contextmanager
def _no_cycles() -> Iterator[None]:
    """No search for cycles among objects within: rows have none, and every search goes through all examples so far."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _convert_all(
    items: Iterable[Item], path: Path, form: Format, found: Collected, notes: Notes, skip_bad_rows: bool, by_split: bool
) -> bool:
    """Add the examples of a file's rows to `found`; `by_split`, or False if the column turned out not to name splits."""
    known = {*form.uses, "image"} | ({SPLIT_COLUMN} if by_split else set())
    names: dict[str | None, None] = dict.fromkeys(found.names())
    for number, (line, row) in enumerate(items, 1):
        where = f"{path}: row {number}, line {line}" if line else f"{path}: row {number}"
        split = None
        try:
            if isinstance(row, BadRow):
                raise UserError(f"{row.fault}: {where}: {row.detail}")
            if not row.keys() <= known:
                notes.unused |= {name or "(no name)": None for name in row if name not in known}
                known |= row.keys()
            if by_split:
                split = row.get(SPLIT_COLUMN)
                named = isinstance(split, str) and not isinstance(split, Number) and split.strip()
                names |= {split if named else None: None}
                if None in names or len(names) > MAX_SPLITS:
                    by_split, split = False, None
                    notes.unused[SPLIT_COLUMN] = None
                    found.forget_splits()
            found.examples.append(convert(row, form, where, notes))
            if by_split:
                found.splits.append(sys.intern(split))  # type: ignore[arg-type]
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
    return by_split


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
