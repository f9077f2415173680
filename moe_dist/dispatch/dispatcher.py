"""Interface of all cluster dispatchers, and the values passed from `dispatch` to `combine`.

    chunks, metadata = dispatcher.dispatch(x_TD, routing)       send rows to the ranks of their clusters, in chunks
    computed = map(experts, chunks)                             lazy: chunk c + 1 is exchanged while c is computed
    y_TD = dispatcher.combine(computed, metadata)               return results to their sources, weighted by their gates

Shapes: T tokens here, R rows of one cluster, D hidden, G clusters, M chosen clusters, L clusters of this rank.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from moe_dist.distributed.mesh import RankGroup


@dataclass(frozen=True)
class ClusterRouting:
    """Stage one's decision for the tokens of a micro-batch.

    Attributes:
        keep_TM: choices within the capacity, bool; None: all.
        sequences: number of sequences that the tokens belong to; token t belongs to sequence t % sequences.
        sequence_group: ranks that hold the other tokens of these sequences; None: they are whole.
    """

    logits_TG: Tensor
    cluster_TM: Tensor
    keep_TM: Tensor | None
    sequences: int
    sequence_group: RankGroup | None = None


class ClusterOutput(NamedTuple):
    """Result of one cluster for its rows: the gated sum of the chosen experts, and their log-mass (logsumexp)."""

    y_RD: Tensor
    log_mass_R: Tensor


@dataclass(frozen=True)
class DispatchedChunk:
    """Rows of one chunk on the rank of their clusters.

    Attributes:
        rows_L: x_RD of each local cluster.
        metadata: private metadata of the dispatcher that made the chunk.
    """

    rows_L: Sequence[Tensor]
    metadata: Any

    def computed(self, outputs_L: Sequence[ClusterOutput]) -> "ComputedChunk":
        """Return the chunk with the outputs of its clusters in place of their rows."""
        return ComputedChunk(outputs_L, self.metadata)


@dataclass(frozen=True)
class ComputedChunk:
    """Outputs of one chunk's clusters, still on their rank."""

    outputs_L: Sequence[ClusterOutput]
    metadata: Any


class ClusterDispatcher(Protocol):
    """Exchange of rows between the ranks of tokens and the ranks of clusters."""

    @property
    def chunks(self) -> int:
        """Number of chunks that are exchanged and computed in turn."""

    @property
    def single_cluster(self) -> bool:
        """True if each token has one cluster; stage two's router is then trained by the experts' gates alone."""

    def dispatch(self, x_TD: Tensor, routing: ClusterRouting) -> tuple[Iterator[DispatchedChunk], Any]:
        """Send rows to the ranks of their clusters; return an iterator of chunks, and the metadata for `combine`."""

    def combine(self, computed: Iterable[ComputedChunk], metadata: Any) -> Tensor:
        """Return results to their source ranks and sum them, weighted by the clusters' gates; return y_TD."""
