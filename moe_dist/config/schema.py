"""The typed configuration of a run: every key, its default, and what it may be.

Checks that concern one section live in that section; checks across sections live in `RunConfig`; checks that need the
number of ranks are in `config/world.py`. Nothing here imports torch, so that the launcher answers at once.
"""

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from moe_dist.errors import ConfigError

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
WireDtype = Literal["float32", "bfloat16", "float16", "int8"]


class Section(BaseModel):
    """A group of keys: unknown ones are refused, values are fixed once validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_values_are_no_numbers(cls, value: object, info: ValidationInfo) -> object:
        # pydantic would take `true` for 1, and its strictness would refuse numbers that YAML takes for text (1e-3)
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("a truth value does not belong here")
        return value


def _require_divisible(key: str, value: int, by_key: str, by: int) -> None:
    if value % by:
        raise ConfigError(f"{key}={value} is not divisible by {by_key}={by}")


class ModelConfig(Section):
    """The transformer around the MoE layers, the same for every `moe.kind`."""

    layers: Positive = 2
    hidden_size: Positive = 128
    heads: Positive = 4
    kv_heads: Positive | None = Field(
        None, description="key/value heads (grouped-query attention); null: as many as heads"
    )
    sequence_length: Positive = Field(256, description="tokens a sequence")
    tie_embeddings: bool = Field(True, description="the output layer shares the token embedding's weights")
    rope_base: Positive = 10000
    norm_epsilon: Annotated[float, Field(gt=0)] = 1e-5
    init_std: Annotated[float, Field(gt=0)] = 0.02
    activation_checkpointing: bool = Field(False, description="recompute each layer in the backward pass")

    @property
    def output_init_std(self) -> float:
        """Initial std of what adds to the residual stream: init_std / sqrt(2 layers), as GPT-2."""
        return self.init_std / math.sqrt(2 * self.layers)

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        _require_divisible("model.hidden_size", self.hidden_size, "model.heads", self.heads)
        if self.kv_heads is not None:
            _require_divisible("model.heads", self.heads, "model.kv_heads", self.kv_heads)
        if (self.hidden_size // self.heads) % 2:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} / model.heads={self.heads} is odd: rotary positions need "
                "an even head size"
            )
        return self


class MoEConfig(Section):
    """The feed-forward part of every layer: clustered experts, standard experts, or one dense network."""

    kind: Literal["clustered", "standard", "dense"] = "clustered"
    experts: Positive = Field(32, description="E: experts in a layer")
    clusters: Positive = Field(4, description="G: clusters of E/G experts (clustered)")
    top_clusters: Positive = Field(1, description="m: clusters a token goes to (clustered)")
    top_k: Positive = Field(2, description="k: experts chosen in each cluster (clustered) or among all (standard)")
    expert_hidden: Positive = Field(256, description="f: hidden width of an expert, and of a cluster's base")
    dense_hidden: Positive | None = Field(None, description="hidden width of `dense`; null: top_k * expert_hidden")
    rank: Positive = Field(4, description="r: rank of an expert's residual (clustered)")
    expert_vectors: bool = Field(True, description="per-expert gate and biases on the hidden units, bias on the output")
    shared_init: bool = Field(
        False, description="all bases (clustered) or all experts (standard, or in a warm-up) start from one draw"
    )
    warmup_standard: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the steps first trained with standard experts, which are then clustered (clustered)"
    )
    shared_expert_hidden: NonNegative = Field(0, description="width of an expert every token uses (standard); 0: none")
    balance: Literal["bias", "aux_loss", "none"] = Field("bias", description="what keeps the experts' loads equal")
    balance_rate: Annotated[float, Field(ge=0)] = Field(0.02, description="step of a selection bias (balance: bias)")
    aux_loss_weight: Annotated[float, Field(ge=0)] = Field(0.01, description="weight of the loss (balance: aux_loss)")
    z_loss_weight: Annotated[float, Field(ge=0)] = Field(0.0, description="weight of the router z-loss, in each stage")
    capacity_factor: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="copies that a cluster takes of each rank's micro-batch, and an expert of all ranks', over an even "
        "share; null: all",
    )
    gate_scale: Annotated[float, Field(gt=0)] = Field(1.0, description="factor on a layer's gates, else of sum 1")
    form: Literal["auto", "mask", "sort", "compiled", "triton", "reference"] = Field(
        "auto", description="how clustered experts are computed"
    )
    wire_dtype: WireDtype = Field(
        "bfloat16", description="what hidden vectors travel as between ranks; int8: with a scale for each"
    )
    overlap_chunks: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = Field(
        "auto",
        description="chunks of a rank's tokens, of which one travels between clusters while another is computed "
        "(clustered); auto: what pays by the speeds measured at the start",
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.kind == "clustered":
            self._clustered_possible()
        elif self.warmup_standard:
            raise ConfigError(
                f"moe.warmup_standard={self.warmup_standard} works with moe.kind=clustered only, not {self.kind}: set "
                "it to 0"
            )
        if self.kind == "standard" and self.top_k > self.experts:
            raise ConfigError(f"moe.top_k={self.top_k} is larger than moe.experts={self.experts}")
        return self

    def _clustered_possible(self) -> None:
        _require_divisible("moe.experts", self.experts, "moe.clusters", self.clusters)
        if self.top_k > self.experts_per_cluster:
            raise ConfigError(
                f"moe.top_k={self.top_k} is larger than a cluster: moe.experts={self.experts} / "
                f"moe.clusters={self.clusters} = {self.experts_per_cluster} experts"
            )
        if self.top_clusters > self.clusters:
            raise ConfigError(f"moe.top_clusters={self.top_clusters} is larger than moe.clusters={self.clusters}")
        if self.overlap_chunks not in ("auto", 1) and (key := self.needs_whole_batches):
            raise ConfigError(
                f"moe.overlap_chunks={self.overlap_chunks} does not work with {key}, which is for all of a cluster's "
                "tokens together: use auto or 1"
            )
        if self.shared_expert_hidden:
            raise ConfigError(
                f"moe.shared_expert_hidden={self.shared_expert_hidden} works with moe.kind=standard only; "
                "moe.kind=clustered shares a base instead: set it to 0"
            )

    @property
    def needs_whole_batches(self) -> str | None:
        """The key by which an expert's tokens of a micro-batch must be seen together, if there is one."""
        if self.capacity_factor is not None:
            return f"moe.capacity_factor={self.capacity_factor}"
        return "moe.balance=aux_loss" if self.balance == "aux_loss" and self.aux_loss_weight else None

    @property
    def experts_per_cluster(self) -> int:
        """n = E/G."""
        return self.experts // self.clusters

    @property
    def dense_width(self) -> int:
        """Hidden width of the dense network with the same active width as `standard`."""
        return self.dense_hidden or self.top_k * self.expert_hidden


