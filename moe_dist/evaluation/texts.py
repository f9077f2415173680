"""Text of a perplexity: WikiText's validation or test split, from files or from the hub, or a run's held-out text."""

from dataclasses import dataclass
from itertools import tee
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_dist.checkpoint.manifest import DataRecord
from moe_dist.config import RunConfig
from moe_dist.config.text_formats import SUFFIXES
from moe_dist.data import Tokenizer, prepare_data
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


def held_out_text(config: RunConfig, trained: DataRecord) -> EncodedText:
    """Return the validation text of a run, of all sources of a blend, from the cache or prepared again.

    Raises:
        DataError: it cannot be read, or is another one than in training.
    """
    data = prepare_data(config.corpus, config.tokenizer)
    if data.checksum("validation") != trained.validation_checksum:
        raise DataError("the run's text has changed since it was trained: give a file with --text")
    files = [source.validation for source in data.sources.values()]
    facts = [file.facts for file in files]
    documents, words, lines, size = (
        sum(getattr(one, name) for one in facts) for name in ("documents", "words", "lines", "bytes")
    )
    ids = np.concatenate([[data.end_of_document], *(file.plain_ids for file in files)]).astype(np.int64)
    return EncodedText(ids, documents, words, lines, size, f"the held-out text of corpus.kind={config.corpus.kind}")


def _name(source: FileSource | HubSource) -> str:
    return f"{source.name}, {source.subset}, {source.split}" if isinstance(source, HubSource) else source.files[0].name
