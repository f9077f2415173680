"""Clustered experts as the feed-forward part of a Megatron-core transformer layer, trained by Megatron's own DDP.

Megatron's expert-parallel group holds the clusters once, and its expert-data-parallel group holds their replicas.
Parameters of clusters carry `allreduce = False`, by which DDP, optimizer and gradient norm take them as experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from megatron.core import distributed, parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer as MegatronMoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_sharded_tensor_for_checkpoint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_dist.config import MoEConfig
from moe_dist.distributed.mesh import Mesh
from moe_dist.errors import ConfigError
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.parameter_class import OF_EXPERTS, class_of
from moe_dist.moe.training_step import update_load_balance


def clustered_moe_spec(
    moe: MoEConfig, *, seed: int = 0, init_std: float | None = None, output_init_std: float | None = None
) -> ModuleSpec:
    """Return the spec of a clustered layer, for `mlp` of a transformer layer's submodules.

    Args:
        moe: configuration of the layer; balance is 'bias' or 'none'.
        seed: seed of the initial weights, which depend on it and on the layer's number alone.
        init_std: standard deviation of the initial weights; None: the transformer's `init_method_std`.
        output_init_std: that of the weights that add to the residual stream; None: Megatron's, init_std / sqrt(2 L).
    """
    options = {"moe": moe, "seed": seed, "init_std": init_std, "output_init_std": output_init_std}
    return ModuleSpec(module=MegatronClusteredMoE, params=options)


class MegatronClusteredMoE(MegatronMoELayer):  # type: ignore[misc]
    """Clustered layer with the interface of Megatron-core's `MoELayer`, which decides recomputation in its layers."""

    def __init__(
        self,
        config: TransformerConfig,
        moe: MoEConfig,
        seed: int = 0,
        init_std: float | None = None,
        output_init_std: float | None = None,
        layer_number: int | None = None,
        **_: Any,
    ) -> None:
        """Prepare the layer, whose weights `set_layer_number` creates; arguments are those of `clustered_moe_spec`.

        Raises:
            ConfigError: the layer cannot be trained as the transformer's configuration wants.
        """
        _check(config, moe)
        MegatronModule.__init__(self, config)
        std = config.init_method_std if init_std is None else init_std
        scaled = std / (2 * config.num_layers) ** 0.5 if output_init_std is None else output_init_std
        self._create: Callable[[int], ClusteredMoE] = lambda number: ClusteredMoE(
            config.hidden_size, moe, mesh=megatron_mesh(), seed=seed + number - 1, init_std=std, output_init_std=scaled
        )
        self.use_shared_expert = self.shared_expert_overlap = False  # of Megatron's own; ours is part of the layer
        recomputed = config.recompute_modules if config.recompute_granularity == "selective" else ()
        self.moe_layer_recompute = "moe" in recomputed
        if layer_number is not None:
            self.set_layer_number(layer_number)

    def set_layer_number(self, layer_number: int) -> None:
        """Create the weights; Megatron-core sets the number, counted from 1, after the construction. Collective."""
        self.layer_number = layer_number
        self.layer = self._create(layer_number)
        for parameter in self.layer.parameters():
            if class_of(parameter) in OF_EXPERTS:
                parameter.allreduce = False  # type: ignore[attr-defined]

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: None = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Return the output of `hidden_states` [S, B, D], and no bias; padding is routed like other tokens."""
        # Megatron's recomputation runs its first pass without gradients: each token is counted in the other one
        with self._counting(torch.is_grad_enabled()):
            if self.moe_layer_recompute and torch.is_grad_enabled():
                output = checkpoint(
                    self.layer,
                    hidden_states,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=lambda: (nullcontext(), self._counting(False)),
                )
            else:
                output = self.layer(hidden_states)
        return output, None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the state for Megatron's distributed checkpoints: cluster by cluster, for any expert parallelism."""
        mesh, placement, found = self.layer.context.mesh, self.layer.placement, {}
        here = placement.clusters_of_block(mesh.at.cluster)
        for name, tensor in self.state_dict(keep_vars=True).items():
            key, offsets, replica = name, sharded_offsets, None
            if name.startswith("layer.clusters."):
                local, _, rest = name.removeprefix("layer.clusters.").partition(".")
                key = f"layer.clusters.{rest}"
                offsets = (*sharded_offsets, (len(sharded_offsets), here[int(local)], placement.clusters))
                replica = (0, 0, mesh.at.data)
            found[prefix + name] = make_sharded_tensor_for_checkpoint(
                tensor, prefix + key, prepend_offsets=offsets, replica_id=replica
            )
        return found

    @contextmanager
    def _counting(self, counting: bool) -> Iterator[None]:
        """Count loads only if `counting`."""
        balance = self.layer.balance
        before, balance.counting = balance.counting, balance.counting and counting
        try:
            yield
        finally:
            balance.counting = before


def finalize_model_grads(model: list[nn.Module], *args: Any, **kwargs: Any) -> None:
    """Finalize gradients by Megatron's function of this name, then update the selection biases; collective.

    Set it as `finalize_model_grads_func` of the transformer's configuration.
    """
    distributed.finalize_model_grads(model, *args, **kwargs)
    for chunk in model:
        update_load_balance(chunk)


def megatron_mesh() -> Mesh:
    """Return the mesh of Megatron's expert-parallel and expert-data-parallel groups.

    Raises:
        ConfigError: Megatron's groups were not created.
    """
    if not parallel_state.model_parallel_is_initialized():
        raise ConfigError("Megatron-core has no groups: call parallel_state.initialize_model_parallel first")
    return Mesh.from_process_groups(
        parallel_state.get_expert_model_parallel_group(), parallel_state.get_expert_data_parallel_group()
    )


def _check(config: TransformerConfig, moe: MoEConfig) -> None:
    if moe.balance == "aux_loss" or moe.z_loss_weight:
        raise ConfigError(f"balance={moe.balance}, z_loss_weight={moe.z_loss_weight}: use balance='bias' and no z-loss")
    if config.tensor_model_parallel_size > 1 or config.expert_tensor_parallel_size not in (None, 1):
        raise ConfigError(
            f"tensor_model_parallel_size={config.tensor_model_parallel_size}, expert_tensor_parallel_size="
            f"{config.expert_tensor_parallel_size}: clustered layers need 1 for both"
        )
    if config.cuda_graph_impl != "none":
        raise ConfigError(
            f"cuda_graph_impl={config.cuda_graph_impl}: clustered layers need 'none'; rows of a rank vary"
        )
