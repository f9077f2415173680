"""Text column of JSON-lines and Parquet files; no other column is parsed into a schema, so their types never matter."""

import codecs
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_dist.data.compressed import open_binary
from moe_dist.errors import DataError

logger = logging.getLogger(__name__)

_ROWS_OF_A_BATCH = 1024
_COLUMNS_SHOWN = 20
# Numbers of other columns may be too long or too large for Python's own types.
_TEXT_DECODER = json.JSONDecoder(parse_int=lambda _: 0, parse_float=lambda _: 0.0)


def jsonl_texts(path: Path, column: str) -> Iterator[str]:
    """Yield the column's text of each line; rows in which it is missing or null are skipped, with a warning.

    Raises:
        DataError: one line that names the file and its line: it is not a JSON object, or its text is not a string; or
            no row has the column.
    """
    columns: dict[str, None] = {}
    rows, missing = 0, _MissingTexts(path, "line")
    for number, row in json_objects(path, _TEXT_DECODER):
        rows += 1
        text = row.get(column)
        if column in row:
            columns[column] = None
        elif len(columns) < _COLUMNS_SHOWN:
            columns |= dict.fromkeys(row)
        if text is None:
            missing.add(number)
            continue
        yield checked_text(text, f"{path}: line {number}", column, row)
    if rows and column not in columns:
        raise no_column(str(path), column, columns)
    missing.warn(rows)


def parquet_texts(path: Path, column: str) -> Iterator[str]:
    """Yield the column's text of each row; rows in which it is null are skipped, with a warning.

    Raises:
        DataError: the file is not a Parquet file, lacks the column, or the column does not hold text.
    """
    rows, missing = 0, _MissingTexts(path, "row")
    for number, names, text in parquet_rows(path, column):
        rows = number
        if text is None:
            missing.add(number)
            continue
        yield checked_text(text, f"{path}: row {number}", column, names)
    missing.warn(rows)


def parquet_rows(path: Path, column: str) -> Iterator[tuple[int, Sequence[str], Any]]:
    """Yield the number of each row, from 1, the names of all columns, and the column's value; a file may be empty.

    Raises:
        DataError: the file is not a Parquet file, or lacks the column.
    """
    import pyarrow  # takes long to import, and most runs need none of it
    from pyarrow import parquet

    if not path.stat().st_size:
        return
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise no_column(str(path), column, names)
            for batch in file.iter_batches(batch_size=_ROWS_OF_A_BATCH, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield number, names, value
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} cannot be read as .parquet: {reason}") from error


def checked_text(text: Any, where: str, column: str, columns: Iterable[str]) -> str:
    """Return the text of a row.

    Raises:
        DataError: it is not a string.
    """
    if isinstance(text, str):
        return text
    others = _listed(name for name in columns if name != column)
    raise DataError(
        f"{where}: corpus.text_column={column} is {type(text).__name__}, not text; other columns: {others or 'none'}"
    )


def no_column(origin: str, column: str, columns: Iterable[str]) -> DataError:
    """Return the error of a table that lacks the text column."""
    return DataError(f"{origin} has no column corpus.text_column={column}; it has: {_listed(columns) or 'none'}")


def _listed(columns: Iterable[str]) -> str:
    names = list(columns)
    return ", ".join(names[:_COLUMNS_SHOWN]) + (", ..." if len(names) > _COLUMNS_SHOWN else "")


def json_objects(path: Path, decoder: json.JSONDecoder | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number, from 1, and the object of each line that is not blank; a byte-order mark is skipped.

    Raises:
        DataError: one line that names the file and its line.
    """
    decoder, number = decoder or json.JSONDecoder(), 0
    try:
        with open_binary(path) as file:
            for chunk in file:
                for line in chunk.splitlines():  # at CR too
                    number += 1
                    data = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                    if not data.strip():
                        continue
                    row = decoder.decode(data.decode())
                    if not isinstance(row, dict):
                        raise DataError(f"{path}: line {number} is not a JSON object: .jsonl holds one object per line")
                    yield number, row
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: line {number} is not UTF-8 text: byte {error.start}") from error
    except RecursionError as error:
        raise DataError(f"{path}: line {number} is nested too deeply") from error
    except ValueError as error:
        raise DataError(f"{path}: line {number} is not JSON: {getattr(error, 'msg', error)}") from error


class _MissingTexts:
    """Count of a file's rows without text."""

    def __init__(self, path: Path, unit: str) -> None:
        self._path, self._unit, self._count, self._first = path, unit, 0, 0

    def add(self, number: int) -> None:
        self._count += 1
        self._first = self._first or number

    def warn(self, rows: int) -> None:
        if self._count:
            logger.warning(
                "%s: %d of %d rows have no text and are skipped, the first on %s %d",
                self._path, self._count, rows, self._unit, self._first,
            )  # fmt: skip
