"""Documents: units of text that are held out, sampled and separated by an end-of-document token."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice, pairwise
from typing import NamedTuple

SECTION_CHARACTERS = 16_384
PARTS, SHORTEST_PART = 10, 100
"""Documents that a single document is divided into, about, so that some can be held out; and characters of one."""
_LONGEST_ARTICLE = 1 << 24
_CHUNK = 1 << 22
_ROWS_TO_RECOGNIZE = 100

# A WikiText article starts at ` = Title = ` between blank lines; sections (` = = Name = = `) and table legends such as
# ` = Played , W = ` lack one of the two. WikiText-2 splits into its official 600 and 60 articles this way.
_TITLE = re.compile(r" = [^=\n]+ = ?")
_LINE_END = re.compile(r"\n")
_SENTENCE_END = re.compile(r"[.!?\u2026][\"'\u2019\u201d)\]]*\s|[\u3002\uff01\uff1f]")
_WORD_END = re.compile(r"\s")
_TITLE_LINE = re.compile(rf"\n({_TITLE.pattern}\n)(?= ?\n)")  # begins with plain characters, which `re` finds quickly


class Document(NamedTuple):
    """Text, and the SHA-256 digest of all of it (also if `limit_bytes` truncated `text`)."""

    text: str
    digest: bytes

    @property
    def key(self) -> int:
        """First 8 bytes of the digest as a number, which orders documents as digests do."""
        return int.from_bytes(self.digest[:8])


def as_documents(texts: Iterable[str]) -> Iterator[Document]:
    """Yield a document for each text that holds more than white space; lone surrogates (valid in JSON) become `?`."""
    for text in texts:
        if text.strip():
            data = text.encode("utf-8", "replace")
            yield Document(data.decode(), hashlib.sha256(data).digest())


def in_parts(documents: Iterable[Document]) -> Iterator[Document]:
    """Yield documents; if there is only one, yield its parts, which end where sections do."""
    documents = iter(documents)
    first = list(islice(documents, 2))
    if len(first) == 1:
        text = first[0].text
        first = list(as_documents(_sections([text], max(SHORTEST_PART, len(text) // PARTS))))
    yield from chain(first, documents)


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
    """Split a text in memory into documents, as `split_stream` does."""
    return split_stream([text])


def split_stream(chunks: Iterable[str]) -> Iterator[str]:
    """Split a text into documents: WikiText articles if it has their titles, else sections of about 16 KiB.

    Nothing is lost: the documents joined are the text. A section ends at the first blank line after 16 KiB. If the next
    48 KiB have none, it ends at a line end after 16 KiB, else at the end of a sentence or word, else at 32 KiB. Titles
    are looked for in the first 4 MiB; an article ends after 16 MiB at the latest.

    Args:
        chunks: pieces of the text, cut anywhere; about two of them are in memory at a time.
    """
    chunks = _coalesced(chunks)
    head = next(chunks, "")
    split = _articles if any(True for _ in _article_starts(head)) else _sections
    yield from split(chain([head], chunks))


def _coalesced(chunks: Iterable[str]) -> Iterator[str]:
    """Yield pieces of at least `_CHUNK` characters, but for the last one."""
    pieces, size = [], 0
    for chunk in chunks:
        pieces.append(chunk)
        size += len(chunk)
        if size >= _CHUNK:
            yield "".join(pieces)
            pieces, size = [], 0
    if pieces:
        yield "".join(pieces)


def _articles(chunks: Iterable[str]) -> Iterator[str]:
    text = ""
    for chunk in chunks:
        text += chunk
        starts = [0, *(start for start in _article_starts(text) if start)]
        for start, end in pairwise(starts):
            yield text[start:end]
        text = text[starts[-1] :]
        if len(text) > _LONGEST_ARTICLE:
            end = text.rfind("\n", 0, -_CHUNK // 2) + 1 or len(text)
            yield text[:end]
            text = text[end:]
    if text:
        yield text


def _article_starts(text: str) -> Iterator[int]:
    """Yield the places of titles between blank lines; the blank line after a title is not that before the next."""
    before = "\n\n"  # the start of a text is as good as a blank line
    text, end = before + text, 0
    for title in _TITLE_LINE.finditer(text):
        blank = title.start() - 1 - (text[title.start() - 1] == " ")
        if text[blank] == "\n" and blank >= end:
            yield title.start(1) - len(before)
            end = text.index("\n", title.end()) + 1


def split_rows(rows: Iterable[str]) -> Iterator[str]:
    """Yield the documents of a table's text column: one per row, or articles joined from WikiText's rows of lines."""
    rows = iter(rows)
    first = list(islice(rows, _ROWS_TO_RECOGNIZE))
    rows = chain(first, rows)
    if any(_TITLE.fullmatch(row.rstrip("\n")) for row in first):
        yield from split_stream(row if row.endswith("\n") else row + "\n" for row in rows)
    else:
        yield from rows


def _sections(chunks: Iterable[str], size: int = SECTION_CHARACTERS) -> Iterator[str]:
    text, start = "", 0
    for chunk in chunks:
        text, start = text[start:] + chunk, 0
        while len(text) - start > 4 * size + 1:  # enough that what follows cannot change the section's end
            end = _section_end(text, start, size)
            yield text[start:end]
            start = end
    while start < len(text):
        end = _section_end(text, start, size)
        yield text[start:end]
        start = end


def _section_end(text: str, start: int, size: int) -> int:
    first, last = start + size, start + 2 * size
    if first >= len(text):
        return len(text)
    blank_line = text.find("\n\n", first, start + 4 * size)
    if blank_line >= 0:
        return blank_line + 2
    for end in (_LINE_END, _SENTENCE_END, _WORD_END):
        if match := end.search(text, first, last):
            return match.end()
    return min(last, len(text))
