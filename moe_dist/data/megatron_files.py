"""Megatron-core's tokenized files, PREFIX.bin and PREFIX.idx, read and written by its own classes.

A document passes through the preparation of text as a token list (`token_lists.py`).
"""

import logging
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_dist.data.files import digest_of, first_and_more
from moe_dist.data.token_file import TokenFile
from moe_dist.data.token_lists import token_list
from moe_dist.errors import DataError

ENDINGS = (".bin", ".idx")
_HEAD = struct.Struct("<9sQBQQ")  # of an index: magic, version, type, numbers of sequences and of document positions


@dataclass(frozen=True)
class MegatronSource:
    """Documents of tokenized files, sorted by name."""

    prefixes: tuple[Path, ...]

    def __str__(self) -> str:
        return first_and_more(self.prefixes)

    def fingerprint(self) -> str:
        """Return a digest of the content of all files."""
        return f"megatron {digest_of([_with(prefix, ending) for prefix in self.prefixes for ending in ENDINGS])}"

    def texts(self) -> Iterator[str]:
        """Yield the ids of each document as a JSON list.

        Raises:
            DataError: a file is damaged.
        """
        for prefix in self.prefixes:
            data = _open(prefix)
            ends = np.asarray(data.document_indices)
            for first, last in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
                yield token_list(int(token) for number in range(first, last) for token in data[number])


def match_prefixes(key: str, names: Sequence[str]) -> tuple[Path, ...]:
    """Return the prefixes that are named, with or without an ending, sorted.

    Raises:
        DataError: one of the two files of a prefix is missing.
    """
    found = set()
    for name in names:
        path = Path(name).expanduser().absolute()
        prefix = path.with_name(path.name.removesuffix(path.suffix)) if path.suffix in ENDINGS else path
        for ending in ENDINGS:
            if not _with(prefix, ending).is_file():
                raise DataError(
                    f"{key}: {_with(prefix, ending)} is missing: tokenized files are a pair {prefix}.bin .idx"
                )
        found.add(prefix)
    return tuple(sorted(found))


def write_megatron_files(tokens: TokenFile, prefix: Path) -> None:
    """Write a token file as PREFIX.bin and PREFIX.idx, each document with its end."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    ends = np.flatnonzero(tokens.ids == tokens.facts.end_of_document) + 1
    prefix.parent.mkdir(parents=True, exist_ok=True)
    dtype = DType.optimal_dtype(tokens.facts.vocab_size)
    builder = IndexedDatasetBuilder(str(_with(prefix, ".bin")), dtype=dtype)
    first = 0
    for end in ends.tolist():
        builder.add_document(tokens.ids[first:end].astype(np.int64), [end - first])
        first = end
    builder.finalize(str(_with(prefix, ".idx")))


def _with(prefix: Path, ending: str) -> Path:
    return prefix.with_name(prefix.name + ending)


def _open(prefix: Path) -> Any:
    """Open a pair of files by Megatron-core's class.

    Raises:
        DataError: they are damaged.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset  # with much else of Megatron-core

    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    _check_index(_with(prefix, ".idx"))
    data = IndexedDataset(str(prefix))
    size = data.index.dtype_size * int(np.sum(data.sequence_lengths))
    if (found := _with(prefix, ".bin").stat().st_size) != size:
        raise DataError(f"{prefix}.bin is damaged: {found} bytes instead of the {size} of its index")
    return data


def _check_index(path: Path) -> None:
    """Check magic, version and size of an index, of which Megatron-core's class would complain by tracebacks.

    It holds for each sequence a length (int32) and a position (int64), and for each document and the end an int64.
    """
    with path.open("rb") as file:
        head, size = file.read(_HEAD.size), path.stat().st_size
    if len(head) == _HEAD.size:
        magic, version, _, sequences, documents = _HEAD.unpack(head)
        if (magic, version) == (b"MMIDIDX\0\0", 1) and size == _HEAD.size + 12 * sequences + 8 * documents:
            return
    raise DataError(f"{path} is no index of Megatron-core's, or cut short ({size} bytes)")
