"""Refit: experts that change clusters keep their effective weights (`recluster.transition=refit`).

A cluster whose members change gets a new base, the usage-weighted mean of its members' effective weights, and all its
members get new residuals; other clusters do not change. (With `adopt`, moved experts keep their residuals instead.)
Moments of low-rank factors are reset to zero; those of full bases and vectors are kept.

Clusters are rewritten one after another. Replaced values are kept until the round ends: in memory, or, of offloaded
clusters, in blocks of their own (`memory/saved_cluster.py`).

Shapes: B sequences, S tokens of a sequence, E experts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from moe_dist.conversion.calibration_tokens import sample_tokens
from moe_dist.conversion.compress import CompressedCluster, compress_clusters
from moe_dist.conversion.expert_grouping import usage_of
from moe_dist.conversion.read_clustered_experts import read_clustered_experts
from moe_dist.conversion.write_parameters import write_cluster
from moe_dist.distributed.mesh import GroupKind
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.engine.gathered_optimizer_state import OwnedState, restore
from moe_dist.memory.saved_cluster import SavedCluster
from moe_dist.moe.clustered_moe import ClusteredMoE


def changed_clusters(old: ExpertPlacement, new: ExpertPlacement) -> list[int]:
    """Return the clusters whose set of members changes."""
    return [c for c in range(old.clusters) if set(old.members[c]) != set(new.members[c])]


@dataclass
class RefitResult:
    """Changes on this rank, and the values that they replaced.

    Attributes:
        undo: functions that restore replaced values.
        saved: copies of the offloaded clusters among them.
        bytes: bytes sent between ranks, summed over all ranks.
        errors: `|y' - y| / |y|` of expert outputs on real tokens, by layer and expert.
    """

    undo: list[Callable[[], None]] = field(default_factory=list)
    saved: list[SavedCluster] = field(default_factory=list)
    bytes: int = 0
    errors: dict[int, dict[int, float]] = field(default_factory=dict)


class Refit:
    """Refit of the current experts to other placements; every change can be undone."""

    def __init__(self, engine: DeepSpeedEngine, sequences_BS: Tensor) -> None:
        """Sample tokens of a batch to fit bases and residuals, and to measure errors; collective.

        Every other sequence is used for the errors; a single sequence is used for both.
        """
        self._engine, self._model = engine, engine.model
        at_once = engine.batch.micro
        halves = (sequences_BS[0::2], sequences_BS[1::2]) if len(sequences_BS) > 1 else (sequences_BS, sequences_BS)
        micro = [half.to(engine.process.device).split(at_once) for half in halves]
        numbers = [layer.layer for layer in self._model.clustered_layers()]
        sampled = (sample_tokens(self._model, batches) for batches in micro)
        self._fit, self._check = (dict(zip(numbers, of_layers, strict=True)) for of_layers, _ in sampled)

    def apply(self, new: Sequence[ExpertPlacement]) -> RefitResult:
        """Write bases and residuals of new placements, by which the layers must route afterwards; collective."""
        done = RefitResult()
        for layer in self._model.clustered_layers():
            number = layer.layer
            if clusters := changed_clusters(layer.placement, new[number]):
                for compressed in self._rewrite(layer, new[number], clusters, done):
                    done.bytes += compressed.bytes * self._model.context.mesh.shape.data
                    errors = zip(new[number].members[compressed.number], compressed.figures_M3[:, 0], strict=True)
                    done.errors.setdefault(number, {}).update({expert: float(error) for expert, error in errors})
        return done

    def take_back(self, done: RefitResult) -> None:
        """Restore everything that was replaced, bit-identically."""
        for undo in done.undo:
            undo()

    def forget(self, done: RefitResult) -> None:
        """Free the replaced values: the change is permanent."""
        done.undo.clear()
        for saved in done.saved:
            saved.drop()

    def _rewrite(
        self, layer: ClusteredMoE, new: ExpertPlacement, clusters: Sequence[int], done: RefitResult
    ) -> Iterator[CompressedCluster]:
        """Compress the clusters of a layer and write them, one after another; collective."""
        mesh, config, state = self._model.context.mesh, self._engine.config, self._engine.training_state()
        fit, check = self._fit[layer.layer], self._check[layer.layer]
        usage_E = usage_of(fit, check, new.experts, mesh.group(GroupKind.EXPERT_PARALLEL))
        saved = self._save(layer, clusters, done)
        held = read_clustered_experts(layer, state, fit, check, clusters, saved)
        for compressed in compress_clusters(held, new, usage_E, config.moe, mesh, config.seed, clusters):
            write_cluster(compressed, new, layer, state)
            yield compressed

    def _save(self, layer: ClusteredMoE, clusters: Sequence[int], done: RefitResult) -> Mapping[int, SavedCluster]:
        """Save this rank's clusters that will be rewritten; return the copies of offloaded ones by cluster."""
        context, state = self._model.context, self._engine.training_state()
        saved: dict[int, SavedCluster] = {}
        for cluster in layer.placement.clusters_of_block(context.mesh.at.cluster):
            if cluster not in clusters:
                continue
            local = layer.placement.local_index(cluster)
            if context.memory is not None:
                saved[cluster] = SavedCluster(context.memory, context.memory.clusters[layer.layer, local])
                done.undo.append(saved[cluster].restore)
                continue
            for parameter in layer.clusters[local].parameters():
                owned = OwnedState.of(state, parameter, context.mesh).copy()
                done.undo.append(partial(restore, state, parameter, state.value_of(parameter).clone(), owned))
        done.saved += saved.values()
        return saved
