"""Plan of a preparation: which documents are held out, and the tokenizer; one machine makes it for all.

It is kept until the preparation is finished, so that a later start neither reads the corpus for it nor trains again.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from zipfile import BadZipFile

import numpy as np

from moe_dist.config import TokenizerConfig
from moe_dist.data.cache import atomic_write
from moe_dist.data.corpora import Corpus
from moe_dist.data.split import Split, Survey
from moe_dist.data.tokenizer import SENTENCEPIECE_MODEL, tokenizer_in, train_tokenizer

logger = logging.getLogger(__name__)

PLAN = "plan.npz"


@dataclass(frozen=True)
class Plan:
    """Split of a corpus, and the file of the tokenizer with its SHA-256."""

    split: Split
    tokenizer: Path
    digest: str

    @classmethod
    def read(cls, folder: Path, corpus: Corpus) -> Self | None:
        """Return the plan in a folder; None: there is none, it is damaged, or its tokenizer is."""
        tokenizer = tokenizer_in(folder)
        try:
            with np.load(folder / PLAN) as arrays:
                survey = Survey(arrays["keys"], arrays["sizes"])
                split = corpus.split_as(survey, arrays["held_out"], arrays["dropped"])
                digest = str(arrays["tokenizer"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            logger.warning("%s is made again: %s", folder / PLAN, error)
            return None
        return cls(split, tokenizer, digest) if tokenizer and digest_of_file(tokenizer) == digest else None

    @classmethod
    def make(cls, folder: Path, corpus: Corpus, config: TokenizerConfig, imported: Mapping[str, bytes]) -> Self:
        """Read the corpus, train the tokenizer (or write the imported one), and write the plan."""
        logger.info("reading %s", corpus.train)
        split = corpus.split
        for name, content in (imported or {SENTENCEPIECE_MODEL: _trained(split, config)}).items():
            with atomic_write(folder / name) as path:
                path.write_bytes(content)
        tokenizer = tokenizer_in(folder)
        assert tokenizer is not None, "it was written above"
        digest, survey = digest_of_file(tokenizer), split.survey
        with atomic_write(folder / PLAN) as path, path.open("wb") as file:
            np.savez(
                file, keys=survey.keys, sizes=survey.sizes, held_out=split.held_out, dropped=split.dropped,
                tokenizer=np.array(digest),
            )  # fmt: skip
        return cls(split, tokenizer, digest)


def digest_of_file(path: Path) -> str:
    """Return the SHA-256 of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _trained(split: Split, config: TokenizerConfig) -> bytes:
    logger.info("training a %s tokenizer of %d pieces", config.kind, config.vocab_size)
    return train_tokenizer((document.text for document in split.sample(config.train_bytes)), config)
