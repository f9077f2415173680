"""Documents that are tokenized already: arrays of NumPy, and columns of lists in Parquet files.

Such a document passes through the preparation of text as the JSON list of its ids, which `TokenListEncoder` turns into
ids again, so that hold-out, resumption and checks are those of any other corpus.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_dist.data.files import digest_of, first_and_more
from moe_dist.data.table_files import parquet_rows
from moe_dist.data.tokenizer import Tokenizer
from moe_dist.errors import DataError

_WINDOW = 1 << 22  # ids read at a time


@dataclass(frozen=True)
class TokenListSource:
    """Files sorted by name: rows of a two-dimensional array or of a column of lists are documents.

    A one-dimensional array is divided at `separator`, which belongs to no document.
    """

    files: tuple[Path, ...]
    column: str
    separator: int | None

    def __str__(self) -> str:
        return first_and_more(self.files)

    def fingerprint(self) -> str:
        """Return a digest of the content of all files, the column and the separator."""
        return f"tokens {self.column} {self.separator} {digest_of(self.files)}"

    def texts(self) -> Iterator[str]:
        """Yield the ids of each document as a JSON list.

        Raises:
            DataError: a file holds no ids, lacks the column, or needs a separator.
        """
        for path in self.files:
            rows = self._array_rows(path) if path.suffix == ".npy" else self._column_rows(path)
            yield from (token_list(row) for row in rows if len(row))

    def _array_rows(self, path: Path) -> Iterator[list[int]]:
        try:
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path} is not an array of NumPy: {' '.join(str(error).split())}") from error
        if not np.issubdtype(ids.dtype, np.integer) or ids.ndim not in (1, 2):
            raise DataError(
                f"{path} holds {ids.ndim} dimensions of {ids.dtype}: must be one or two dimensions of integers"
            )
        if ids.ndim == 2:
            yield from (row.tolist() for row in ids)
        elif self.separator is None:
            raise DataError(f"{path} has one dimension: give corpus.separator, the id between its documents")
        else:
            yield from _divided(ids, self.separator)

    def _column_rows(self, path: Path) -> Iterator[list[int]]:
        for number, _, row in parquet_rows(path, self.column):
            if row is None:
                continue
            if not isinstance(row, list) or not all(isinstance(token, int) for token in row):
                raise DataError(f"{path}: row {number}: corpus.text_column={self.column} is no list of integers")
            yield row


def _divided(ids: npt.NDArray[Any], separator: int) -> Iterator[list[int]]:
    start = 0
    for first in range(0, len(ids), _WINDOW):
        for end in (first + np.flatnonzero(ids[first : first + _WINDOW] == separator)).tolist():
            yield ids[start:end].tolist()
            start = end + 1
    yield ids[start:].tolist()


def token_list(ids: Iterable[int]) -> str:
    """Return ids as the text of a document."""
    return json.dumps(list(ids))


class TokenListEncoder:
    """Encoder of JSON lists of ids that the tokenizer of the files made.

    An end of the document that the files hold already is not doubled.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.vocab_size, self.end_of_document = tokenizer.vocab_size, tokenizer.end_of_document

    def encode_all(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Yield the ids of each document, in order.

        Raises:
            DataError: an id is not one of the tokenizer's.
        """
        for text in texts:
            ids: list[int] = json.loads(text)
            if wrong := [token for token in ids if not 0 <= token < self.vocab_size]:
                raise DataError(
                    f"a document holds the token {wrong[0]}, but the tokenizer of tokenizer.path has ids below "
                    f"{self.vocab_size}: give the tokenizer by which the files were made"
                )
            yield ids[:-1] if ids and ids[-1] == self.end_of_document else ids

    def text_of(self, document: str, ids: Sequence[int]) -> str:
        """Return the text of ids, whose bytes, words and lines are counted."""
        return self._tokenizer.decode(list(ids))
