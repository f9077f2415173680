"""Corpora: documents to train on and documents held out, from the `corpus.*` keys."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import numpy as np

from moe_dist.config.sections.data import SourceConfig
from moe_dist.config.text_formats import SUFFIXES, TOKEN_LISTS
from moe_dist.data import token_lists
from moe_dist.data.chats import ChatSource
from moe_dist.data.documents import Document, as_documents, in_parts, limit_bytes
from moe_dist.data.files import FileSource, match_files, stdlib_source
from moe_dist.data.hub import HubSource
from moe_dist.data.megatron_files import MegatronSource, match_prefixes
from moe_dist.data.split import Keys, Split, Survey, lowest_keys
from moe_dist.errors import DataError

logger = logging.getLogger(__name__)


class Source(Protocol):
    """Source of texts."""

    def fingerprint(self) -> str:
        """Return a text that changes with the texts or the way they are read; much cheaper than reading them."""

    def texts(self) -> Iterator[str]:
        """Read every text, in the same order each time.

        Raises:
            DataError: the source cannot be read.
        """

    def __str__(self) -> str: ...


@dataclass(frozen=True)
class Corpus:
    """Training source, and validation source if there is a separate one."""

    config: SourceConfig
    train: Source
    validation: Source | None

    def identity(self) -> dict[str, object]:
        """Return the inputs that decide the documents, as JSON values; an equal identity means equal documents."""
        return {
            "kind": self.config.kind,
            "train": self.train.fingerprint(),
            "validation": self.validation.fingerprint() if self.validation else self.config.validation_fraction,
            "max_bytes": self.config.max_bytes,
            **({"near_duplicates": "drop"} if self.config.near_duplicates == "drop" else {}),
        }

    @cached_property
    def split(self) -> Split:
        """Split after reading all documents once to decide which are held out; `max_bytes` limits each source.

        Raises:
            DataError: a source cannot be read, or no text is left for training or validation.
        """
        split = self._exact_split()
        if self.config.near_duplicates == "ignore":
            return split
        found, drop = split.near_duplicates(), self.config.near_duplicates == "drop"
        shown = "are dropped" if drop else "stay: corpus.near_duplicates=drop leaves them out"
        if drop and np.isin(split.survey.keys, np.concatenate([split.held_out, found])).all():
            raise DataError(f"{self.train} holds only near-duplicates of held-out documents: nothing to train on")
        logger.warning("%d training documents are nearly equal to held-out ones, and %s", len(found), shown)
        return replace(split, dropped=found) if drop else split

    def split_as(self, survey: Survey, held_out: Keys, dropped: Keys | None = None) -> Split:
        """Return the split that has been decided before, without reading a document."""
        held = None if self.validation is None else partial(self._read, self.validation)
        return Split(partial(self._read, self.train), held, survey, held_out, *(() if dropped is None else (dropped,)))

    def _exact_split(self) -> Split:
        survey = self._survey(self.train)
        if self.validation is None:
            return self.split_as(survey, lowest_keys(survey.keys, self.config.validation_fraction))
        held = np.unique(self._survey(self.validation).keys)
        if np.isin(survey.keys, held).all():
            raise DataError(f"{self.train} holds only documents that {self.validation} holds too: nothing to train on")
        return self.split_as(survey, held)

    def _survey(self, source: Source) -> Survey:
        survey = Survey.of(self._read(source))
        if not len(survey.keys):
            raise DataError(f"{source} holds no text")
        return survey

    def _read(self, source: Source) -> Iterator[Document]:
        documents = limit_bytes(as_documents(source.texts()), self.config.max_bytes)
        plain = self.config.kind not in ("chat", "megatron", "tokens")  # conversations and token lists have no parts
        return in_parts(documents) if plain and self.validation is None else documents


def open_corpus(config: SourceConfig, key: str = "corpus") -> Corpus:
    """Open the sources without reading them.

    Args:
        key: name of the configuration's section, for messages.

    Raises:
        DataError: a path matches no file.
    """
    if config.kind == "stdlib":
        return Corpus(config, stdlib_source(), None)
    if config.kind == "hub":
        return _hub_corpus(config, key)
    if config.kind == "megatron":
        pairs = match_prefixes(f"{key}.paths", config.paths)
        held_pairs = match_prefixes(f"{key}.validation_paths", config.validation_paths)
        return Corpus(config, MegatronSource(pairs), MegatronSource(held_pairs) if held_pairs else None)
    suffixes = TOKEN_LISTS if config.kind == "tokens" else SUFFIXES
    train = match_files(f"{key}.paths", config.paths, suffixes)
    source = _file_source(config)
    if not config.validation_paths:
        return Corpus(config, source(train), None)
    held = match_files(f"{key}.validation_paths", config.validation_paths, suffixes)
    # a glob such as data/*.txt may match the validation file too
    held_out = {path.resolve() for path in held}
    train = tuple(path for path in train if path.resolve() not in held_out)
    if not train:
        raise DataError(f"{key}.paths names only files that {key}.validation_paths names too: nothing to train on")
    return Corpus(config, source(train), source(held))


def _file_source(config: SourceConfig) -> Callable[[tuple[Path, ...]], Source]:
    """Return the class of a source of files, with its settings."""
    if config.kind == "chat":
        return ChatSource
    if config.kind == "tokens":
        return partial(token_lists.TokenListSource, column=config.text_column, separator=config.separator)
    return partial(FileSource, text_column=config.text_column)


def _hub_corpus(config: SourceConfig, key: str) -> Corpus:
    name = config.name or ""
    train = HubSource(name, config.subset, config.split, config.text_column, streaming=config.streaming)
    if config.validation_split is None:
        return Corpus(config, train, None)
    return Corpus(config, train, replace(train, split=config.validation_split, split_key=f"{key}.validation_split"))
