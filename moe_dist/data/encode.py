"""Encoding of a corpus into token files, in one pass, with progress that survives a kill.

Every `FLUSH_BYTES` of text the partial files are made durable and a journal records how far they go. After a kill at
most that much text is encoded again, and the files are the same bytes.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice, tee
from pathlib import Path
from typing import Any

from moe_dist.data.cache import atomic_write
from moe_dist.data.documents import Document
from moe_dist.data.split import TRAIN, VALIDATION, Split
from moe_dist.data.token_file import Encoder, TokenFileWriter

logger = logging.getLogger(__name__)

JOURNAL = "progress.json"
FLUSH_BYTES = 64 << 20
REPORT_SECONDS = 10.0

Progress = Callable[[int, int], None]
"""Function of the bytes of text that are done, and of all."""


def encode_split(
    split: Split, tokenizer: Encoder, folder: Path, rows: int | None, identity: str, progress: Progress | None = None
) -> dict[str, int]:
    """Write `train.tokens` and `validation.tokens`, and return their checksums by side.

    Args:
        rows: rows of the model's embedding; None: as many as the tokenizer has ids.
        identity: digest of the tokenizer; a journal of another one is ignored.
        progress: called about once per batch of documents; None: a line of the log every `REPORT_SECONDS`.
    """
    journal, total = folder / JOURNAL, int(split.survey.sizes.sum())
    done = _read_journal(journal)
    if done.get("identity") != identity:
        done = {}
    text_of = getattr(tokenizer, "text_of", lambda text, ids: text)
    report = progress or _Log(done.get("bytes", 0))
    writers = _open_writers(folder, tokenizer, rows, done)
    documents, size, flushed = done.get("documents", 0), done.get("bytes", 0), done.get("bytes", 0)
    try:
        for (side, document), ids in _encoded(islice(split.documents(), documents, None), tokenizer):
            writers[side].append(text_of(document.text, ids), ids)
            documents, size = documents + 1, size + len(document.text.encode())
            report(size, max(size, total))
            if size - flushed >= FLUSH_BYTES:
                parts = {name: writer.flush() for name, writer in writers.items()}
                state = {"identity": identity, "documents": documents, "bytes": size, "parts": parts}
                with atomic_write(journal) as path:
                    path.write_text(json.dumps(state))
                flushed = size
        checksums = {name: writer.finish() for name, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.close()
    journal.unlink(missing_ok=True)
    return checksums


def interrupted_identity(folder: Path) -> str | None:
    """Return the `identity` of the encoding that was interrupted in a folder; None: there is none."""
    return _read_journal(folder / JOURNAL).get("identity")


def _encoded(
    documents: Iterator[tuple[str, Document]], tokenizer: Encoder
) -> Iterator[tuple[tuple[str, Document], list[int]]]:
    """Yield each document with its side and its token ids; batches of documents are encoded on all cores."""
    to_write, to_encode = tee(documents)
    return zip(to_write, tokenizer.encode_all(document.text for _, document in to_encode), strict=True)


def _read_journal(journal: Path) -> dict[str, Any]:
    """Return the state of an interrupted encoding; empty: there is none, or it is damaged."""
    try:
        state: dict[str, Any] = json.loads(journal.read_text(encoding="utf-8"))
        usable = isinstance(state["identity"], str) and state["bytes"] >= 0 and state["documents"] >= 0
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return state if usable else {}


def _open_writers(
    folder: Path, tokenizer: Encoder, rows: int | None, done: dict[str, Any]
) -> Mapping[str, TokenFileWriter]:
    """Return the writer of each side; if an interrupted encoding cannot go on, `done` is emptied."""
    paths = {side: folder / f"{side}.tokens" for side in (TRAIN, VALIDATION)}
    if done:
        try:
            return {side: TokenFileWriter(path, tokenizer, rows, done["parts"][side]) for side, path in paths.items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is encoded from its start: %s", folder, error)
            done.clear()
    return {side: TokenFileWriter(path, tokenizer, rows) for side, path in paths.items()}


class _Log:
    """Progress as lines of the log."""

    def __init__(self, done: int) -> None:
        self._first, self._started = done, time.monotonic()
        self._next = self._started + REPORT_SECONDS

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + REPORT_SECONDS
        rate = (done - self._first) / (now - self._started)
        left = (total - done) / rate if rate else float("inf")
        logger.info(
            "encoded %.0f %% of %.1f MB, %.1f MB/s, %.0f s left", 100 * done / total, total / 1e6, rate / 1e6, left
        )
