"""Tokenizer of a Hugging Face checkpoint: `tokenizer.json`, and the files beside it that belong to it."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from moe_dist.errors import DataError

TOKENIZER_JSON = "tokenizer.json"
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
"""Files beside `tokenizer.json`: names of special tokens, and the chat template."""
_BATCH_DOCUMENTS = 1000


class HuggingFaceTokenizer:
    """Encoder of text to token ids in [0, vocab_size), and decoder; special tokens are never added to a text.

    Attributes:
        end_of_document: id of the token that ends a text (`eos_token`).

    Raises:
        DataError: the file is not a tokenizer, or no file beside it names the token that ends a text.
    """

    def __init__(self, path: Path) -> None:
        tokenizers = require_tokenizers()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{path} is not a {TOKENIZER_JSON}: {' '.join(str(error).split())}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.path = path
        self.vocab_size: int = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.end_of_document: int = self._end_of_document()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without an end-of-document token."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_all(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Yield the token ids of each text, in order, computed by the library's own threads."""
        remaining = iter(texts)
        while batch := list(islice(remaining, _BATCH_DOCUMENTS)):
            for encoding in self._tokenizer.encode_batch(batch, add_special_tokens=False):
                yield encoding.ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, without special tokens."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def files(self) -> dict[str, bytes]:
        """Return the tokenizer's files by their names."""
        return {
            name: (self.path.parent / name).read_bytes()
            for name in (self.path.name, *COMPANIONS)
            if (self.path.parent / name).is_file()
        }

    def _end_of_document(self) -> int:
        """Return the id of the `eos_token` that the first file beside the tokenizer names.

        Raises:
            DataError: none does.
        """
        for name in COMPANIONS:
            facts = _json_object(self.path.parent / name) if name.endswith(".json") else {}
            token, number = facts.get("eos_token"), facts.get("eos_token_id")
            if isinstance(token, dict):
                token = token.get("content")
            found = self._tokenizer.token_to_id(token) if isinstance(token, str) else number
            if isinstance(found, list):
                found = next(iter(found), None)
            if isinstance(found, int) and 0 <= found < self.vocab_size:
                return found
        raise DataError(
            f"{self.path}: no file beside it names the token that ends a text: set eos_token in tokenizer_config.json"
        )


def find_hf_tokenizer(name: str) -> Path:
    """Return the `tokenizer.json` in a folder, or of a model on the Hugging Face hub, which is downloaded.

    Raises:
        DataError: the folder has none, or the hub has no such model or cannot be reached.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = _download(name)
    if not (folder / TOKENIZER_JSON).is_file():
        raise DataError(f"tokenizer.path={name} has no {TOKENIZER_JSON}: give the folder of a tokenizer or a model")
    return folder / TOKENIZER_JSON


def require_tokenizers() -> Any:
    """Import the library `tokenizers`.

    Raises:
        DataError: it is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise DataError("tokenizer.kind=hf needs the package tokenizers: pip install 'moe-dist[models]'") from error
    return tokenizers


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[TOKENIZER_JSON, *COMPANIONS]))
    except Exception as error:  # of many classes: no such name, no network, no access
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"tokenizer.path={name} is no folder, and the Hugging Face hub does not give it: {reason}"
        ) from error


def _json_object(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, empty if it is missing.

    Raises:
        DataError: it is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a JSON object")
    return content
