"""Preparation of token files, once per corpus and tokenizer, by one process of each machine that asks for them.

A corpus and tokenizer have one folder in the cache, named by the hash of all inputs:

    prepared/<key>/tokenizer.model (or tokenizer.json)  train.tokens  validation.tokens  manifest.json (written last)
"""

import hashlib
import json
import logging
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname

import sentencepiece

from moe_dist.config import CorpusConfig, TokenizerConfig
from moe_dist.data.cache import atomic_write, exclusive, remove_leftovers
from moe_dist.data.chats import ChatEncoder
from moe_dist.data.corpora import Corpus, open_corpus
from moe_dist.data.encode import PieceEncoder
from moe_dist.data.hf_tokenizer import find_hf_tokenizer
from moe_dist.data.plan import PLAN, Plan, digest_of_file
from moe_dist.data.shared_tokenizer import shared_tokenizer
from moe_dist.data.token_file import Encoder, TokenFile, open_token_file
from moe_dist.data.token_lists import TokenListEncoder
from moe_dist.data.tokenizer import SENTENCEPIECE_MODEL, Tokenizer, open_tokenizer, tokenizer_in
from moe_dist.errors import DataError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_FORMAT = 2  # raise it when the same corpus and settings give other files


@dataclass(frozen=True)
class PreparedSource:
    """Two token files and their tokenizer; an equal `key` on all ranks means equal data."""

    train: TokenFile
    validation: TokenFile
    tokenizer_path: Path
    vocab_size: int
    key: str


@dataclass(frozen=True)
class PreparedData:
    """Prepared sources by name, with one tokenizer; a source that is not blended has an empty name."""

    sources: Mapping[str, PreparedSource]

    @property
    def _any(self) -> PreparedSource:
        return next(iter(self.sources.values()))

    @property
    def train(self) -> TokenFile:
        """Training tokens of the only source."""
        return self.sources[""].train

    @property
    def validation(self) -> TokenFile:
        """Validation tokens of the only source."""
        return self.sources[""].validation

    @property
    def tokenizer_path(self) -> Path:
        """File of the tokenizer."""
        return self._any.tokenizer_path

    @property
    def vocab_size(self) -> int:
        """Rows of the model's embedding."""
        return self._any.vocab_size

    @property
    def end_of_document(self) -> int:
        """Token that ends each document."""
        return self._any.train.facts.end_of_document

    @property
    def tokens(self) -> int:
        """Training tokens of all sources."""
        return sum(len(source.train) for source in self.sources.values())

    def checksum(self, side: str) -> int:
        """Return one checksum of the token files of a side, `train` or `validation`, of all sources."""
        sums = {name: getattr(source, side).checksum for name, source in self.sources.items()}
        return sums[""] if list(sums) == [""] else zlib.crc32(json.dumps(sums).encode())


def prepare_data(corpus: CorpusConfig, tokenizer: TokenizerConfig) -> PreparedData:
    """Return the data from the cache, or prepare it; any number of processes may call this at once.

    Damaged files in the cache are replaced.

    Raises:
        DataError: the corpus cannot be read, the vocabulary does not fit it, or the cache cannot be written.
    """
    named = {name: f"corpus.sources.{name}" if name else "corpus" for name in corpus.by_source}
    opened = {name: open_corpus(source, named[name]) for name, source in corpus.by_source.items()}
    if corpus.cache_dir.startswith("~"):
        raise DataError(f"corpus.cache_dir={corpus.cache_dir}: '~' is unknown here: set HOME or give another folder")
    cache, files = Path(corpus.cache_dir), _imported_files(tokenizer)
    try:
        if corpus.kind == "blend" and not files:
            shares = [(source, corpus.sources[name].weight) for name, source in opened.items()]
            files = {SENTENCEPIECE_MODEL: shared_tokenizer(cache, shares, tokenizer)}
        return PreparedData(_prepare_all(cache, opened, tokenizer, files))
    except OSError as error:
        raise DataError(f"corpus.cache_dir={corpus.cache_dir} cannot be used: {error}") from error


def _prepare_all(
    cache: Path, opened: Mapping[str, Corpus], tokenizer: TokenizerConfig, imported: Mapping[str, bytes]
) -> dict[str, PreparedSource]:
    """Prepare each source; one that another process is preparing comes last, so that processes share the work."""
    ready: dict[str, PreparedSource] = {}
    for wait in (len(opened) == 1, True):
        for name in [each for each in opened if each not in ready]:
            if (source := _prepare(cache, opened[name], tokenizer, imported, wait)) is not None:
                ready[name] = source
    return {name: ready[name] for name in opened}


