"""Token ids of one split of a corpus in a memory-mapped file.

Layout: a header block of 4096 bytes (magic, then JSON, then spaces), then the ids as little-endian uint16 or uint32, or
int32 if some are marked, as in chats (`chats.py`).
Every document is followed by one end-of-document token. The header holds a CRC-32 over its other facts and all ids.
"""

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from moe_dist.data.cache import atomic_write
from moe_dist.errors import DataError
from moe_dist.model.document_mask import INSIDE

_MAGIC = b"moe-dist tokens 1\n"
_HEADER_BYTES = 4096
_CHUNK = 1 << 22
_RUN = 1 << 24


@dataclass(frozen=True)
class TokenFacts:
    """Metadata of a token file; bytes (UTF-8), words (between white space) and lines are those of the text."""

    tokens: int
    documents: int
    bytes: int
    words: int
    lines: int
    vocab_size: int
    end_of_document: int
    dtype: str


@dataclass(frozen=True)
class TokenFile:
    """Open token file; `ids` [tokens] is read from disk on use.

    nats per byte = (nats per token) * tokens / bytes.
    """

    path: Path
    facts: TokenFacts
    checksum: int
    ids: npt.NDArray[Any]

    def __len__(self) -> int:
        return self.facts.tokens

    @property
    def plain_ids(self) -> npt.NDArray[np.integer]:
        """Ids without the marks of a chat; in memory."""
        return self.plain(0, len(self))

    def plain(self, first: int, end: int) -> npt.NDArray[np.integer]:
        """Return a run of these ids."""
        codes = self._codes(first, end)
        return codes & (INSIDE - 1) if codes.dtype.kind == "i" else codes

    def _codes(self, first: int, end: int) -> npt.NDArray[np.integer]:
        """Return a run of ids, of which those that end a part of a document are not the end-of-document token."""
        ids = np.asarray(self.ids[first:end])
        return np.maximum(ids, ~ids) if ids.dtype.kind == "i" else ids

    def documents(self) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Yield the first token and the size of documents, with their ends, [N] each, some million tokens at a time."""
        first, stop = 0, self.facts.end_of_document
        for start in range(0, len(self), _RUN):
            end_N = start + 1 + np.flatnonzero(self._codes(start, start + _RUN) == stop)
            if len(end_N):
                first_N = np.concatenate([[first], end_N[:-1]]).astype(np.int64)
                yield first_N, end_N - first_N
                first = int(end_N[-1])

    @cached_property
    def target_share(self) -> float:
        """Share of the tokens that are targets of the loss."""
        return float((self.ids >= 0).mean()) if self.ids.dtype.kind == "i" else 1.0


class Encoder(Protocol):
    """Encoder of documents: a tokenizer, or one that marks context by negative ids.

    One whose documents are not text has `text_of(document, ids)`: the text whose bytes, words and lines are counted.

    Attributes:
        end_of_document: id that follows each document.
    """

    vocab_size: int
    end_of_document: int

    def encode_all(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Yield the token ids of each text, in order."""


class TokenFileWriter:
    """Writer of documents to an open file, after room for the header, which `finish` writes.

    Args:
        file: open for binary writing.
        rows: rows of the model's embedding; None: as many as the tokenizer has ids.
    """

    def __init__(self, file: BinaryIO, encoder: Encoder, rows: int | None = None) -> None:
        rows = rows or encoder.vocab_size
        self._eod = eod = encoder.end_of_document
        self._dtype = np.dtype("<i4" if eod < 0 else "<u2" if rows <= 1 << 16 else "<u4")
        self.facts = TokenFacts(0, 0, 0, 0, 0, rows, max(eod, ~eod), self._dtype.str)
        self._file, self._crc = file, 0
        file.write(b" " * _HEADER_BYTES)

    @property
    def checksum(self) -> int:
        """Checksum of what was written so far."""
        return _checksum(self.facts, self._crc)

    def append(self, text: str, ids: Sequence[int]) -> None:
        """Add a document, and the token that ends it."""
        self._write(np.array([*ids, self._eod], dtype=self._dtype).tobytes())
        self._count(len(ids) + 1, 1, len(text.encode()), len(text.split()), text.count("\n"))

    def extend(self, other: TokenFile) -> None:
        """Add all documents of another file of the same encoder."""
        for start in range(0, len(other), _CHUNK):
            self._write(other.ids[start : start + _CHUNK].tobytes())
        facts = other.facts
        self._count(facts.tokens, facts.documents, facts.bytes, facts.words, facts.lines)

    def finish(self) -> None:
        """Write the header."""
        self._file.seek(0)
        self._file.write(_header(self.facts, self._crc))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._crc = zlib.crc32(data, self._crc)

    def _count(self, tokens: int, documents: int, size: int, words: int, lines: int) -> None:
        facts = self.facts
        self.facts = replace(
            facts,
            tokens=facts.tokens + tokens,
            documents=facts.documents + documents,
            bytes=facts.bytes + size,
            words=facts.words + words,
            lines=facts.lines + lines,
        )


@contextmanager
def token_file_writer(path: Path, encoder: Encoder, rows: int | None = None) -> Iterator[TokenFileWriter]:
    """Yield the writer of a token file, which is at `path` once the block has ended without an error."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        writer = TokenFileWriter(file, encoder, rows)
        yield writer
        writer.finish()


def open_token_file(path: Path) -> TokenFile:
    """Map a token file after checking its size and checksum (about a second per gigabyte).

    Raises:
        DataError: the file is missing, damaged, cut short or not a token file.
    """
    crc = 0
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
            while chunk := file.read(_CHUNK):  # not through the map, whose pages would count as this process's memory
                crc = zlib.crc32(chunk, crc)
            size = file.tell()
    except OSError as error:
        raise DataError(f"token file {path} cannot be read: {error.strerror}") from error
    facts, checksum = _parse(path, header)
    expected = _HEADER_BYTES + facts.tokens * np.dtype(facts.dtype).itemsize
    if size != expected:
        raise DataError(f"token file {path} is damaged: {size} bytes instead of {expected}; remove it")
    ids = np.memmap(path, dtype=facts.dtype, mode="r", offset=_HEADER_BYTES, shape=(facts.tokens,))
    if _checksum(facts, crc) != checksum:
        raise DataError(f"token file {path} is damaged: its checksum is not {checksum}; remove it")
    return TokenFile(path, facts, checksum, ids)


def _checksum(facts: TokenFacts, ids_crc: int) -> int:
    return zlib.crc32(json.dumps(asdict(facts), sort_keys=True).encode(), ids_crc)


def _header(facts: TokenFacts, ids_crc: int) -> bytes:
    content = json.dumps({"facts": asdict(facts), "checksum": _checksum(facts, ids_crc)})
    return (_MAGIC + content.encode()).ljust(_HEADER_BYTES)


def _parse(path: Path, header: bytes) -> tuple[TokenFacts, int]:
    try:
        if not header.startswith(_MAGIC):
            raise ValueError("magic")
        content = json.loads(header.removeprefix(_MAGIC))
        facts, checksum = TokenFacts(**content["facts"]), int(content["checksum"])
        if facts.dtype not in ("<u2", "<u4", "<i4") or not isinstance(facts.tokens, int) or facts.tokens < 1:
            raise ValueError("facts")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"token file {path} is damaged: its header is not one of a token file; remove it") from error
    return facts, checksum