class ReclusterConfig(Section):
    """Regrouping of experts during training (moe.kind=clustered): when, by what, and how much at a time.

    What experts are compared by holds for the end of a standard warm-up too (moe.warmup_standard).
    """

    period: Positive | None = Field(None, description="T: steps between rounds; null: clusters stay as they start")
    start: Positive = Field(20, description="step after which the first round comes")
    growth: Annotated[float, Field(ge=1)] = Field(2.0, description="each interval over the one before")
    stop: Positive | None = Field(None, description="step after which the structure is frozen; null: never")
    transition: Literal["adopt", "refactor"] = Field(
        "adopt", description="a mover takes its new cluster's base as it is, or keeps its weights by new factors"
    )
    similarity: Literal["fused", "random"] = Field("fused", description="random: a control that regroups by chance")
    alpha: Fraction = Field(0.5, description="weight of the experts' parameters against what they are given")
    parameters: Literal["effective", "residual"] = Field(
        "residual", description="what of the parameters is compared: base + residual, or what an expert takes along"
    )
    router_weight: Fraction = Field(0.0, description="weight of router embeddings within what experts are given")
    load_weight: Annotated[float, Field(ge=0)] = Field(0.0, description="price of unequal loads of clusters")
    decay: Decay = Field(0.95, description="of the moving averages of what experts are given, a step")
    sketch_size: Positive = Field(64, description="rows and columns of the sketches that weights are compared by")
    threshold: Annotated[float, Field(ge=0)] = Field(
        0.02, description="least rise of a mover's mean similarity to its cluster, on the scale of a cosine"
    )
    max_moved: Annotated[float, Field(gt=0, le=1)] = Field(
        0.25, description="share of the experts a round moves at most"
    )
    max_loss_increase: Annotated[float, Field(ge=0)] = Field(
        0.002, description="moves that would raise the loss by a larger share are dropped"
    )
    guard_sequences: Positive = Field(1, description="sequences of a rank's batch on which moves are tried")
    relocate: bool = Field(
        True, description="clusters that tokens choose together go to one rank (where it holds several)"
    )


