"""Best-fit packing: documents are put whole into sequences where they fit, with the least room left.

Documents longer than a sequence are cut into whole sequences and a rest, each piece starting at the last token of the
one before; then pieces are packed by best-fit-decreasing (Ding et al., "Fewer Truncations Improve Language Modeling",
arXiv 2404.10830), `WINDOW` at a time, so that memory does not grow with the corpus. The index is a file beside the
tokens:

    <side>.packing-<S>: header, then pieces [p, 2] of (first token, length), then the end of each sequence's pieces [n]

Shapes: S tokens per sequence, which holds C = S + 1 ids; p pieces, n sequences.
"""

import json
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from moe_dist.data.cache import atomic_write, exclusive
from moe_dist.data.sequences import Indices
from moe_dist.data.token_file import TokenFile
from moe_dist.errors import DataError

WINDOW = 1 << 20
"""Pieces that are packed together."""
_HEADER_BYTES = 4096
_CHUNK = 1 << 22
Pieces = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PackingFacts:
    """Metadata of a packing: of which tokens it is, and what it made of them; `checksum` is that of the token file."""

    checksum: int
    length: int
    pieces: int
    sequences: int
    tokens: int
    targets: int
    documents: int
    cut_documents: int
    index_crc: int

    @property
    def padding(self) -> float:
        """Share of the ids of all sequences that are padding."""
        return 1 - self.tokens / (self.sequences * (self.length + 1))


class PackedSequences:
    """Sequences of a packing; padding is the complement of the end-of-document token, which is no target.

    Args:
        tokens: file of the documents.
        length: tokens per sequence.
    """

    def __init__(self, tokens: TokenFile, length: int) -> None:
        self._tokens, self._length = tokens, length
        path = tokens.path.with_suffix(f".packing-{length}")
        with exclusive(path.with_name(f"{path.name}.lock")):
            if (facts := read_facts(path, tokens, length)) is None:
                facts = write_packing(path, tokens, length)
        self.facts = facts
        self._pieces = np.memmap(path, "<i8", "r", _HEADER_BYTES, (facts.pieces, 2))
        self._ends = np.memmap(path, "<i8", "r", _HEADER_BYTES + 16 * facts.pieces, (facts.sequences,))

    def __len__(self) -> int:
        return self.facts.sequences

    @property
    def target_share(self) -> float:
        """Share of the tokens that are targets: neither padding nor a chat's context."""
        return self.facts.targets / (self.facts.sequences * self._length)

    def read(self, indices: Indices) -> torch.Tensor:
        """Read sequences, int64 [n, S + 1]."""
        padding = ~self._tokens.facts.end_of_document
        rows = np.full((len(indices), self._length + 1), padding, np.int64)
        for row, index in zip(rows, indices.tolist(), strict=True):
            at, begin = 0, int(self._ends[index - 1]) if index else 0
            for first, size in self._pieces[begin : int(self._ends[index])].tolist():
                row[at : at + size] = self._tokens.ids[first : first + size]
                at += size
        return torch.from_numpy(rows)


def read_facts(path: Path, tokens: TokenFile, length: int) -> PackingFacts | None:
    """Return the metadata of the packing in a file; None: there is none, or it is damaged or of other tokens."""
    try:
        with path.open("rb") as file:
            facts = PackingFacts(**json.loads(file.read(_HEADER_BYTES)))
            whole = _crc(file) == facts.index_crc
            whole &= file.tell() == _HEADER_BYTES + 16 * facts.pieces + 8 * facts.sequences
    except (OSError, ValueError, TypeError):
        return None
    return facts if whole and (facts.checksum, facts.length) == (tokens.checksum, length) else None


