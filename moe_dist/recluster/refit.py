"""Refit: experts that change clusters keep their effective weights (`recluster.transition=refit`).

A cluster whose members change gets a new base, the usage-weighted mean of its members' effective weights, and all its
members get new residuals; other clusters do not change. (With `adopt`, moved experts keep their residuals instead.)
Moments of low-rank factors are reset to zero; those of bases and vectors are kept.

Shapes: B sequences, S tokens of a sequence, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from moe_dist.conversion.calibration_tokens import sample_tokens
from moe_dist.conversion.compress import CompressedLayer, compress_layer
from moe_dist.conversion.expert_grouping import usage_of
from moe_dist.conversion.read_clustered_experts import read_clustered_experts
from moe_dist.conversion.write_parameters import parameters_of, write_layer
from moe_dist.distributed.mesh import GroupKind
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.engine.gathered_optimizer_state import OwnedState, restore
from moe_dist.moe.clustered_moe import ClusteredMoE


def changed_clusters(old: ExpertPlacement, new: ExpertPlacement) -> list[int]:
    """Return the clusters whose set of members changes."""
    return [c for c in range(old.clusters) if set(old.members[c]) != set(new.members[c])]


@dataclass
class RefitResult:
    """Changes on this rank, and the values that they replaced.

    Attributes:
        saved: replaced parameters with their earlier values and optimizer states.
        bytes: bytes sent between ranks, summed over all ranks.
        errors: `|y' - y| / |y|` of expert outputs on real tokens, by layer and expert.
    """

    saved: list[tuple[nn.Parameter, Tensor, OwnedState]] = field(default_factory=list)
    bytes: int = 0
    errors: dict[int, dict[int, float]] = field(default_factory=dict)


class Refit:
    """Refit of the current experts to other placements; every change can be undone."""

    def __init__(self, engine: DeepSpeedEngine, sequences_BS: Tensor) -> None:
        """Sample tokens of a batch to fit bases and residuals, and to measure errors; collective.

        Every other sequence is used for the errors; a single sequence is used for both.
        """
        self._engine, self._model = engine, engine.model
        config, at_once = engine.config, engine.batch.micro
        halves = (sequences_BS[0::2], sequences_BS[1::2]) if len(sequences_BS) > 1 else (sequences_BS, sequences_BS)
        micro = [half.to(engine.process.device).split(at_once) for half in halves]
        (self._fit, _), (self._check, _) = (sample_tokens(self._model, batches) for batches in micro)
        self._config = config

    def apply(self, new: Sequence[ExpertPlacement]) -> RefitResult:
        """Write bases and residuals of new placements, by which the layers must route afterwards; collective."""
        done, state = RefitResult(), self._engine.training_state()
        for number, layer in enumerate(self._model.clustered_layers()):
            if clusters := changed_clusters(layer.placement, new[number]):
                compressed = self._compress(layer, new[number], clusters)
                for _, parameters in parameters_of(compressed, layer):
                    for parameter in parameters.values():
                        owned = OwnedState.of(state, parameter, self._model.context.mesh)
                        done.saved.append((parameter, parameter.detach().clone(), owned.copy()))
                write_layer(compressed, layer, state)
                done.bytes += compressed.bytes * self._model.context.mesh.shape.data
                members = [expert for cluster in clusters for expert in new[number].members[cluster]]
                done.errors[number] = {expert: float(compressed.output_error_E[expert]) for expert in members}
        return done

    def take_back(self, done: RefitResult) -> None:
        """Restore everything that was replaced, bit-identically."""
        state = self._engine.training_state()
        for parameter, value, owned in done.saved:
            restore(state, parameter, value, owned)

    def _compress(self, layer: ClusteredMoE, new: ExpertPlacement, clusters: list[int]) -> CompressedLayer:
        mesh, config = self._model.context.mesh, self._config
        fit, check = self._fit[layer.layer], self._check[layer.layer]
        usage_E = usage_of(fit, check, new.experts, mesh.group(GroupKind.EXPERT_PARALLEL))
        held = read_clustered_experts(layer, self._engine.training_state(), fit, check, clusters)
        return compress_layer(held, new, usage_E, config.moe, mesh, config.seed, clusters)
