"""Kinds of feed-forward layer, described without torch: layout, parameters, work and memory as formulas.

The modules themselves are registered in `moe_dist/moe/layer_kinds.py`; everything else asks the description of a kind
(`config.moe.layer_kind`) instead of its name.

Symbols: d model.hidden_size, f moe.expert_hidden, r moe.rank, E experts, G clusters, N = E/G, m top_clusters, k top_k.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple

from moe_dist.config.sections.base import require_divisible
from moe_dist.errors import ConfigError

if TYPE_CHECKING:
    from moe_dist.config.sections.moe import MoEConfig
    from moe_dist.config.sections.world import WorldConfig

PROJECTIONS = 3
"""Matrices of a SwiGLU: gate, up and out."""
ROUTING_STATE = 40
"""Numbers of routing that a clustered layer's backward pass needs per token."""


class LayerParameters(NamedTuple):
    """Parameters of one layer on one rank by class."""

    dense: int
    base: int
    expert: int


class LayerWork(NamedTuple):
    """Forward FLOPs of one layer: per token outside its experts, per dispatched row, and rows per token.

    A row is one copy at one expert (standard) or one token at one cluster with its k experts (clustered).
    """

    token: float
    row: float
    rows: int


class DenseKind:
    """One dense SwiGLU network; the base class of the descriptions."""

    name = "dense"
    routed = False
    """True if there are a router and experts."""
    clustered = False
    """True if experts share the base of their cluster."""
    dispatch: Literal["none", "flat", "two_stage"] = "none"
    """Way of tokens to experts: to experts directly, or to clusters and then to experts."""

    def check(self, moe: "MoEConfig") -> None:
        """Reject keys that do not fit together.

        Raises:
            ConfigError: names keys and values.
        """
        if moe.warmup_standard:
            raise ConfigError(
                f"moe.warmup_standard={moe.warmup_standard} works with moe.kind=clustered only, not {self.name}: set "
                "it to 0"
            )

    def check_layout(self, world: "WorldConfig", moe: "MoEConfig") -> None:
        """Require that experts divide over the mesh axes that are set.

        Raises:
            ConfigError: names keys and values.
        """

    def units(self, moe: "MoEConfig") -> tuple[int, int]:
        """Return the numbers that the cluster axis and the shard axis may divide."""
        return 1, 1

    def cluster_units(self, moe: "MoEConfig", shard: int) -> int:
        """Return the number that the cluster axis must divide beside a shard axis of this size."""
        return 1

    def copies(self, moe: "MoEConfig") -> int:
        """Return the experts that compute each token."""
        return 0

    def describe(self, moe: "MoEConfig") -> str:
        """Return a few words for the start of a run."""
        return f"dense, width {moe.dense_width}"

    def parameters(self, d: int, moe: "MoEConfig", cluster: int, shard: int, sliced: bool = False) -> LayerParameters:
        """Return the parameters of one layer on a rank of a mesh with these axes (`WorldShape`)."""
        return LayerParameters(PROJECTIONS * d * moe.dense_width, 0, 0)

    def work(self, d: int, moe: "MoEConfig") -> LayerWork:
        """Return the forward FLOPs of one layer; multiply and add count as two."""
        return LayerWork(2.0 * PROJECTIONS * d * moe.dense_width, 0.0, 0)

    def saved_elements(self, d: int, moe: "MoEConfig") -> float:
        """Return the numbers per token that the backward pass of one layer needs."""
        return 4.0 * moe.dense_width

    def standard_parameters(self, d: int, moe: "MoEConfig") -> int:
        """Return the parameters of as many standard experts of one layer; 0 without experts."""
        return 0