def write_packing(path: Path, tokens: TokenFile, length: int) -> PackingFacts:
    """Pack all documents of a token file, and write the index, atomically.

    Raises:
        DataError: there is no document.
    """
    documents = cut = pieces = used = targets = sequences = 0
    with atomic_write(path) as temporary, temporary.open("w+b") as file, TemporaryFile(dir=path.parent) as ends:
        file.write(b" " * _HEADER_BYTES)
        for size_N, piece_P2 in _windows(tokens, length + 1):
            documents, cut = documents + len(size_N), cut + int((size_N > length + 1).sum())
            order, counts = pack(piece_P2[:, 1], length + 1)
            file.write(piece_P2[order].astype("<i8").tobytes())
            targets += _targets(tokens, piece_P2[order], np.cumsum(counts) - counts)
            ends.write((pieces + np.cumsum(counts)).astype("<i8").tobytes())
            pieces, sequences, used = pieces + len(order), sequences + len(counts), used + int(piece_P2[:, 1].sum())
        if not sequences:
            raise DataError(f"{tokens.path} holds no document to pack")
        ends.seek(0)
        shutil.copyfileobj(ends, file)
        file.seek(_HEADER_BYTES)
        facts = PackingFacts(tokens.checksum, length, pieces, sequences, used, targets, documents, cut, _crc(file))
        file.seek(0)
        file.write(json.dumps(asdict(facts)).encode().ljust(_HEADER_BYTES))
    return facts


def _targets(tokens: TokenFile, piece_P2: Pieces, begin_n: Indices) -> int:
    """Return the number of targets in sequences whose pieces begin at `begin_n`; the first id of a sequence is none."""
    if tokens.ids.dtype.kind != "i":
        return int(piece_P2[:, 1].sum()) - len(begin_n)
    whole = sum(int((tokens.ids[first : first + size] >= 0).sum()) for first, size in piece_P2.tolist())
    return whole - int((tokens.ids[piece_P2[begin_n, 0]] >= 0).sum())


def _crc(file: BinaryIO) -> int:
    """Return the CRC-32 of the rest of a file."""
    crc = 0
    while chunk := file.read(_CHUNK):
        crc = zlib.crc32(chunk, crc)
    return crc


def pack(size_P: Indices, capacity: int) -> tuple[Indices, Indices]:
    """Pack pieces into bins by best-fit-decreasing.

    Args:
        size_P: sizes of the pieces, at most `capacity`.

    Returns:
        The pieces in the order of their bins [p], and the number of pieces of each bin [n].
    """
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set if a bin has room for r more
    for piece in np.argsort(-size_P, kind="stable").tolist():
        size = int(size_P[piece])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            bins[chosen].append(piece)
        else:
            room, chosen = capacity, len(bins)
            bins.append([piece])
        if left := room - size:
            by_room[left].append(chosen)
            rooms |= 1 << left
    return np.array([piece for one in bins for piece in one], np.int64), np.array([len(one) for one in bins], np.int64)


def _windows(tokens: TokenFile, capacity: int) -> Iterator[tuple[Indices, Pieces]]:
    """Yield the sizes of documents [N], their ends included, and their pieces [p, 2], about `WINDOW` at a time."""
    firsts: list[Indices] = []
    sizes: list[Indices] = []
    held = 0
    for first_N, size_N in tokens.documents():
        firsts.append(first_N)
        sizes.append(size_N)
        held += int((1 + size_N // capacity).sum())
        if held >= WINDOW:
            yield np.concatenate(sizes), _pieces(np.concatenate(firsts), np.concatenate(sizes), capacity)
            firsts, sizes, held = [], [], 0
    if held:
        yield np.concatenate(sizes), _pieces(np.concatenate(firsts), np.concatenate(sizes), capacity)


def _pieces(first_N: Indices, size_N: Indices, capacity: int) -> Pieces:
    """Cut documents into pieces of at most `capacity` ids, each starting at the last id of the one before, [p, 2]."""
    step = capacity - 1
    count_N = np.maximum(1, -(-(size_N - 1) // step))
    document_P = np.repeat(np.arange(len(first_N)), count_N)
    number_P = np.arange(len(document_P)) - np.repeat(np.cumsum(count_N) - count_N, count_N)
    size_P = np.minimum(capacity, size_N[document_P] - number_P * step)
    return np.stack([first_N[document_P] + number_P * step, size_P], axis=1)
