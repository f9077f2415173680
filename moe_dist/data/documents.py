"""Documents: the units that are held out, sampled and separated by an end-of-document token."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import NamedTuple

from moe_dist.errors import DataError

SECTION_CHARACTERS = 16_384
_LONGEST_SECTION = 4 * SECTION_CHARACTERS
_ROWS_TO_RECOGNISE = 100

# A WikiText article starts at ` = Title = ` between blank lines; sections (` = = Name = = `) and table legends such as
# ` = Played , W = ` lack one of the two. WikiText-2 splits into its official 600 and 60 articles this way.
_TITLE = re.compile(r" = [^=\n]+ = ?")
_ARTICLE = re.compile(rf"(?:\A|(?:\A|\n) ?\n)({_TITLE.pattern}\n) ?\n")


class Document(NamedTuple):
    """A text and the SHA-256 digest of the whole of it (also when `text` was cut short by `limit_bytes`)."""

    text: str
    digest: bytes


def as_documents(texts: Iterable[str]) -> Iterator[Document]:
    """Digests each text that holds more than white space; lone surrogates (JSON may hold them) become `?`."""
    for text in texts:
        if text.strip():
            data = text.encode("utf-8", "replace")
            yield Document(data.decode(), hashlib.sha256(data).digest())


def limit_bytes(documents: Iterable[Document], max_bytes: int | None) -> Iterator[Document]:
    """The first `max_bytes` bytes (UTF-8) of the documents in their order; the last one is cut, at a character."""
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


def split_text(text: str) -> Iterator[str]:
    """Cuts a text file into documents: WikiText articles if it has their titles, else sections of about 16 KiB.

    Nothing is lost: the documents joined are the text. Sections end at a blank line, or in a text without any, at a
    line end; a shorter text is one document.
    """
    starts = [match.start(1) for match in _ARTICLE.finditer(text)]
    if not starts:
        yield from _sections(text)
        return
    for start, end in zip([0, *starts], [*starts, len(text)], strict=True):
        if start < end:
            yield text[start:end]


def split_rows(rows: Iterable[str]) -> Iterator[str]:
    """Documents of a table's text column: each row is one, but WikiText's rows are lines, joined to articles."""
    rows = iter(rows)
    first = list(islice(rows, _ROWS_TO_RECOGNISE))
    rows = chain(first, rows)
    if any(_TITLE.fullmatch(row.rstrip("\n")) for row in first):
        yield from split_text("".join(row if row.endswith("\n") else row + "\n" for row in rows))
    else:
        yield from rows


def _sections(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        longest = start + _LONGEST_SECTION
        end = (
            _end_of(text, "\n\n", start + SECTION_CHARACTERS, longest)
            or _end_of(text, "\n", longest, len(text))
            or len(text)
        )
        yield text[start:end]
        start = end


def _end_of(text: str, mark: str, start: int, stop: int) -> int:
    """Where the first `mark` in text[start:stop] ends; 0 if there is none."""
    found = text.find(mark, start, stop)
    return found + len(mark) if found >= 0 else 0


class HeldOutSplit(NamedTuple):
    """Documents to train on and documents held out; no digest is on both sides."""

    train: list[Document]
    validation: list[Document]


def hold_out(documents: list[Document], fraction: float) -> HeldOutSplit:
    """Holds out about `fraction` of the distinct documents (at least one): those of the lowest digests.

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
    """Removes from the training documents every exact duplicate of a given validation document."""
    held = {document.digest for document in validation}
    return HeldOutSplit([document for document in documents if document.digest not in held], validation)
