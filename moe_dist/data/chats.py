"""Chats as training text: files of conversations, and their token ids with the loss on answers only.

A token that is context, not a target, is stored as its complement `~id`, which is negative; an end-of-document token
that ends a message has the bit `INSIDE`, so that the conversation's own end is known. Token files, batches and
resumption need nothing else: `LanguageModel` takes both back, and leaves context out of the loss.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_dist.data.files import digest_of, first_and_more
from moe_dist.data.table_files import json_objects
from moe_dist.data.tokenizer import Tokenizer
from moe_dist.errors import DataError
from moe_dist.model.document_mask import INSIDE

ANSWER = "assistant"
Message = dict[str, str]


@dataclass(frozen=True)
class ChatSource:
    """JSON-lines files sorted by name, one conversation a line: {"messages": [{"role": ..., "content": ...}, ...]}."""

    files: tuple[Path, ...]

    def __str__(self) -> str:
        return first_and_more(self.files)

    def fingerprint(self) -> str:
        """Return a digest of the content of all files."""
        return f"chat 2 {digest_of(self.files)}"

    def texts(self) -> Iterator[str]:
        """Yield each conversation's messages as JSON.

        Raises:
            DataError: a line is no conversation with an answer.
        """
        for path in self.files:
            if path.suffix != ".jsonl":
                raise DataError(f"{path}: corpus.kind=chat reads .jsonl files only")
            for number, row in json_objects(path):
                yield json.dumps(_messages(row, f"{path}: line {number}"), ensure_ascii=False)


class ChatEncoder:
    """Encoder of a conversation's JSON by the tokenizer's chat template; context has negative codes.

    Raises:
        DataError: the tokenizer has no chat template, or transformers is not installed.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._template = tokenizer, _template_of(tokenizer.path)
        self.path, self.vocab_size = tokenizer.path, tokenizer.vocab_size
        self.end_of_document = ~tokenizer.end_of_document

    def encode_all(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Yield the ids of each conversation, in order."""
        end = self._tokenizer.end_of_document
        for text in texts:
            ids: list[int] = []
            for part, answer in self._parts(json.loads(text)):
                codes = (token | INSIDE if token == end else token for token in self._tokenizer.encode(part))
                ids += codes if answer else [~code for code in codes]
            yield ids

    def _parts(self, messages: Sequence[Message]) -> Iterator[tuple[str, bool]]:
        """Yield the conversation's text in parts up to its last answer, and whether each part is an answer.

        Raises:
            DataError: the template writes earlier messages differently once there are later ones.
        """
        done = ""
        for at, message in enumerate(messages):
            if message["role"] != ANSWER:
                continue
            prompt = self._rendered(messages[:at], add_generation_prompt=True)
            whole = self._rendered(messages[: at + 1])
            if not (prompt.startswith(done) and whole.startswith(prompt)):
                raise DataError(
                    f"{self.path.parent}: its chat template changes earlier messages of a conversation, which "
                    "corpus.kind=chat does not support: give conversations of one answer"
                )
            yield prompt[len(done) :], False
            yield whole[len(prompt) :], True
            done = whole

    def _rendered(self, messages: Sequence[Message], **options: bool) -> str:
        try:
            text: str = self._template.apply_chat_template(list(messages), tokenize=False, **options)
        except Exception as error:  # jinja's, with the reason that the template's author wrote
            raise DataError(f"{self.path.parent}: its chat template refuses a conversation: {error}") from error
        return text


def _messages(row: dict[str, Any], where: str) -> list[Message]:
    """Return role and content of each message of a row.

    Raises:
        DataError: it has no list of messages, or no answer.
    """
    found = row.get("messages")
    if not isinstance(found, list) or not all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in found
    ):
        raise DataError(f"{where}: messages must be a list of objects with a role and a content")
    if not any(one["role"] == ANSWER for one in found):
        raise DataError(f"{where}: the conversation has no message of the role {ANSWER}")
    return [{"role": one["role"], "content": one["content"]} for one in found]


def _template_of(path: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise DataError("corpus.kind=chat needs the package transformers: pip install 'moe-dist[models]'") from error
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path.parent)
    if tokenizer.chat_template is None:
        raise DataError(f"{path.parent} has no chat template, which corpus.kind=chat needs (chat_template.jinja)")
    return tokenizer
