"""Checks of a corpus before any rank starts: its files, and a vocabulary that its text cannot fill."""

import glob
import os
import re
from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from moe_dist.config import RunConfig
from moe_dist.config.text_formats import ENDINGS, PLAIN, TOKEN_LISTS

RESERVED_PIECES = 260
"""Pieces that a trained vocabulary holds for any text: 256 bytes, unknown, end of document, newline and tab."""
FORMATS, ANY = {"text": ENDINGS, "tokens": TOKEN_LISTS}, ("",)
"""Endings of the files of a kind of corpus; others are looked at when they are read."""
MOST_BYTES_READ, MOST_FILES_READ, HEAD_BYTES = 4_000_000, 500, 65_536
_WORDS = re.compile(r"[^\S\n\t]*[^\s]+|[^\S\n\t]+")  # a piece may begin with the space before a word


def text_problems(config: RunConfig) -> Iterator[str]:
    """Yield a line for every file of the corpus that cannot be read, and for a vocabulary beyond the text."""
    read, whole = [], True
    for name, source in config.corpus.by_source.items():
        section = f"corpus.sources.{name}" if name else "corpus"
        endings = (".bin", ".idx") if source.kind == "megatron" else ("",)
        for key in ("paths", "validation_paths"):
            for pattern in getattr(source, key):
                files = [found for ending in endings for found in _files(pattern + ending)]
                yield from _file_problems(f"{section}.{key}", pattern + endings[0], files)
                yield from _format_problems(f"{section}.{key}", files, FORMATS.get(source.kind, ANY))
                read += files if key == "paths" else []
        whole &= source.kind == "text"
    usable = all(file.is_file() and os.access(file, os.R_OK) for file in read)
    plain = whole and read and usable and all(file.suffix in PLAIN for file in read)
    if plain:
        yield from _content_problems(config, read)
    trained = config.tokenizer.kind == "bpe" and config.tokenizer.path is None
    if plain and trained:
        yield from _vocabulary_problems(config, read)


def _files(pattern: str) -> list[Path]:
    name = os.path.expanduser(pattern)
    return [Path(name)] if os.path.lexists(name) else [Path(found) for found in glob.glob(name, recursive=True)]


def _file_problems(key: str, pattern: str, files: list[Path]) -> Iterator[str]:
    if not files:
        yield f"{key}: {pattern!r} matches no file (relative to {Path.cwd()})"
    for file in files:
        if file.is_dir() and len(files) == 1:
            yield f"{key}: {pattern!r} is a folder: name its files, such as {file / '*.txt'}, or give --text {file}"
        elif not file.exists():
            yield f"{key}: {file} is a link to {os.readlink(file)!r}, which does not exist: fetch the data"
        elif not file.is_dir() and not os.access(file, os.R_OK):
            yield f"{key}: {file} cannot be read: correct its permissions"


def _format_problems(key: str, files: list[Path], formats: tuple[str, ...]) -> Iterator[str]:
    for file in files:
        if not file.is_dir() and not file.name.endswith(formats):
            yield f"{key}: {file} has none of the supported formats: {' '.join(formats)}"


def _content_problems(config: RunConfig, files: Sequence[Path]) -> Iterator[str]:
    """Yield a line for each file that does not begin as text, and for less text than two sequences."""
    for file in files[:MOST_FILES_READ]:
        with file.open("rb") as opened:
            head = opened.read(HEAD_BYTES)
        try:
            getincrementaldecoder("utf-8")().decode(head, final=len(head) < HEAD_BYTES)
        except UnicodeDecodeError as error:
            yield f"corpus.paths: {file} is not UTF-8 text: byte {error.start} is 0x{head[error.start]:02x}"
    size, length = sum(file.stat().st_size for file in files), config.model.sequence_length
    sides = 1 if any(source.validation_paths for source in config.corpus.by_source.values()) else 2
    most = size + size // 4 + len(files)  # tokens: a byte is one at most, and a document of four bytes has an end
    if most - len(files) > 0 and most < sides * (length + 1):
        yield (
            f"corpus.paths: {size} bytes of text are less than a sequence of model.sequence_length={length} for "
            f"{'training' if sides == 1 else 'training and one for validation'}: give more text or lower it"
        )


def _vocabulary_problems(config: RunConfig, files: Sequence[Path]) -> Iterator[str]:
    limit = min(MOST_BYTES_READ, config.tokenizer.train_bytes)
    sizes = [file.stat().st_size for file in files]
    if sum(sizes) > limit:
        return  # a sample of this size fills any vocabulary in use, and reading more would take seconds
    if not sum(sizes):
        yield "corpus.paths: the files hold no text"
        return
    most = largest_vocabulary(file.read_bytes().decode(errors="replace") for file in files)
    if config.tokenizer.vocab_size > most:
        yield (
            f"tokenizer.vocab_size={config.tokenizer.vocab_size} is more than {sum(sizes):,} bytes of text yield: it "
            f"allows at most {most}; lower it or give more text"
        )


def largest_vocabulary(texts: Iterable[str]) -> int:
    """Return an upper bound of the pieces that byte-pair encoding finds in texts.

    A piece stays inside a word, and every merge shortens at least one of the different words by a piece.
    """
    words: set[str] = set()
    for text in texts:
        words.update(_WORDS.findall(text))
    characters = set().union(*words) if words else set()
    return RESERVED_PIECES + len(characters) + sum(len(word) for word in words)
