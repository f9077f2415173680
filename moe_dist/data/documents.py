"""Documents: units of text that are held out, sampled and separated by an end-of-document token."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import NamedTuple

from moe_dist.errors import DataError

SECTION_CHARACTERS = 16_384
_LONGEST_SECTION = 4 * SECTION_CHARACTERS
_ROWS_TO_RECOGNIZE = 100

# A WikiText article starts at ` = Title = ` between blank lines; sections (` = = Name = = `) and table legends such as
# ` = Played , W = ` lack one of the two. WikiText-2 splits into its official 600 and 60 articles this way.
_TITLE = re.compile(r" = [^=\n]+ = ?")
_LINE_END = re.compile(r"\n")
_SENTENCE_END = re.compile(r"[.!?\u2026][\"'\u2019\u201d)\]]*\s|[\u3002\uff01\uff1f]")
_WORD_END = re.compile(r"\s")
_ARTICLE = re.compile(rf"(?:\A|(?:\A|\n) ?\n)({_TITLE.pattern}\n) ?\n")


class Document(NamedTuple):
    """Text, and the SHA-256 digest of all of it (also if `limit_bytes` truncated `text`)."""

    text: str
    digest: bytes


def as_documents(texts: Iterable[str]) -> Iterator[Document]:
    """Yield a document for each text that holds more than white space; lone surrogates (valid in JSON) become `?`."""
    for text in texts:
        if text.strip():
            data = text.encode("utf-8", "replace")
            yield Document(data.decode(), hashlib.sha256(data).digest())


def limit_bytes(documents: Iterable[Document], max_bytes: int | None) -> Iterator[Document]:
    """Yield the first `max_bytes` bytes (UTF-8) of the documents; the last one is truncated at a character."""
    left = max_bytes
    for document in documents:
        if left is None:
            yield document
            continue
        data = document.text.encode()
        if len(data) >= left:
            text = data[:left].decode("utf-8", "ignore")
            if text:
                yield Document(text, document.digest)
            return
        left -= len(data)
        yield document


def normalize_lines(text: str) -> str:
    """Return the text with LF line ends (instead of CRLF or CR) and without a byte-order mark at its start."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def split_text(text: str) -> Iterator[str]:
    """Split a text file into documents: WikiText articles if it has their titles, else sections of about 16 KiB.

    Nothing is lost: the documents joined are the text. A section ends at the first blank line after 16 KiB. If the next
    48 KiB have none, it ends at a line end after 16 KiB, else at the end of a sentence or word, else at 32 KiB.
    """
    starts = [match.start(1) for match in _ARTICLE.finditer(text)]
    if not starts:
        yield from _sections(text)
        return
    for start, end in zip([0, *starts], [*starts, len(text)], strict=True):
        if start < end:
            yield text[start:end]


def split_rows(rows: Iterable[str]) -> Iterator[str]:
    """Yield the documents of a table's text column: one per row, or articles joined from WikiText's rows of lines."""
    rows = iter(rows)
    first = list(islice(rows, _ROWS_TO_RECOGNIZE))
    rows = chain(first, rows)
    if any(_TITLE.fullmatch(row.rstrip("\n")) for row in first):
        yield from split_text("".join(row if row.endswith("\n") else row + "\n" for row in rows))
    else:
        yield from rows


def _sections(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = _section_end(text, start)
        yield text[start:end]
        start = end


def _section_end(text: str, start: int) -> int:
    first, last = start + SECTION_CHARACTERS, start + 2 * SECTION_CHARACTERS
    if first >= len(text):
        return len(text)
    blank_line = text.find("\n\n", first, start + _LONGEST_SECTION)
    if blank_line >= 0:
        return blank_line + 2
    for end in (_LINE_END, _SENTENCE_END, _WORD_END):
        if match := end.search(text, first, last):
            return match.end()
    return min(last, len(text))


class HeldOutSplit(NamedTuple):
    """Training and held-out documents; no digest is on both sides."""

    train: list[Document]
    validation: list[Document]


def hold_out(documents: list[Document], fraction: float) -> HeldOutSplit:
    """Hold out about `fraction` of the distinct documents (at least one): those with the lowest digests.

    The choice depends on content alone, not on order or file names; duplicates share a digest and so stay together.

    Raises:
        DataError: there are fewer than two distinct documents.
    """
    digests = sorted({document.digest for document in documents})
    if len(digests) < 2:
        raise DataError(
            f"the corpus is {len(digests)} distinct document(s), of which none can be held out: give more text, or "
            "corpus.validation_paths (text) or corpus.validation_split (hub)"
        )
    held = set(digests[: min(max(round(fraction * len(digests)), 1), len(digests) - 1)])
    validation = [document for document in documents if document.digest in held]
    return HeldOutSplit([document for document in documents if document.digest not in held], validation)


def drop_held_out(documents: Iterable[Document], validation: list[Document]) -> HeldOutSplit:
    """Remove exact duplicates of validation documents from the training documents."""
    held = {document.digest for document in validation}
    return HeldOutSplit([document for document in documents if document.digest not in held], validation)