class WorldConfig(Section):
    """How ranks are laid out: world = data x cluster x shard (docs/architecture.md)."""

    data: Positive | None = Field(None, description="replicas of the same experts; null: what the ranks leave over")
    cluster: Positive | None = Field(None, description="blocks of clusters; null: as many as fit ranks and clusters")
    shard: Positive = Field(1, description="ranks that together hold one block of clusters")
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage")
    backend: Literal["auto", "gloo", "nccl"] = Field("auto", description="auto: nccl on CUDA, gloo on the CPU")
    timeout_seconds: Positive = Field(600, description="a collective that takes longer stops the run")
    threads: NonNegative = Field(0, description="CPU threads a rank; 0: the cores shared among the ranks of a node")

    @field_validator("zero_stage")
    @classmethod
    def _zero_3_refused(cls, value: int) -> int:
        if value == 3:
            raise ConfigError(
                "world.zero_stage=3 is not supported: with experts DeepSpeed's parameter hooks wait for those that got "
                "no token and hang (deepspeedai/DeepSpeed#2870); use 0, 1 or 2"
            )
        return value


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


class OptimizerConfig(Section):
    """AdamW; decay is off for norms, biases, vectors and embeddings."""

    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    router_lr_scale: Annotated[float, Field(gt=0)] = Field(
        0.1, description="the routers' learning rate over that of all else: slow enough for balancing to follow"
    )
    feed_forward_lr_scale: Annotated[float, Field(gt=0)] = Field(
        1.0, description="the same of the feed-forward layers' full matrices: clusters' bases, standard experts, dense"
    )
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="largest global gradient norm; 0: no clipping")


class TrainConfig(Section):
    """The loop: how long, how much at a time, how precise, what is reported when."""

    steps: Positive = 400
    global_batch_size: Positive = Field(32, description="sequences a step, over all ranks")
    micro_batch_size: Positive | None = Field(None, description="sequences a rank holds at once; null: no accumulation")
    precision: Literal["float32", "bfloat16"] = Field("bfloat16", description="bfloat16 keeps float32 master weights")
    schedule: Literal["cosine", "wsd"] = Field("cosine", description="wsd: warm-up, stable, decay")
    warmup_steps: NonNegative = 20
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = Field(0.2, description="share of the steps that decay (wsd)")
    final_lr_ratio: Fraction = Field(0.1, description="last learning rate over the highest")
    eval_every: NonNegative = Field(100, description="steps between evaluations; 0: only at the end")
    eval_sequences: Positive = Field(256, description="validation sequences an evaluation reads at most")
    log_every: Positive = 10

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ConfigError(f"train.warmup_steps={self.warmup_steps} must be less than train.steps={self.steps}")
        if self.micro_batch_size is not None:
            _require_divisible(
                "train.global_batch_size", self.global_batch_size, "train.micro_batch_size", self.micro_batch_size
            )
        return self