class StandardKind(DenseKind):
    """E full experts, of which each token takes k."""

    name = "standard"
    routed = True
    dispatch: Literal["none", "flat", "two_stage"] = "flat"

    def check(self, moe: "MoEConfig") -> None:
        """Reject keys that do not fit together."""
        super().check(moe)
        if moe.top_k > moe.experts:
            raise ConfigError(f"moe.top_k={moe.top_k} is larger than moe.experts={moe.experts}")
        check_shared_expert(moe)
        check_groups(moe)

    def check_layout(self, world: "WorldConfig", moe: "MoEConfig") -> None:
        """Require that experts divide over clusters and shards."""
        if moe.experts % ((world.cluster or 1) * world.shard):
            raise ConfigError(
                f"moe.experts={moe.experts} cannot be divided over world.cluster={world.cluster or 1} x "
                f"world.shard={world.shard} ranks"
            )

    def units(self, moe: "MoEConfig") -> tuple[int, int]:
        """Return E and 1."""
        return moe.experts, 1

    def cluster_units(self, moe: "MoEConfig", shard: int) -> int:
        """Return the experts per shard."""
        return moe.experts // shard

    def copies(self, moe: "MoEConfig") -> int:
        """Return k."""
        return moe.top_k

    def describe(self, moe: "MoEConfig") -> str:
        """Return a few words for the start of a run."""
        return f"{moe.experts} standard experts, {moe.top_k} for each token"

    def parameters(self, d: int, moe: "MoEConfig", cluster: int, shard: int, sliced: bool = False) -> LayerParameters:
        """Return the router and shared expert, and this rank's experts."""
        expert = moe.experts // (cluster * shard) * PROJECTIONS * d * moe.expert_hidden
        return LayerParameters(d * moe.experts + shared_expert_parameters(d, moe), 0, expert)

    def work(self, d: int, moe: "MoEConfig") -> LayerWork:
        """Return router and shared expert, an expert, and k."""
        token = 2.0 * (d * moe.experts + shared_expert_parameters(d, moe))
        return LayerWork(token, 2.0 * PROJECTIONS * d * moe.expert_hidden, moe.top_k)

    def saved_elements(self, d: int, moe: "MoEConfig") -> float:
        """Return the numbers of k copies and of the shared expert."""
        k = moe.top_k
        return 2 * k * d + k * 4 * moe.expert_hidden + 4 * moe.shared_expert_hidden + 12 + 9 * k

    def standard_parameters(self, d: int, moe: "MoEConfig") -> int:
        """Return the parameters of E experts."""
        return moe.experts * PROJECTIONS * d * moe.expert_hidden


