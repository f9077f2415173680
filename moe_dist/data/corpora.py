"""From `corpus.*` keys to documents to train on and documents held out."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from moe_dist.config import CorpusConfig
from moe_dist.data.documents import Document, HeldOutSplit, as_documents, drop_held_out, hold_out, limit_bytes
from moe_dist.data.files import FileSource, match_files, stdlib_source
from moe_dist.data.hub import HubSource
from moe_dist.errors import DataError


class Source(Protocol):
    """Where texts come from; `fingerprint` is much cheaper than reading them, and tells whether they changed."""

    def fingerprint(self) -> str:
        """A text that changes when the texts, or the way they are read, may have changed."""

    def texts(self) -> Iterator[str]:
        """Reads every text, in the same order each time.

        Raises:
            DataError: it cannot be read.
        """

    def __str__(self) -> str: ...


@dataclass(frozen=True)
class Corpus:
    """The training source, and the validation source if it is one of its own."""

    config: CorpusConfig
    train: Source
    validation: Source | None

    def identity(self) -> dict[str, object]:
        """All that the documents depend on, as JSON values; two corpora of one identity have the same documents."""
        return {
            "kind": self.config.kind,
            "train": self.train.fingerprint(),
            "validation": self.validation.fingerprint() if self.validation else self.config.validation_fraction,
            "max_bytes": self.config.max_bytes,
        }

    def documents(self) -> HeldOutSplit:
        """Reads everything; `corpus.max_bytes` limits each source.

        Raises:
            DataError: a source cannot be read, or one of the two sides is left without text.
        """
        train = self._read(self.train)
        if not self.validation:
            return hold_out(train, self.config.validation_fraction)
        split = drop_held_out(train, self._read(self.validation))
        if not split.train:
            raise DataError(f"{self.train} holds only documents that {self.validation} holds, too: nothing to train on")
        return split

    def _read(self, source: Source) -> list[Document]:
        documents = list(limit_bytes(as_documents(source.texts()), self.config.max_bytes))
        if not documents:
            raise DataError(f"{source} holds no text")
        return documents


def open_corpus(config: CorpusConfig) -> Corpus:
    """Finds the sources without reading them.

    Raises:
        DataError: no file matches.
    """
    if config.kind == "stdlib":
        return Corpus(config, stdlib_source(), None)
    if config.kind == "hub":
        return _hub_corpus(config)
    train = match_files("corpus.paths", config.paths)
    if not config.validation_paths:
        return Corpus(config, FileSource(train, config.text_column), None)
    held = match_files("corpus.validation_paths", config.validation_paths)
    # a glob such as data/*.txt may well take in the validation file, too
    train = tuple(path for path in train if path not in held)
    if not train:
        raise DataError("corpus.paths names only files that corpus.validation_paths names, too: nothing to train on")
    return Corpus(config, FileSource(train, config.text_column), FileSource(held, config.text_column))


def _hub_corpus(config: CorpusConfig) -> Corpus:
    name = config.name or ""
    train = HubSource(name, config.subset, config.split, config.text_column)
    if config.validation_split is None:
        return Corpus(config, train, None)
    held = HubSource(name, config.subset, config.validation_split, config.text_column, "corpus.validation_split")
    return Corpus(config, train, held)