class PrecisionConfig(Section):
    """What clustered experts are stored as when they are not being updated (moe.kind=clustered)."""

    residuals: Literal["none", "qat", "post"] = Field(
        "none",
        description="factors in few bits: none; post: at the end, in evaluation and export; qat: the forward pass of "
        "training sees them so too",
    )
    bits: Literal[4, 8] = Field(4, description="of a factor's number")
    group_size: Literal[32, 64, 128] = Field(64, description="neighbouring numbers along d or f that share a scale")
    symmetric: bool = Field(True, description="no zero points beside the scales")
    scale_dtype: Literal["bfloat16", "float16"] = Field("bfloat16", description="what scales are kept as")
    bases: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="what bases are stored as; null: train.precision"
    )


class MemoryConfig(Section):
    """Experts whose weights, gradients and training state are more than a device holds (moe.kind=clustered)."""

    offload: bool = Field(False, description="clusters of experts live below the device and come to it for use")
    device_budget: Annotated[float, Field(gt=0)] = Field(
        1.0,
        description="of a device's memory for experts: bytes; or, up to 16, in parts of what weights, gradients and "
        "training state of the dense baseline's feed-forward layers take",
    )
    host_budget: Positive | None = Field(
        None, description="bytes of host memory between an accelerator and the disk; null: no limit. Unused on a CPU"
    )
    directory: str | None = Field(
        None, description="where the disk tier is, best on a local disk; null: .offload/<name> in runs_dir"
    )
    prefetch: NonNegative = Field(2, description="clusters that are fetched ahead of the one in use")


class CheckpointConfig(Section):
    """What is kept of a run, and from where it goes on (docs/checkpoints.md)."""

    every: NonNegative = Field(500, description="steps between checkpoints; 0: only where a stop is requested")
    keep_last: Positive = Field(2, description="newest checkpoints kept; older ones are deleted")
    keep_every: NonNegative = Field(0, description="a checkpoint whose step this divides is never deleted; 0: none")
    asynchronous: bool = Field(True, description="training goes on while a checkpoint is written")
    save_final: bool = Field(True, description="keep the trained weights at the end, for evaluation and export")
    resume: Annotated[str, Field(min_length=1)] = Field(
        "requeued",
        description="none; auto: the newest good checkpoint of the newest run of this name; requeued: as auto, in a "
        "job that was started again, else none; or a path: of a run, which goes on, or of a checkpoint, from which a "
        "new run branches off",
    )


class WatchdogConfig(Section):
    """What happens when a rank hangs."""

    seconds: NonNegative | None = Field(
        None,
        description="without progress for so long, all ranks write their stacks and stop; 0: never; null: half of "
        "world.timeout_seconds",
    )