class ClusteredKind(StandardKind):
    """G clusters of E/G experts that share a base and have low-rank residuals."""

    name = "clustered"
    clustered = True
    dispatch: Literal["none", "flat", "two_stage"] = "two_stage"

    def check(self, moe: "MoEConfig") -> None:
        """Reject keys that do not fit together."""
        require_divisible("moe.experts", moe.experts, "moe.clusters", moe.clusters)
        if moe.top_k > moe.experts_per_cluster:
            raise ConfigError(
                f"moe.top_k={moe.top_k} is larger than a cluster: moe.experts={moe.experts} / "
                f"moe.clusters={moe.clusters} = {moe.experts_per_cluster} experts"
            )
        if moe.top_clusters > moe.clusters:
            raise ConfigError(f"moe.top_clusters={moe.top_clusters} is larger than moe.clusters={moe.clusters}")
        if moe.groups > 1:
            raise ConfigError(f"moe.groups={moe.groups} works with moe.kind=standard only: clusters take their place")
        if moe.score == "sigmoid" and not moe.normalize_gates:
            raise ConfigError("moe.score=sigmoid works with moe.normalize_gates=true only, if experts are clustered")
        if moe.overlap_chunks not in ("auto", 1) and (key := moe.needs_whole_batches):
            raise ConfigError(
                f"moe.overlap_chunks={moe.overlap_chunks} does not work with {key}, which needs all tokens of "
                "a micro-batch together: use auto or 1"
            )
        check_shared_expert(moe)

    def check_layout(self, world: "WorldConfig", moe: "MoEConfig") -> None:
        """Require that clusters divide over the cluster axis and experts of a cluster over the shard axis."""
        if world.cluster is not None and moe.clusters % world.cluster:
            raise ConfigError(f"moe.clusters={moe.clusters} cannot be divided over world.cluster={world.cluster}")
        if world.shard_mode == "experts" and moe.experts_per_cluster % world.shard:
            raise ConfigError(
                f"a cluster of {moe.experts_per_cluster} experts (moe.experts={moe.experts} / "
                f"moe.clusters={moe.clusters}) cannot be divided over world.shard={world.shard}"
            )
        if world.shard_mode == "slice" and moe.expert_hidden % world.shard:
            raise ConfigError(
                f"moe.expert_hidden={moe.expert_hidden} cannot be divided into world.shard={world.shard} slices"
            )

    def units(self, moe: "MoEConfig") -> tuple[int, int]:
        """Return G and E/G."""
        return moe.clusters, moe.experts_per_cluster

    def cluster_units(self, moe: "MoEConfig", shard: int) -> int:
        """Return G."""
        return moe.clusters

    def copies(self, moe: "MoEConfig") -> int:
        """Return k experts in each of m clusters."""
        return moe.top_k * moe.top_clusters

    def describe(self, moe: "MoEConfig") -> str:
        """Return a few words for the start of a run."""
        chosen = "1 cluster" if moe.top_clusters == 1 else f"each of {moe.top_clusters} clusters"
        experts = f"{moe.top_k} expert{'s' if moe.top_k > 1 else ''}"
        return (
            f"{moe.experts} experts in {moe.clusters} clusters, {experts} of {chosen} for each token, rank {moe.rank}"
        )

    def parameters(self, d: int, moe: "MoEConfig", cluster: int, shard: int, sliced: bool = False) -> LayerParameters:
        """Return the router, this rank's bases, and its residuals."""
        clusters = moe.clusters // cluster
        residuals = clusters * (moe.experts_per_cluster // shard) * residual_parameters(d, moe)
        full = PROJECTIONS * d * moe.expert_hidden
        dense = d * moe.experts + shared_expert_parameters(d, moe)
        if sliced:
            experts = clusters * moe.experts_per_cluster
            whole = experts * (3 * moe.rank * d + (d if moe.expert_vectors else 0))  # U of the input, V of the output
            divided = experts * residual_parameters(d, moe) - whole
            return LayerParameters(dense, whole, (clusters * full + divided) // shard)
        if moe.two_level_base:
            factors = moe.base_rank * (2 * d + PROJECTIONS * moe.expert_hidden)
            return LayerParameters(dense + full, clusters * factors, residuals)
        return LayerParameters(dense, clusters * full, residuals)

    def work(self, d: int, moe: "MoEConfig") -> LayerWork:
        """Return the cluster router, one base with k residuals and its router, and m.

        The d-wide parts of the residuals are computed for all experts of a cluster, the f-wide parts for the k chosen.
        """
        n, f = moe.experts_per_cluster, moe.expert_hidden
        thin = 2.0 * 3 * moe.rank * (n * d + moe.top_k * f)
        token = 2.0 * (d * moe.clusters + shared_expert_parameters(d, moe))
        return LayerWork(token, 2.0 * PROJECTIONS * d * f + thin + 2.0 * d * n, moe.top_clusters)

    def saved_elements(self, d: int, moe: "MoEConfig") -> float:
        """Return the numbers of m clusters; kernels of one pass save less than plain torch."""
        m, k = moe.top_clusters, moe.top_k
        hidden = 7 * k + 1.6 if k > 1 else 13.7
        if moe.backend in ("cpu", "triton"):
            hidden = 3.4
        saved = (2.9 + 4 * (m - 1)) * d + m * hidden * moe.expert_hidden + ROUTING_STATE + 11 * moe.rank * m * k
        return saved + 4 * moe.shared_expert_hidden


def check_groups(moe: "MoEConfig") -> None:
    """Require that experts divide into groups, and that those that a token chooses hold enough experts.

    Raises:
        ConfigError: names keys and values.
    """
    require_divisible("moe.experts", moe.experts, "moe.groups", moe.groups)
    size = moe.experts // moe.groups
    least = 2 if moe.score == "sigmoid" and moe.groups > 1 else 1
    if moe.top_groups > moe.groups or moe.top_groups * size < moe.top_k or size < least:
        raise ConfigError(
            f"moe.top_groups={moe.top_groups} of moe.groups={moe.groups} with {size} experts each: must be at most "
            f"moe.groups, hold moe.top_k={moe.top_k} experts, and {least} each"
        )


def check_shared_expert(moe: "MoEConfig") -> None:
    """Require a shared expert for its gate.

    Raises:
        ConfigError: there is none.
    """
    if moe.shared_expert_gate and not moe.shared_expert_hidden:
        raise ConfigError(
            "moe.shared_expert_gate=true needs a shared expert: moe.shared_expert_hidden must be >= 1, got 0"
        )


def shared_expert_parameters(d: int, moe: "MoEConfig") -> int:
    """Return the parameters of the shared expert and its gate; 0 without one."""
    return d * (PROJECTIONS * moe.shared_expert_hidden + moe.shared_expert_gate)


def residual_parameters(d: int, moe: "MoEConfig") -> int:
    """Return the parameters of one expert: factors of both matrices; vectors: gate, two hidden biases, output bias."""
    return factor_parameters(d, moe) + (3 * moe.expert_hidden + d if moe.expert_vectors else 0)


def factor_parameters(d: int, moe: "MoEConfig") -> int:
    """Return the parameters of the low-rank factors of one expert."""
    return 3 * moe.rank * (d + moe.expert_hidden)


LAYER_KINDS: dict[str, DenseKind] = {kind.name: kind for kind in (ClusteredKind(), StandardKind(), DenseKind())}
"""Descriptions by the value of `moe.kind`."""
