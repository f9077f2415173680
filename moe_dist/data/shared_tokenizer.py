"""Tokenizer of a blend, trained once on a sample of all its sources."""

import hashlib
import json
import logging
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import sentencepiece

from moe_dist.config import TokenizerConfig
from moe_dist.data.cache import atomic_write, exclusive
from moe_dist.data.corpora import Corpus
from moe_dist.data.tokenizer import train_tokenizer

logger = logging.getLogger(__name__)


def shared_tokenizer(cache: Path, shares: Sequence[tuple[Corpus, float]], config: TokenizerConfig) -> bytes:
    """Return the model from the cache, or train it on each source's share of `tokenizer.train_bytes`.

    Raises:
        DataError: a source cannot be read, or the vocabulary does not fit the sample.
    """
    parts = {
        "sentencepiece": sentencepiece.__version__,
        "sources": [[source.identity(), share] for source, share in shares],
        "tokenizer": config.model_dump(exclude_none=True),
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    path = cache / "tokenizers" / f"{key}.model"
    if (found := _read(path)) is not None:
        return found
    with exclusive(path.with_suffix(".lock")):
        if (found := _read(path)) is not None:
            return found
        model = _trained(shares, config)
        with atomic_write(path) as temporary:
            temporary.write_bytes(hashlib.sha256(model).digest() + model)
    return model


def _read(path: Path) -> bytes | None:
    """Return the model of a file, which follows its SHA-256; None: there is none, or it is damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    digest, model = content[:32], content[32:]
    return model if hashlib.sha256(model).digest() == digest else None


def _trained(shares: Sequence[tuple[Corpus, float]], config: TokenizerConfig) -> bytes:
    logger.info("training a %s tokenizer of %d pieces on all sources", config.kind, config.vocab_size)
    total = sum(share for _, share in shares)
    samples = (
        source.split.sample(max(1, int(config.train_bytes * share / total))) for source, share in shares if share
    )
    return train_tokenizer((document.text for document in chain.from_iterable(samples)), config)
