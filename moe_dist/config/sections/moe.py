"""Experts: kind, number, sizes, balancing and routing."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moe_dist.config.layer_kinds import LAYER_KINDS, DenseKind
from moe_dist.config.sections.base import NonNegative, Positive, Section

WireDtype = Literal["float32", "bfloat16", "float16", "int8"]


class MoEConfig(Section):
    """Feed-forward part of every layer: clustered experts, standard experts, or one dense network."""

    kind: Literal["clustered", "standard", "dense"] = Field(
        "clustered", description="clustered experts, standard experts, or one dense network"
    )
    experts: Positive = Field(32, description="E: experts per layer")
    clusters: Positive = Field(4, description="G: clusters of E/G experts (clustered)")
    top_clusters: Positive = Field(1, description="m: clusters per token (clustered)")
    top_k: Positive = Field(
        2, description="k: experts per token, in each chosen cluster (clustered) or among all (standard)"
    )
    expert_hidden: Positive = Field(256, description="f: hidden width of an expert, and of a cluster's base")
    dense_hidden: Positive | None = Field(None, description="hidden width of `dense`; null: top_k * expert_hidden")
    dense_layers: NonNegative = Field(
        0, description="leading layers with a dense network of dense_hidden in the place of experts"
    )
    rank: Positive = Field(4, description="r: rank of an expert's residual (clustered)")
    base: Literal["cluster", "shared+cluster"] = Field(
        "cluster",
        description="base of a cluster: full weights of its own, or full weights shared by all clusters plus low-rank "
        "factors of its own, W_i = B + P_c Q_c + U_i V_i (clustered)",
    )
    base_rank: Positive = Field(8, description="R: rank of a cluster's factors (base: shared+cluster)")
    expert_vectors: bool = Field(
        True, description="per-expert gates and biases of hidden units, and output biases (clustered)"
    )
    shared_init: bool = Field(
        False, description="initialize all bases (clustered) or all experts (standard) with the same values"
    )
    warmup_standard: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the steps that train standard experts before these are clustered (clustered)"
    )
    normalize_gates: bool = Field(
        True,
        description="gates of a token sum to 1; false: they are a softmax over all experts (standard) or all of the "
        "chosen clusters (clustered)",
    )
    score: Literal["softmax", "sigmoid"] = Field(
        "softmax",
        description="function of an expert's logit that gates are made of; selection biases are added to logits, "
        "or to sigmoids",
    )
    groups: Positive = Field(
        1, description="groups of neighboring experts, of which a token chooses top_groups first (standard)"
    )
    top_groups: Positive = Field(1, description="groups per token (standard)")
    shared_expert_hidden: NonNegative = Field(
        0, description="hidden width of an expert that computes every token; 0: none"
    )
    shared_expert_gate: bool = Field(False, description="scale the shared expert's output by a learned sigmoid gate")
    balance: Literal["bias", "aux_loss", "none"] = Field(
        "bias", description="load balancing: selection biases, auxiliary loss, or none"
    )
    balance_rate: Annotated[float, Field(ge=0)] = Field(
        0.02, description="update of a selection bias per step (balance: bias)"
    )
    aux_loss_weight: Annotated[float, Field(ge=0)] = Field(
        0.01, description="weight of the auxiliary loss (balance: aux_loss)"
    )
    z_loss_weight: Annotated[float, Field(ge=0)] = Field(0.0, description="weight of the router z-loss, for each stage")
    capacity_factor: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="capacity of a cluster and of an expert, as a multiple of a uniform share; null: no dropping",
    )
    gate_scale: Annotated[float, Field(gt=0)] = Field(1.0, description="sum of a token's gates")
    backend: Literal["auto", "masked", "sorted", "cpu", "triton", "reference"] = Field(
        "auto", description="kernel of clustered experts; auto: the fastest for the run's shape, measured once"
    )
    wire_dtype: WireDtype = Field(
        "bfloat16", description="type of hidden vectors in all-to-alls; int8: with a scale per vector"
    )
    overlap_chunks: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = Field(
        "auto",
        description="chunks of a rank's tokens whose all-to-all overlaps with the computation of others (clustered); "
        "auto: chosen by speeds measured at the start",
    )

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        self.layer_kind.check(self)
        return self

    @property
    def layer_kind(self) -> DenseKind:
        """Description of the kind of layer."""
        return LAYER_KINDS[self.kind]

    @property
    def two_level_base(self) -> bool:
        """True if all clusters of a layer share full weights, to which each adds low-rank factors."""
        return self.layer_kind.clustered and self.base == "shared+cluster"

    @property
    def needs_whole_batches(self) -> str | None:
        """Key that requires all tokens of a micro-batch together, or None."""
        if self.capacity_factor is not None:
            return f"moe.capacity_factor={self.capacity_factor}"
        return "moe.balance=aux_loss" if self.balance == "aux_loss" and self.aux_loss_weight else None

    @property
    def experts_per_cluster(self) -> int:
        """Experts per cluster, n = E/G."""
        return self.experts // self.clusters

    @property
    def dense_width(self) -> int:
        """Hidden width of the dense network with the same active width as `standard`."""
        return self.dense_hidden or self.top_k * self.expert_hidden
