"""Corpus and tokenizer."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from moe_dist.config.sections.base import PathText, PathTexts, Positive, Section
from moe_dist.errors import ConfigError


class CorpusConfig(Section):
    """Source of training and validation text."""

    kind: Literal["stdlib", "text", "chat", "megatron", "hub"] = Field(
        "stdlib",
        description="stdlib: Python's own library source, offline; chat: conversations, with the loss on answers only; "
        "megatron: Megatron-core's tokenized files",
    )
    paths: PathTexts = Field(
        [],
        description="files or globs: .txt .jsonl (also .gz .zst) .parquet (text), .jsonl (chat); prefixes of .bin and "
        ".idx (megatron)",
    )
    validation_paths: PathTexts = Field(
        [], description="held-out files (text, chat); empty: a fraction of the documents"
    )
    name: PathText | None = Field(None, description="data set on the Hugging Face hub, or a local folder of one (hub)")
    subset: str | None = Field(None, description="configuration of that data set (hub)")
    split: str = Field("train", description="training split (hub)")
    validation_split: str | None = Field("validation", description="validation split (hub); null: hold out a fraction")
    text_column: str = Field("text", description="text column of .jsonl, .parquet and hub data; no other is read")
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(0.05, description="share of documents held out")
    max_bytes: Positive | None = Field(None, description="limit of text per source; null: no limit")
    document_mask: bool = Field(
        False, description="attend inside documents only, where a sequence holds several; false: to all earlier tokens"
    )
    cache_dir: PathText = Field(
        "~/.cache/moe-dist", validate_default=True, description="cache of tokenizers and token files, by content"
    )

    @model_validator(mode="before")
    @classmethod
    def _infer_kind(cls, given: Any) -> Any:
        """Take `paths` and `name` without a `kind` as text and hub."""
        if not isinstance(given, dict) or "kind" in given:
            return given
        found = next((kind for key, kind in (("paths", "text"), ("name", "hub")) if given.get(key)), None)
        return given if found is None else {**given, "kind": found}

    @model_validator(mode="after")
    def _require_source(self) -> Self:
        if self.kind == "text" and not self.paths:
            raise ConfigError("corpus.kind=text needs corpus.paths: a list of files or globs (.txt, .jsonl, .parquet)")
        if self.kind == "chat" and not self.paths:
            raise ConfigError("corpus.kind=chat needs corpus.paths: a list of .jsonl files or globs")
        if self.kind == "megatron" and not self.paths:
            raise ConfigError("corpus.kind=megatron needs corpus.paths: prefixes of .bin and .idx files")
        if self.kind in ("chat", "megatron") and self.max_bytes is not None:
            raise ConfigError(
                f"corpus.max_bytes={self.max_bytes} would cut documents of corpus.kind={self.kind}: remove it"
            )
        if self.kind == "chat" and self.document_mask:
            raise ConfigError(
                "corpus.document_mask=true would part the messages of corpus.kind=chat, which end as documents do: set "
                "it to false"
            )
        if self.kind == "hub" and not self.name:
            raise ConfigError("corpus.kind=hub needs corpus.name, such as Salesforce/wikitext")
        unread = [key for key in ("paths", "validation_paths", "name") if getattr(self, key)]
        if self.kind == "stdlib" and unread:
            keys = ", ".join(f"corpus.{key}={getattr(self, key)!r}" for key in unread)
            raise ConfigError(f"corpus.kind=stdlib does not read {keys}: set corpus.kind to text or hub, or remove it")
        return self


class TokenizerConfig(Section):
    """SentencePiece tokenizer, trained on the corpus, or the tokenizer of a Hugging Face model."""

    kind: Literal["bpe", "unigram", "hf"] = Field("bpe", description="bpe, unigram: trained here; hf: read from `path`")
    path: PathText | None = Field(
        None, description="folder with a tokenizer.json, or a model's name on the Hugging Face hub (hf)"
    )
    vocab_size: Annotated[int, Field(ge=260, le=2**31 - 1)] = Field(
        4096,
        description="vocabulary size, including the 256 bytes of the fallback; hf: rows of the embedding, at least as "
        "many as the tokenizer has ids",
    )
    train_bytes: Positive = Field(4_000_000, description="limit of the text that trains the tokenizer, bytes")

    @model_validator(mode="after")
    def _require_path(self) -> Self:
        if self.kind == "hf" and self.path is None:
            raise ConfigError("tokenizer.kind=hf needs tokenizer.path: a folder with a tokenizer.json, or a hub name")
        if self.kind != "hf" and self.path is not None:
            raise ConfigError(
                f"tokenizer.path={self.path} is read with tokenizer.kind=hf only, not {self.kind}: set kind to hf, or "
                "remove it"
            )
        return self

    def embedding_rows(self, ids: int) -> int:
        """Return the rows of the embedding for a tokenizer with this number of ids.

        Raises:
            ConfigError: `vocab_size` has no room for the ids of a Hugging Face tokenizer.
        """
        if self.kind != "hf":
            return ids
        if self.vocab_size < ids:
            raise ConfigError(
                f"tokenizer.vocab_size={self.vocab_size} has no room for the {ids} ids of tokenizer.path={self.path}: "
                f"must be >= {ids}"
            )
        return self.vocab_size
