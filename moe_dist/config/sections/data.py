"""Where the text comes from, and what cuts it into tokens."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moe_dist.config.sections.base import Positive, Section
from moe_dist.errors import ConfigError


class CorpusConfig(Section):
    """Where the text comes from."""

    kind: Literal["stdlib", "text", "hub"] = Field("stdlib", description="stdlib: Python's own library source, offline")
    paths: list[str] = Field([], description="files or globs: .txt .jsonl .parquet (text)")
    validation_paths: list[str] = Field([], description="held-out files (text); empty: a fraction of the documents")
    name: str | None = Field(None, description="data set on the Hugging Face hub (hub)")
    subset: str | None = Field(None, description="configuration of that data set (hub)")
    split: str = Field("train", description="split to train on (hub)")
    validation_split: str | None = Field("validation", description="split to validate on (hub); null: a fraction")
    text_column: str = Field("text", description="column of .jsonl, .parquet and hub data that holds the text")
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(0.05, description="share of documents held out")
    max_bytes: Positive | None = Field(None, description="read at most this much text; null: all")
    cache_dir: str = Field("~/.cache/moe-dist", description="where tokenizers and token files are kept, by content")

    @model_validator(mode="after")
    def _source_named(self) -> Self:
        if self.kind == "text" and not self.paths:
            raise ConfigError("corpus.kind=text needs corpus.paths: a list of files or globs (.txt, .jsonl, .parquet)")
        if self.kind == "hub" and not self.name:
            raise ConfigError("corpus.kind=hub needs corpus.name, such as Salesforce/wikitext")
        unread = [key for key in ("paths", "validation_paths", "name") if getattr(self, key)]
        if self.kind == "stdlib" and unread:
            keys = ", ".join(f"corpus.{key}={getattr(self, key)!r}" for key in unread)
            raise ConfigError(f"corpus.kind=stdlib does not read {keys}: set corpus.kind to text or hub, or remove it")
        return self


class TokenizerConfig(Section):
    """SentencePiece, trained once on the corpus."""

    kind: Literal["bpe", "unigram"] = "bpe"
    vocab_size: Annotated[int, Field(ge=260)] = Field(
        4096, description="pieces, the 256 bytes of the fallback included"
    )
    train_bytes: Positive = Field(4_000_000, description="at most this much text trains the tokenizer")
