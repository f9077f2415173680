"""Corpus and tokenizer."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from moe_dist.config.sections.base import NonNegative, PathText, PathTexts, Positive, Section
from moe_dist.errors import ConfigError


class SourceConfig(Section):
    """One source of training and validation text."""

    kind: Literal["stdlib", "text", "chat", "tokens", "megatron", "hub"] = Field(
        "stdlib",
        description="stdlib: Python's own library source, offline; chat: conversations, with the loss on answers only; "
        "tokens: arrays or columns of ids; megatron: Megatron-core's tokenized files",
    )
    paths: PathTexts = Field(
        [],
        description="files or globs: .txt .jsonl (also .gz .zst) .parquet (text), .jsonl (chat), .npy .parquet "
        "(tokens); prefixes of .bin and .idx (megatron)",
    )
    validation_paths: PathTexts = Field(
        [], description="held-out files (text, chat, tokens, megatron); empty: a fraction of the documents"
    )
    name: PathText | None = Field(None, description="data set on the Hugging Face hub, or a local folder of one (hub)")
    subset: str | None = Field(None, description="configuration of that data set (hub)")
    split: str = Field("train", description="training split (hub)")
    validation_split: str | None = Field("validation", description="validation split (hub); null: hold out a fraction")
    streaming: bool = Field(
        False, description="read the data set row by row from where it is, twice, instead of downloading it whole (hub)"
    )
    text_column: str = Field(
        "text", description="text column of .jsonl, .parquet and hub data, or column of lists of ids; no other is read"
    )
    separator: NonNegative | None = Field(
        None, description="id between the documents of a one-dimensional array (tokens)"
    )
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(0.05, description="share of documents held out")
    max_bytes: Positive | None = Field(None, description="limit of text per source; null: no limit")
    near_duplicates: Literal["ignore", "report", "drop"] = Field(
        "ignore",
        description="what to do with training documents that are nearly equal to a held-out one: report counts them as "
        "the text is prepared, drop leaves them out (needs moe-dist[dedup]; some milliseconds a document)",
    )

    @model_validator(mode="before")
    @classmethod
    def _infer_kind(cls, given: Any) -> Any:
        """Take `paths`, `name` and `sources` without a `kind` as text, hub and blend."""
        if not isinstance(given, dict) or "kind" in given:
            return given
        kinds = (("paths", "text"), ("name", "hub"), ("sources", "blend"))
        found = next((kind for key, kind in kinds if given.get(key)), None)
        return given if found is None else {**given, "kind": found}


class BlendSource(SourceConfig):
    """Source of a blend."""

    weight: Annotated[float, Field(ge=0)] = Field(
        1.0, description="share of the sequences, in proportion to the others' weights"
    )
    max_tokens: Positive | None = Field(
        None, description="limit of tokens drawn, after which the others share its part; null: no limit"
    )
    max_epochs: Annotated[float, Field(gt=0)] | None = Field(
        None, description="the same limit in passes over its tokens, which may be a fraction; null: no limit"
    )


class WeightChange(Section):
    """Weights of a blend from a step on."""

    step: NonNegative = Field(description="steps that are done before")
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(description="by source; the others keep theirs")


class CorpusConfig(SourceConfig):
    """Source of training and validation text."""

    kind: Literal["stdlib", "text", "chat", "tokens", "megatron", "hub", "blend"] = Field(  # type: ignore[assignment]
        "stdlib",
        description="stdlib: Python's own library source, offline; chat: conversations, with the loss on answers only; "
        "tokens: arrays or columns of ids; megatron: Megatron-core's tokenized files; blend: `sources`",
    )
    sources: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")], BlendSource] = Field(
        {}, description="named sources that are blended by weight (blend), each with the keys above"
    )
    schedule: list[WeightChange] = Field([], description="changes of the sources' weights at steps (blend)")
    document_mask: bool = Field(
        False, description="attend inside documents only, where a sequence holds several; false: to all earlier tokens"
    )
    packing: Literal["concat", "best_fit"] = Field(
        "concat",
        description="concat: sequences follow each other without a gap; best_fit: documents are kept whole where they "
        "fit, by best-fit-decreasing bin packing, with some padding",
    )
    cache_dir: PathText = Field(
        "~/.cache/moe-dist", validate_default=True, description="cache of tokenizers and token files, by content"
    )

    @property
    def by_source(self) -> Mapping[str, SourceConfig]:
        """Sources by name; one that is not blended has an empty name."""
        return self.sources if self.kind == "blend" else {"": self}

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        for name, source in self.by_source.items():
            check_source(source, f"corpus.sources.{name}" if name else "corpus")
        check_blend(self)
        return self


def check_source(source: SourceConfig, key: str) -> None:
    """Reject a source without what its kind reads, or with what it does not.

    Args:
        key: name of its section, for messages.
    """
    kind, needs = source.kind, {"text": "a list of files or globs (.txt, .jsonl, .parquet)"}
    needs |= {"chat": "a list of .jsonl files or globs", "megatron": "prefixes of .bin and .idx files"}
    needs["tokens"] = "a list of .npy or .parquet files or globs"
    if kind in needs and not source.paths:
        raise ConfigError(f"{key}.kind={kind} needs {key}.paths: {needs[kind]}")
    if kind in ("chat", "tokens", "megatron") and source.max_bytes is not None:
        raise ConfigError(f"{key}.max_bytes={source.max_bytes} would cut documents of {key}.kind={kind}: remove it")
    if source.streaming and kind != "hub":
        raise ConfigError(f"{key}.streaming=true is read with {key}.kind=hub only, not {kind}")
    if source.separator is not None and kind != "tokens":
        raise ConfigError(f"{key}.separator={source.separator} is read with {key}.kind=tokens only, not {kind}")
    if kind == "hub" and not source.name:
        raise ConfigError(f"{key}.kind=hub needs {key}.name, such as Salesforce/wikitext")
    unread = [name for name in ("paths", "validation_paths", "name") if getattr(source, name)]
    if kind == "stdlib" and unread:
        keys = ", ".join(f"{key}.{name}={getattr(source, name)!r}" for name in unread)
        raise ConfigError(f"{key}.kind=stdlib does not read {keys}: set {key}.kind to text or hub, or remove it")


def check_blend(corpus: CorpusConfig) -> None:
    """Reject a blend without sources or weights, and keys that only a blend reads elsewhere."""
    if corpus.kind != "blend":
        if unread := [key for key in ("sources", "schedule") if getattr(corpus, key)]:
            raise ConfigError(f"corpus.{unread[0]} is read with corpus.kind=blend only, not {corpus.kind}")
        return
    if not corpus.sources:
        raise ConfigError("corpus.kind=blend needs corpus.sources: a mapping of names to sources")
    own = {name: field for name, field in SourceConfig.model_fields.items() if name != "kind"}
    if unread := [name for name, field in own.items() if getattr(corpus, name) != field.default]:
        raise ConfigError(f"corpus.kind=blend does not read corpus.{unread[0]}: give it to a source of corpus.sources")
    steps = [change.step for change in corpus.schedule]
    if steps != sorted(set(steps)):
        raise ConfigError(f"corpus.schedule: steps must ascend, not {steps}")
    for change in corpus.schedule:
        if unknown := sorted(set(change.weights) - set(corpus.sources)):
            raise ConfigError(
                f"corpus.schedule: {unknown[0]!r} at step {change.step} is none of corpus.sources: "
                f"{', '.join(corpus.sources)}"
            )
    for step, weights in weight_changes(corpus):
        if not any(weights.values()):
            raise ConfigError(f"corpus.sources: all weights are 0 from step {step} on: at least one must be above 0")


def weight_changes(corpus: CorpusConfig) -> list[tuple[int, dict[str, float]]]:
    """Return the steps at which the weights of a blend change, the first of them 0, and all weights from there on."""
    weights = {name: source.weight for name, source in corpus.sources.items()}
    changes = {0: weights}
    for change in corpus.schedule:
        changes[change.step] = weights = {**weights, **change.weights}
    return list(changes.items())


class TokenizerConfig(Section):
    """SentencePiece tokenizer, trained on the corpus or taken from another run, or one of a Hugging Face model."""

    kind: Literal["bpe", "unigram", "hf"] = Field(
        "bpe", description="bpe, unigram: trained here, or read from `path`; hf: read from `path`"
    )
    path: PathText | None = Field(
        None,
        description="bpe, unigram: folder of a run whose tokenizer is used; hf: folder with a tokenizer.json, or a "
        "model's name on the Hugging Face hub",
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
