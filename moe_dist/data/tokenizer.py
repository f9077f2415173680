"""Tokenizers: the interface, and the lossless SentencePiece tokenizer that is trained on a corpus.

SentencePiece: text is not normalized, spaces are kept, newline and tab are pieces, and characters without a piece
become bytes. One character needs care: SentencePiece writes a space as ▁ (U+2581) and would decode a ▁ of the text as a
space; `encode` writes it as its three bytes instead.
"""

import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import sentencepiece

from moe_dist.config import TokenizerConfig
from moe_dist.data.hf_tokenizer import TOKENIZER_JSON, HuggingFaceTokenizer
from moe_dist.errors import DataError

SENTENCEPIECE_MODEL = "tokenizer.model"
UNKNOWN_PIECE = "<unknown piece>"  # the spaces in these two names keep the text from ever holding them as pieces
END_OF_DOCUMENT_PIECE = "<end of document>"

_SPACE_MARK = "\u2581"
_BATCH_CHARACTERS = 1_000_000
# SentencePiece skips whole lines that hold one of its reserved characters, and lines that are too long
_TRAINING_BREAKS = re.compile("[\n\t\0\u2581\u2585]")
_LONGEST_LINE = 4096
# fixed, not the machine's cores: the sums of unigram's EM, and so its pieces, depend on it
_TRAINING_THREADS = 2


class Tokenizer(Protocol):
    """Encoder of text to token ids in [0, vocab_size), and decoder.

    Attributes:
        path: file of the tokenizer.
        end_of_document: id that follows each document.
    """

    path: Path
    vocab_size: int
    end_of_document: int

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without an end-of-document token."""

    def encode_all(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Yield the token ids of each text, in order."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, without end-of-document tokens."""

    def files(self) -> dict[str, bytes]:
        """Return the tokenizer's files by their names, to be kept in one folder."""


def open_tokenizer(path: Path) -> Tokenizer:
    """Open the tokenizer of a file `tokenizer.json` (Hugging Face) or of a SentencePiece model.

    Raises:
        DataError: the file is neither.
    """
    return HuggingFaceTokenizer(path) if path.name == TOKENIZER_JSON else SentencePieceTokenizer(path)


def tokenizer_in(folder: Path) -> Path | None:
    """Return the tokenizer's file in the folder of a run or of prepared data, or None."""
    return next((folder / name for name in (SENTENCEPIECE_MODEL, TOKENIZER_JSON) if (folder / name).is_file()), None)


class SentencePieceTokenizer:
    """Lossless encoder of text to token ids in [0, vocab_size), and decoder.

    Raises:
        DataError: the file is not a SentencePiece model.
    """

    def __init__(self, path: Path) -> None:
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.load(str(path))
        except (OSError, RuntimeError) as error:
            raise DataError(f"{path} is not a SentencePiece model") from error
        self.path = path
        self.vocab_size: int = self._model.get_piece_size()
        self.end_of_document: int = self._model.piece_to_id(END_OF_DOCUMENT_PIECE)
        self._space_mark_bytes = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without an end-of-document token."""
        first, *others = text.split(_SPACE_MARK)
        ids: list[int] = self._model.encode(first)
        for part in others:
            ids += self._space_mark_bytes
            ids += self._model.encode(part)
        return ids

    def encode_all(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Yield the token ids of each text, in order, computed on all cores that this process may use."""
        threads = len(os.sched_getaffinity(0))
        for batch in _batches(texts):
            # a text with the space mark goes in as nothing, and is encoded apart
            plain = [text if _SPACE_MARK not in text else "" for text in batch]
            for text, ids in zip(batch, self._model.encode(plain, num_threads=threads), strict=True):
                yield ids if _SPACE_MARK not in text else self.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids; end-of-document tokens vanish, invalid UTF-8 becomes U+FFFD."""
        text: str = self._model.decode(ids)
        return text

    def files(self) -> dict[str, bytes]:
        """Return the model file."""
        return {SENTENCEPIECE_MODEL: self.path.read_bytes()}


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> bytes:
    """Train on all of `texts` (limited by the caller) and return the content of the model file.

    The same texts and settings give the same bytes.

    Raises:
        DataError: the texts are too few for `tokenizer.vocab_size`, or have more characters than it has room for.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(texts),
            model_writer=model,
            model_type=config.kind,
            vocab_size=config.vocab_size,
            num_threads=_TRAINING_THREADS,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n", "\t"],
            unk_id=0,
            unk_piece=UNKNOWN_PIECE,
            eos_id=1,
            eos_piece=END_OF_DOCUMENT_PIECE,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=4 * _LONGEST_LINE,  # bytes: a character has at most 4
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_reason(str(error), config)) from error
    return model.getvalue()


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in _TRAINING_BREAKS.split(text):
            for start in range(0, len(line), _LONGEST_LINE):
                yield line[start : start + _LONGEST_LINE]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def _reason(message: str, config: TokenizerConfig) -> str:
    size = f"tokenizer.vocab_size={config.vocab_size}"
    if match := re.search(r"too high .* a value <= (\d+)", message):
        return f"{size} is more than the training text yields: it allows at most {match[1]}; lower it or give more text"
    if match := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return f"{size} has no room for the characters of the training text: it takes at least {match[1]}"
    if "sentences_.empty()" in message:
        return "the tokenizer has no text to train on"
    return f"SentencePiece could not train ({size}, tokenizer.kind={config.kind}): {message.strip().splitlines()[-1]}"