def _prepare(
    cache: Path, source: Corpus, tokenizer: TokenizerConfig, imported: Mapping[str, bytes], wait: bool
) -> PreparedSource | None:
    """Return a source from the cache, or prepare it; None: another process does, and `wait` is false.

    One process of a machine encodes, on all its cores; processes of other machines take their part.
    """
    folder = cache / "prepared" / _key(source, tokenizer, imported)
    ready = _open(folder)
    if ready:
        return ready
    with exclusive(folder.with_suffix(f".{gethostname()}.lock"), wait) as held:
        if not held:
            return None
        if not _make(folder, source, tokenizer, imported, wait):
            return None
        ready = _open(folder)
    if not ready:
        raise DataError(f"corpus.cache_dir={cache}: {folder} does not keep what is written to it")
    return ready


def _imported_files(tokenizer: TokenizerConfig) -> dict[str, bytes]:
    """Return the files of the tokenizer in `tokenizer.path` by name; empty for one that is trained here."""
    if tokenizer.path is None:
        return {}
    hf = tokenizer.kind == "hf"
    return (open_tokenizer(find_hf_tokenizer(tokenizer.path)) if hf else _of_run(Path(tokenizer.path))).files()


def _of_run(folder: Path) -> Tokenizer:
    """Open the SentencePiece model in a run's folder.

    Raises:
        DataError: there is none.
    """
    model = folder / SENTENCEPIECE_MODEL
    if not model.is_file():
        raise DataError(
            f"tokenizer.path={folder} has no {SENTENCEPIECE_MODEL}: give the folder of a run, or set kind=hf"
        )
    return open_tokenizer(model)


def _key(corpus: Corpus, tokenizer: TokenizerConfig, imported: Mapping[str, bytes]) -> str:
    parts = {
        "format": _FORMAT,
        "sentencepiece": sentencepiece.__version__,
        "corpus": corpus.identity(),
        "tokenizer": tokenizer.model_dump(exclude_none=True, exclude={"path"}),
        **{name: hashlib.sha256(content).hexdigest() for name, content in imported.items()},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _open(folder: Path) -> PreparedSource | None:
    """Return the finished data in `folder`; None if it is missing or damaged (which is logged)."""
    if not (folder / MANIFEST).exists():
        return None
    try:
        return open_finished(folder)
    except (DataError, OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("making %s again: %s", folder, error)
        return None


def open_finished(folder: Path) -> PreparedSource:
    """Open prepared data after checking all files (about a second per gigabyte).

    Raises:
        DataError, OSError, ValueError, KeyError, TypeError: a file is missing or damaged.
    """
    manifest = folder / MANIFEST
    facts = json.loads(manifest.read_text())
    model = tokenizer_in(folder)
    if model is None:
        raise DataError(f"{folder} has no tokenizer")
    if digest_of_file(model) != facts["tokenizer_sha256"]:
        raise DataError(f"{model} is damaged: its SHA-256 is not {facts['tokenizer_sha256']}")
    train, validation = (open_token_file(folder / f"{split}.tokens") for split in ("train", "validation"))
    if [train.checksum, validation.checksum] != facts["checksums"]:
        raise DataError(f"the token files in {folder} are not those of {manifest.name}")
    return PreparedSource(train, validation, model, train.facts.vocab_size, folder.name)


def _make(folder: Path, corpus: Corpus, config: TokenizerConfig, imported: Mapping[str, bytes], wait: bool) -> bool:
    """Prepare a corpus together with other machines; False: another one makes the plan, and `wait` is false."""
    lock, manifest, pieces = folder.with_suffix(".lock"), folder / MANIFEST, folder / "pieces"
    with exclusive(lock, wait) as held:
        if not held:
            return False
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        if _open(folder):  # another machine may have made it while this one waited
            return True
        manifest.unlink(missing_ok=True)
        plan = Plan.read(folder, corpus) or Plan.make(folder, corpus, config, imported)
    tokenizer = open_tokenizer(plan.tokenizer)
    rows, encoder = config.embedding_rows(tokenizer.vocab_size), _encoder_of(corpus.config.kind, tokenizer)
    work = PieceEncoder(plan.split, encoder, pieces, rows, plan.digest, manifest)
    numbers = work.encode_all()
    with exclusive(lock):
        if not manifest.exists():
            checksums = list(work.join(numbers, folder).values())
            with atomic_write(manifest) as path:
                path.write_text(json.dumps({"tokenizer_sha256": plan.digest, "checksums": checksums}))
        (folder / PLAN).unlink(missing_ok=True)
        shutil.rmtree(pieces, ignore_errors=True)
    return True


def _encoder_of(kind: str, tokenizer: Tokenizer) -> Encoder:
    if kind == "chat":
        return ChatEncoder(tokenizer)
    return TokenListEncoder(tokenizer) if kind in ("megatron", "tokens") else tokenizer
