"""Rows of CSV and Parquet files, a few at a time: CSV cells stay text; of Parquet only columns that are used are read."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from adafuse_jax.core.errors import UserError, shortened
from adafuse_jax.data.json_rows import Item, invalid_byte
from adafuse_jax.data.rows import BadRow

CELL_LIMIT = 2**31 - 1
BATCH_ROWS = 512
IMAGE_BATCH_ROWS = 16


def csv_rows(stream: io.TextIOBase, path: Path, used: Iterable[str]) -> Iterator[Item]:
    """Rows of a CSV text stream (UTF-8 with surrogateescape, line ends as they are) with a header.

    A row has the header's cells, or all rows have one empty cell more, by a comma at their ends. Other rows are BadRow.
    Raises UserError for a name in `used` that stands twice in the header, and for a quote that is not closed."""
    csv.field_size_limit(CELL_LIMIT)  # the module's own limit is 128 KiB
    reader = csv.reader(stream, strict=True)
    header: list[str] | None = None
    extra: int | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise UserError(f"malformed CSV: {path}: line {line}: a quote opens there and never closes") from None
            if header is None:
                raise UserError(f"malformed CSV: {path}: line {line}: {error}: correct the header") from None
            yield line, BadRow("malformed CSV", f"{error}: quote the cell, and double the quotes in it")
            continue
        if cells is None:
            return
        if not cells or (len(cells) == 1 and not cells[0].strip() and (header is None or len(header) > 1)):
            continue
        bad = next(filter(None, map(invalid_byte, cells)), None)
        if header is None:
            if bad is not None:
                raise UserError(f"{bad.fault}: {path}: line {line}: {bad.detail}")
            header = [name.strip() for name in cells]
            _require_commas(header, path, line)
            repeated_columns(header, used, path, "line 1")
            continue
        more = len(cells) - len(header)
        if extra is None:
            extra = more if more == 1 and not cells[-1] else 0
        if bad is not None:
            yield line, bad
        elif (more == extra and not (extra and cells[-1])) or (more < 0 and not any(header[more:])):
            yield line, dict(zip(header, cells, strict=False))  # none is missing but of columns without a name
        else:
            yield line, BadRow("malformed CSV", _width_fault(cells, header, extra))


def _require_commas(header: Sequence[str], path: Path, line: int) -> None:
    """Raise UserError for a header whose names other characters separate."""
    separator = next((mark for mark in "\t;|" if len(header) == 1 and mark in header[0]), None)
    if separator is not None:
        name = {"\t": "tabs", ";": "semicolons", "|": "bars"}[separator]
        raise UserError(f"malformed CSV: {path}: line {line}: {name} separate the columns: save it with commas")


def _width_fault(cells: Sequence[str], header: Sequence[str], extra: int) -> str:
    columns = shortened(", ".join(header), 80)
    more = " and the empty one that row 1 has more" if extra else ""
    return f"{len(cells)} cells for the {len(header)} columns {columns}{more}: quote cells with commas, leave none out"


def repeated_columns(names: Sequence[str], used: Iterable[str], path: Path, where: str) -> None:
    """Raise UserError if a column that is used stands twice."""
    repeated = sorted(name for name, count in Counter(names).items() if count > 1 and name in set(used))
    if repeated:
        columns = shortened(", ".join(names), 100)
        raise UserError(f"repeated column: {path}: {where}: the columns are {columns}: give each its own name")


def parquet_columns(file: Any, path: Path, used: Iterable[str]) -> list[str]:
    """The names of all columns of a `pyarrow.parquet.ParquetFile`. Raises UserError if one that is used stands twice."""
    names = list(file.schema_arrow.names)
    repeated_columns(names, used, path, "schema")
    return names


def parquet_rows(file: Any, columns: Sequence[str]) -> Iterator[Item]:
    """Rows of a `pyarrow.parquet.ParquetFile`, of `columns` only."""
    rows = IMAGE_BATCH_ROWS if "image" in columns else BATCH_ROWS
    return arrow_rows(file.iter_batches(batch_size=rows, columns=list(columns), use_threads=False))


def dataset_rows(data: Any, columns: Sequence[str]) -> Iterator[Item]:
    """Rows of a `datasets.Dataset`, of `columns` only, as they are stored: images stay bytes."""
    rows = IMAGE_BATCH_ROWS if "image" in columns else BATCH_ROWS
    tables = data.select_columns(list(columns)).with_format("arrow").iter(rows)
    return arrow_rows(batch for table in tables for batch in table.to_batches())


def arrow_rows(batches: Iterable[Any]) -> Iterator[Item]:
    """Rows of `pyarrow.RecordBatch`es. A row with text that is not UTF-8 is a BadRow."""
    for batch in batches:
        try:
            values = [_values(column) for column in batch.columns]
        except (UnicodeDecodeError, ValueError, OverflowError):
            yield from ((0, _parquet_row(batch.slice(i, 1))) for i in range(batch.num_rows))
            continue
        names = batch.schema.names
        for row in zip(*values, strict=True):
            yield 0, dict(zip(names, row, strict=True))


def _values(column: Any) -> list[Any]:
    """A column as Python values; of 32-bit floats those that are written with the fewest digits, 0.1 as 0.1."""
    values = column.to_pylist()
    if str(column.type) not in ("float", "halffloat"):
        return values
    kind = column.type.to_pandas_dtype()
    return [None if value is None else float(str(kind(value))) for value in values]


def _parquet_row(batch: Any) -> dict[str, Any] | BadRow:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column.to_pylist()[0]
        except UnicodeDecodeError as error:
            return BadRow("not UTF-8", f"column {name!r}: byte 0x{error.object[error.start]:02x}: convert it to UTF-8")
        except (ValueError, OverflowError) as error:  # a time that Python has no date for
            return BadRow("bad row", f"column {name!r}: {shortened(str(error), 100)}")
    return row