class RunConfig(Section):
    """One run, whole."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        "run", description="folder in runs_dir"
    )
    runs_dir: str = "runs"
    seed: NonNegative = 0
    tensorboard: bool = True
    summary_copy: str | None = Field(None, description="a file that also receives summary.json; --json FILE sets it")
    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    recluster: ReclusterConfig = ReclusterConfig()
    world: WorldConfig = WorldConfig()
    corpus: CorpusConfig = CorpusConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    precision: PrecisionConfig = PrecisionConfig()
    memory: MemoryConfig = MemoryConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watchdog: WatchdogConfig = WatchdogConfig()

    @property
    def standard_steps(self) -> int:
        """Steps of the standard warm-up that comes before the experts are clustered; 0: there is none."""
        return round(self.moe.warmup_standard * self.train.steps)

    def phase_after(self, step: int) -> "RunConfig":
        """What the model is after `step` steps: with standard experts during their warm-up, then as configured."""
        if step >= self.standard_steps:
            return self
        moe = self.moe.model_copy(update={"kind": "standard", "warmup_standard": 0.0})
        return self.model_copy(update={"moe": moe, "recluster": ReclusterConfig(), "precision": PrecisionConfig()})

    @model_validator(mode="after")
    def _warmup_leaves_both_phases(self) -> Self:
        if self.moe.warmup_standard and not 0 < self.standard_steps < self.train.steps:
            raise ConfigError(
                f"moe.warmup_standard={self.moe.warmup_standard} of train.steps={self.train.steps} is "
                f"{self.standard_steps} steps: at least 1 must be trained before and after the experts are clustered"
            )
        return self

    @model_validator(mode="after")
    def _residuals_can_be_stored(self) -> Self:
        if self.precision.residuals != "none" and self.moe.kind != "clustered":
            raise ConfigError(
                f"precision.residuals={self.precision.residuals} works with moe.kind=clustered only, not "
                f"{self.moe.kind}: set it to none"
            )
        return self

    @model_validator(mode="after")
    def _experts_can_be_factorised(self) -> Self:
        most = min(self.model.hidden_size, self.moe.expert_hidden)
        needed = self.moe.warmup_standard > 0 or self.recluster.transition == "refactor"
        if needed and self.moe.kind == "clustered" and self.moe.rank > most:
            raise ConfigError(
                f"moe.rank={self.moe.rank} is more than experts of model.hidden_size={self.model.hidden_size} and "
                f"moe.expert_hidden={self.moe.expert_hidden} can be cut to: at most {most} with moe.warmup_standard or "
                "recluster.transition=refactor"
            )
        return self

    @model_validator(mode="after")
    def _offload_possible(self) -> Self:
        if not self.memory.offload:
            return self
        if self.moe.kind != "clustered":
            raise ConfigError(f"memory.offload=true works with moe.kind=clustered only, not {self.moe.kind}")
        if self.moe.warmup_standard or self.recluster.transition == "refactor":
            key = "moe.warmup_standard" if self.moe.warmup_standard else "recluster.transition=refactor"
            raise ConfigError(
                f"memory.offload=true does not work with {key} yet: experts would have to be whole in memory"
            )
        if self.moe.overlap_chunks not in ("auto", 1):
            raise ConfigError(
                f"moe.overlap_chunks={self.moe.overlap_chunks} does not work with memory.offload=true, which would "
                "bring a cluster in for each chunk: use auto or 1"
            )
        return self

    @model_validator(mode="after")
    def _layout_possible(self) -> Self:
        world, moe = self.world, self.moe
        if moe.kind == "clustered":
            if world.cluster is not None and moe.clusters % world.cluster:
                raise ConfigError(f"moe.clusters={moe.clusters} cannot be divided over world.cluster={world.cluster}")
            if moe.experts_per_cluster % world.shard:
                raise ConfigError(
                    f"a cluster of {moe.experts_per_cluster} experts (moe.experts={moe.experts} / "
                    f"moe.clusters={moe.clusters}) cannot be divided over world.shard={world.shard}"
                )
        self._reclustering_possible()
        if moe.kind == "standard" and moe.experts % ((world.cluster or 1) * world.shard):
            raise ConfigError(
                f"moe.experts={moe.experts} cannot be divided over world.cluster={world.cluster or 1} x "
                f"world.shard={world.shard} ranks"
            )
        return self

    def _reclustering_possible(self) -> None:
        recluster, moe = self.recluster, self.moe
        if recluster.period is None:
            return
        if moe.kind != "clustered":
            raise ConfigError(
                f"recluster.period={recluster.period} works with moe.kind=clustered only, not {moe.kind}: "
                "set it to null"
            )
        if moe.experts_per_cluster == 1 or moe.clusters == 1:
            raise ConfigError(
                f"recluster.period={recluster.period} has nothing to regroup: moe.experts={moe.experts} in "
                f"moe.clusters={moe.clusters}"
            )
        for key, value in (("period", recluster.period), ("start", recluster.start)):
            if value >= self.train.steps:
                raise ConfigError(f"recluster.{key}={value} is longer than the run: train.steps={self.train.steps}")
        if recluster.stop is not None and recluster.stop < recluster.start:
            raise ConfigError(f"recluster.stop={recluster.stop} is before recluster.start={recluster.start}")
