"""Text of a perplexity: WikiText's validation or test split, from files or from the hub."""

from dataclasses import dataclass
from itertools import tee
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_dist.config.text_formats import SUFFIXES
from moe_dist.data import Tokenizer
from moe_dist.data.files import FileSource, match_files
from moe_dist.data.hub import HubSource
from moe_dist.errors import DataError

HUB_NAME, HUB_SUBSET, COLUMN = "Salesforce/wikitext", "wikitext-103-raw-v1", "text"
NAMES = {"validation": ("validation", "valid"), "test": ("test",), "train": ("train",)}


@dataclass(frozen=True)
class EncodedText:
    """A text as tokens, and its units.

    Attributes:
        ids: token numbers, int64, with an end-of-document token before the first document and after each.
        words: runs of characters other than white space.
        lines: line ends.
        bytes: length in UTF-8.
    """

    ids: npt.NDArray[np.int64]
    documents: int
    words: int
    lines: int
    bytes: int
    source: str


def open_text(path: Path | None, split: str, subset: str = HUB_SUBSET) -> FileSource | HubSource:
    """Open the text of a split.

    Args:
        path: a file, or a folder that holds the split under one of WikiText's names (`validation.txt`,
            `wiki.valid.tokens`, `test.jsonl`, ...); None: the hub.

    Raises:
        DataError: no file or several files match, or the format is not supported.
    """
    if path is None:
        return HubSource(HUB_NAME, subset, split, COLUMN, "--split", "", "--text with a local file or folder")
    if path.is_file():
        return FileSource(match_files("--text", (str(path),)), COLUMN)
    if not path.is_dir():
        raise DataError(f"--text {path}: no such file or folder")
    known = {f"{prefix}{name}{suffix}" for prefix in ("", "wiki.") for name in NAMES[split] for suffix in SUFFIXES}
    found = sorted(file for file in path.iterdir() if file.name in known)
    if len(found) != 1:
        what = f"holds {', '.join(file.name for file in found)}" if found else f"holds no {split} split"
        raise DataError(f"--text {path}: {what}: give one file, such as {path}/{NAMES[split][0]}.txt")
    return FileSource((found[0],), COLUMN)


def encode_text(source: FileSource | HubSource, tokenizer: Tokenizer) -> EncodedText:
    """Read and encode a whole text.

    Raises:
        DataError: it cannot be read or holds no words.
    """
    to_count, to_encode = tee(text for text in source.texts() if text)
    end = tokenizer.end_of_document
    ids, documents, words, lines, size = [end], 0, 0, 0, 0
    for text, tokens in zip(to_count, tokenizer.encode_all(to_encode), strict=True):
        ids += [*tokens, end]
        documents += 1
        words += len(text.split())
        lines += text.count("\n")
        size += len(text.encode())
    if not words:
        raise DataError(f"{_name(source)} holds no words: nothing to evaluate")
    return EncodedText(np.array(ids, dtype=np.int64), documents, words, lines, size, _name(source))


def _name(source: FileSource | HubSource) -> str:
    return f"{source.name}, {source.subset}, {source.split}" if isinstance(source, HubSource) else source.files[0].name
