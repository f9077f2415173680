"""Encoding of a corpus into token files, in pieces that machines share.

A piece is a run of documents of about `PIECE_BYTES` of text. Every machine reads all documents in order and encodes the
pieces that are neither written nor locked by another; the last one joins them. A killed process loses its lock, and so
at most a piece's work; the joined files are the same bytes, whoever encoded which piece:

    pieces/<number>.train.tokens  <number>.validation.tokens  <number>.json (written last)  <number>.lock
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby, tee
from pathlib import Path

from moe_dist.data.cache import atomic_write, exclusive
from moe_dist.data.documents import Document
from moe_dist.data.split import TRAIN, VALIDATION, Split
from moe_dist.data.token_file import Encoder, TokenFile, open_token_file, token_file_writer
from moe_dist.errors import DataError

logger = logging.getLogger(__name__)

PIECE_BYTES = 64 << 20
REPORT_SECONDS = 10.0

Documents = Iterator[tuple[str, Document]]
Progress = Callable[[int, int], None]
"""Function of the bytes of text that are done, and of all."""


@dataclass
class PieceEncoder:
    """Encoder of the pieces of a corpus that no other machine encodes.

    Attributes:
        folder: folder of the pieces, which all machines see.
        rows: rows of the model's embedding; None: as many as the tokenizer has ids.
        tokenizer: digest of the tokenizer; pieces of another one are encoded again.
        finished: file that is there once another machine has joined the pieces.
    """

    split: Split
    encoder: Encoder
    folder: Path
    rows: int | None
    tokenizer: str
    finished: Path
    progress: Progress = field(default_factory=lambda: _Log())

    def encode_all(self) -> Sequence[int]:
        """Return the numbers of all pieces once they are written, by this machine or by others."""
        while True:
            numbers = self._encode_free()
            if self.finished.exists() or not (missing := [one for one in numbers if self._piece(one) is None]):
                return numbers
            for number in missing:
                with exclusive(self._path(number, "lock")):  # until its machine has written it, or was killed
                    pass

    def join(self, numbers: Sequence[int], folder: Path) -> dict[str, int]:
        """Write `train.tokens` and `validation.tokens`, and return their checksums by side.

        Raises:
            DataError: a piece was damaged after it was written.
        """
        checksums = {}
        for side in (TRAIN, VALIDATION):
            with token_file_writer(folder / f"{side}.tokens", self.encoder, self.rows) as writer:
                for number in numbers:
                    if (piece := self._piece(number)) is None:
                        raise DataError(f"{self._path(number, 'json')} is damaged: prepare the corpus again")
                    if side in piece:
                        writer.extend(piece[side])
            checksums[side] = writer.checksum
        return checksums

    def _encode_free(self) -> list[int]:
        """Encode the pieces that are free, and return the numbers of all."""
        numbers, size = [], 0

        def piece_of(one: tuple[str, Document]) -> int:
            nonlocal size
            number = size // PIECE_BYTES
            size += len(one[1].text.encode())
            self.progress(size, max(size, self.split.size))
            return number

        for number, documents in groupby(self.split.documents(), piece_of):
            numbers.append(number)
            with exclusive(self._path(number, "lock"), wait=False) as free:
                if free and self._piece(number) is None:
                    if self.finished.exists():
                        break
                    self._encode(number, documents)
        return numbers

    def _encode(self, number: int, documents: Documents) -> None:
        to_write, to_encode = tee(documents)
        encoded = self.encoder.encode_all(document.text for _, document in to_encode)
        text_of = getattr(self.encoder, "text_of", lambda text, ids: text)
        with ExitStack() as files:
            writers = {
                side: files.enter_context(
                    token_file_writer(self._path(number, f"{side}.tokens"), self.encoder, self.rows)
                )
                for side in (TRAIN, VALIDATION)
            }
            for (side, document), ids in zip(to_write, encoded, strict=True):
                writers[side].append(text_of(document.text, ids), ids)
        checksums = {side: writer.checksum for side, writer in writers.items() if writer.facts.documents}
        with atomic_write(self._path(number, "json")) as path:
            path.write_text(json.dumps({"identity": self._identity, "checksums": checksums}))

    def _piece(self, number: int) -> Mapping[str, TokenFile] | None:
        """Return the token files of a piece by side; None: it is not written, damaged, or of another tokenizer."""
        try:
            state = json.loads(self._path(number, "json").read_text(encoding="utf-8"))
            wanted = state["checksums"]
            files = {side: open_token_file(self._path(number, f"{side}.tokens")) for side in wanted}
            intact = state["identity"] == self._identity and wanted == {s: file.checksum for s, file in files.items()}
        except FileNotFoundError:
            return None
        except (DataError, OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("piece %d in %s is encoded again: %s", number, self.folder, error)
            return None
        return files if intact else None

    @property
    def _identity(self) -> str:
        return f"{self.tokenizer} {PIECE_BYTES}"

    def _path(self, number: int, suffix: str) -> Path:
        return self.folder / f"{number:06d}.{suffix}"


class _Log:
    """Progress as lines of the log."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._next = self._started + REPORT_SECONDS

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + REPORT_SECONDS
        rate = done / (now - self._started)
        left = (total - done) / rate if rate else float("inf")
        logger.info(
            "encoded %.0f %% of %.1f MB, %.1f MB/s, %.0f s left", 100 * done / total, total / 1e6, rate / 1e6, left
        )
