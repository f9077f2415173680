"""Checks of a prepared folder: files against their manifest, ids against the vocabulary, documents, duplicates.

Shapes: N documents.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import xxhash

from moe_dist.data.near_duplicates import near_duplicates
from moe_dist.data.packing import PackedSequences, read_facts
from moe_dist.data.plan import digest_of_file
from moe_dist.data.prepare import open_finished
from moe_dist.data.token_file import TokenFile
from moe_dist.errors import DataError

GIANT = 1 << 20
"""Tokens of a document above which it is reported."""
_RUN = 1 << 24

Digests = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Finding:
    """Result of one check; `warn` is worth a look, `fail` means that the folder cannot be trained on."""

    level: Literal["ok", "warn", "fail"]
    text: str


def prepared_folders(path: Path) -> list[Path]:
    """Return the prepared folders that a path names: itself, or all of a `corpus.cache_dir`.

    Raises:
        DataError: there is none.
    """
    if (path / "manifest.json").exists() or path.parent.name == "prepared":
        return [path]
    found = sorted(folder for folder in (path / "prepared").glob("*") if folder.is_dir())
    if not found:
        raise DataError(f"{path} is no prepared folder: give a corpus.cache_dir, or the folder that data prepare names")
    return found


def check_folder(folder: Path, near: bool) -> Iterator[Finding]:
    """Yield the findings of a folder.

    Args:
        near: also look for near-duplicates across the split, which takes milliseconds a document.
    """
    try:
        source = open_finished(folder)
    except (DataError, OSError, ValueError, KeyError, TypeError) as error:
        unreadable = "its manifest cannot be read, or is missing"
        yield Finding("fail", str(error) if isinstance(error, DataError) else f"{folder}: {unreadable}")
        return
    yield Finding("ok", "sizes and checksums are those of the manifest")
    sides = (source.train, source.validation)
    for tokens in sides:
        yield from _check_ids(tokens)
        yield from _check_documents(tokens)
        for index in sorted(folder.glob(f"{tokens.path.stem}.packing-*[0-9]")):
            yield _check_packing(tokens, index)
    yield from _check_duplicates(*map(_digests, sides))
    if near:
        held = (_words(ids) for _, ids in _documents(source.validation))
        count = sum(1 for _ in near_duplicates(held, lambda: ((n, _words(i)) for n, i in _documents(source.train))))
        yield _counted(count, "training documents are near-duplicates of validation documents")


def check_across(folders: Sequence[Path]) -> Iterator[tuple[str, Finding]]:
    """Yield what documents folders with the same tokenizer share, such as the sources of a blend, by their names.

    Folders that cannot be opened are left out.
    """
    digests: dict[str, dict[Path, tuple[Digests, Digests]]] = {}
    for folder in folders:
        with suppress(DataError, OSError, ValueError, KeyError, TypeError):
            source = open_finished(folder)
            of_tokenizer = digests.setdefault(digest_of_file(source.tokenizer_path), {})
            of_tokenizer[folder] = (_digests(source.train), _digests(source.validation))
    for of_tokenizer in digests.values():
        for one, other in permutations(of_tokenizer, 2):
            (train, _), (others, held) = of_tokenizer[one], of_tokenizer[other]
            names = f"{one.name}, {other.name}"
            leaked = int(np.isin(train, held).sum())
            yield names, _counted(leaked, "training documents of the first are validation documents of the second")
            if one < other:
                shared = int(np.isin(train, others).sum())
                yield names, _counted(shared, "training documents of the first are training documents of both")


def _check_ids(tokens: TokenFile) -> Iterator[Finding]:
    name, rows, largest = tokens.path.name, tokens.facts.vocab_size, 0
    for start in range(0, len(tokens), _RUN):
        largest = max(largest, int(tokens.plain(start, start + _RUN).max()))
    level: Literal["ok", "fail"] = "ok" if largest < rows else "fail"
    yield Finding(level, f"{name}: largest id {largest} of a vocabulary of {rows}")
    if int(tokens.plain(len(tokens) - 1, len(tokens))[0]) != tokens.facts.end_of_document:
        yield Finding("fail", f"{name}: the last token does not end a document")


def _check_documents(tokens: TokenFile) -> Iterator[Finding]:
    name, documents, empty, giant, longest = tokens.path.name, 0, 0, 0, 0
    for _, size_N in tokens.documents():
        documents, empty = documents + len(size_N), empty + int((size_N == 1).sum())
        giant += int((size_N > GIANT).sum())
        longest = max(longest, int(size_N.max()))
    if documents < tokens.facts.documents:  # texts may hold the end-of-document token themselves
        yield Finding("fail", f"{name}: {documents} documents end, the header says {tokens.facts.documents}")
    else:
        yield Finding("ok", f"{name}: {documents} documents, the longest of {longest} tokens")
    yield _counted(empty, f"documents of {name} are empty")
    yield _counted(giant, f"documents of {name} have more than {GIANT} tokens")


def _check_packing(tokens: TokenFile, index: Path) -> Finding:
    length = int(index.name.rpartition("-")[2])
    if read_facts(index, tokens, length) is None:
        return Finding("warn", f"{index.name}: damaged or of other tokens, and will be made again")
    used = PackedSequences(tokens, length).facts
    return Finding("ok", f"{index.name}: {used.sequences} sequences, {used.padding:.2%} padding")


def _check_duplicates(train_N: Digests, held_N: Digests) -> Iterator[Finding]:
    yield _counted(len(train_N) - len(np.unique(train_N)), "training documents repeat another")
    yield _counted(int(np.isin(train_N, held_N).sum()), "training documents are validation documents too")


def _digests(tokens: TokenFile) -> Digests:
    """Return a hash of each document that is not empty, [N]."""
    hashes = (xxhash.xxh3_64_intdigest(ids.tobytes()) for _, ids in _documents(tokens) if len(ids))
    return np.fromiter(hashes, np.uint64)


def _documents(tokens: TokenFile) -> Iterator[tuple[int, npt.NDArray[np.integer]]]:
    """Yield the number and the ids of each document, without its end."""
    number = 0
    for first_N, size_N in tokens.documents():
        for first, size in zip(first_N.tolist(), size_N.tolist(), strict=True):
            yield number, tokens.plain(first, first + size - 1)
            number += 1


def _words(ids: npt.NDArray[np.integer]) -> list[str]:
    return list(map(str, ids.tolist()))


def _counted(count: int, text: str) -> Finding:
    return Finding("warn" if count else "ok", f"{count} {text}")
