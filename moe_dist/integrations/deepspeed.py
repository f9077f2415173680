"""Clustered experts where `deepspeed.moe.layer.MoE` stood, in a model that a script trains by `deepspeed.initialize`.

DeepSpeed's own groups of `ep_size` ranks hold the clusters: a parameter of an expert or of a base carries the group's
name, as DeepSpeed's experts do, and is reduced and partitioned (ZeRO 0 to 2) over its replicas alone. For DeepSpeed's
checkpoints a cluster takes the place of an expert.
"""

from types import MethodType
from typing import Any

import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.utils import groups
from torch import Tensor, nn

from moe_dist.config import MoEConfig, WorldShape
from moe_dist.distributed.mesh import GroupKind, Mesh
from moe_dist.engine import gradient_norm
from moe_dist.errors import ConfigError
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.parameter_class import OF_EXPERTS, class_of, copies_of
from moe_dist.moe.training_step import moe_layers, update_load_balance

STORED_AS = {"layer.clusters.": "deepspeed_moe.experts.deepspeed_experts.", "layer.expert_bias_E": "layer.slot_bias_E"}
"""Names in a state dict, by our names: DeepSpeed takes every name with 'expert' in it as one of a numbered expert."""


class DeepSpeedClusteredMoE(MoE):  # type: ignore[misc]
    """Clustered layer with the interface of `deepspeed.moe.layer.MoE`: returns (output, auxiliary loss, counts)."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float | None = None,
        *,
        clusters: int,
        expert_hidden: int,
        rank: int,
        seed: int = 0,
        init_std: float = 0.02,
        batch_first: bool = False,
        **moe: Any,
    ) -> None:
        """Create the layer; collective, after `deepspeed.init_distributed`.

        Args:
            hidden_size, num_experts, ep_size, k: as in DeepSpeed; `ep_size` consecutive ranks hold all clusters once.
            capacity_factor: capacity of a cluster and of an expert as multiples of a uniform share; None: no dropping.
            clusters: number of clusters, a multiple of `ep_size`.
            expert_hidden: hidden width of an expert.
            rank: rank of an expert's residual.
            seed, init_std: seed and standard deviation of the initial weights, which do not depend on the ranks.
            batch_first: True: inputs are [B, S, D]; False: [S, B, D]. A token's sequence decides the cluster router's
                gradient where each token has one cluster.
            moe: further keys of `MoEConfig`; balance is 'bias' or 'none'.

        Raises:
            ConfigError: the ranks cannot hold the clusters, or the losses of the configuration need DeepSpeed's scale.
        """
        nn.Module.__init__(self)
        config = MoEConfig(
            experts=num_experts,
            clusters=clusters,
            top_k=k,
            expert_hidden=expert_hidden,
            rank=rank,
            capacity_factor=capacity_factor,
            **moe,
        )
        self.num_experts, self.ep_size, self.expert_group_name = num_experts, ep_size, f"ep_size_{ep_size}"
        self.batch_first = batch_first
        self.layer = ClusteredMoE(hidden_size, config, mesh=_mesh(ep_size, config), seed=seed, init_std=init_std)
        self.num_local_experts = len(self.layer.clusters)  # of a checkpoint
        for parameter in self.layer.parameters():
            if class_of(parameter) in OF_EXPERTS:
                parameter.allreduce = False  # type: ignore[attr-defined]
                parameter.group_name = self.expert_group_name  # type: ignore[attr-defined]
        self.register_state_dict_post_hook(_rename_stored)
        self.register_load_state_dict_pre_hook(_rename_loaded)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Create DeepSpeed's groups; its engine calls this.

        Raises:
            ConfigError: the groups have other ranks than the layer's.
        """
        name = self.expert_group_name
        if name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(
                self.ep_size, use_data_before_expert_parallel_=use_data_before_expert_parallel_
            )
        ranks = list(self.layer.context.mesh.group(GroupKind.EXPERT_PARALLEL).ranks)
        found = list(groups._EXPERT_PARALLEL_GROUP_RANKS[name])
        if found != ranks:
            raise ConfigError(
                f"DeepSpeed's group {name} has ranks {found}, the clustered layer's {ranks}: use neither "
                "use_data_before_expert_parallelism nor model parallelism"
            )

    def forward(self, hidden_states: Tensor, used_token: None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output, 0 as auxiliary loss (balancing needs none), and the copies for each expert on this rank.

        Raises:
            ConfigError: `used_token` is given.
        """
        if used_token is not None:
            raise ConfigError("used_token is not supported by clustered layers: give only the tokens that are used")
        count_E = self.layer.balance.count_LE[0]
        before_E = count_E.clone()
        sequence_first = hidden_states.transpose(0, 1) if self.batch_first else hidden_states
        output = self.layer(sequence_first)
        output = output.transpose(0, 1) if self.batch_first else output
        return output, hidden_states.new_zeros(()), count_E - before_E


def attach(engine: Any) -> None:
    """Clip by the exact gradient norm, and update the selection biases after each optimizer step.

    Call it once, after `deepspeed.initialize`. DeepSpeed's own norm, and so its clipping, depends on `ep_size`
    (deepspeedai/DeepSpeed#8475).

    Raises:
        ConfigError: the model has no clustered layer, or the engine's optimizer is not supported.
    """
    mesh = moe_layers(engine.module)[0].context.mesh
    if isinstance(engine.optimizer, BF16_Optimizer):
        raise ConfigError("DeepSpeed's BF16_Optimizer is not supported: use zero_optimization.stage 1 or 2 with bf16")
    gradient_norm.install(engine, lambda parameter: copies_of(parameter, mesh), engine.gradient_clipping())
    step = engine.optimizer.step

    def step_and_balance(_: Any, *args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        update_load_balance(engine.module)
        return result

    engine.optimizer.step = MethodType(step_and_balance, engine.optimizer)


def _mesh(ep_size: int, moe: MoEConfig) -> Mesh:
    """Return the mesh over all ranks in which `ep_size` consecutive ranks hold all clusters once."""
    if not dist.is_initialized():
        raise ConfigError("no process group: call deepspeed.init_distributed() before the layers are created")
    if moe.balance == "aux_loss" or moe.z_loss_weight:
        raise ConfigError(f"balance={moe.balance}, z_loss_weight={moe.z_loss_weight}: use balance='bias' and no z-loss")
    ranks = dist.get_world_size()
    if ranks % ep_size or moe.clusters % ep_size:
        raise ConfigError(f"ep_size={ep_size} must divide the number of ranks ({ranks}) and clusters={moe.clusters}")
    return Mesh.over_world(WorldShape(ranks // ep_size, ep_size, 1))


def _rename_stored(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
    """Replace our names by those of `STORED_AS`; a state-dict hook."""
    _rename(state, {f"{prefix}{ours}": f"{prefix}{stored}" for ours, stored in STORED_AS.items()})


def _rename_loaded(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    """Replace the names of `STORED_AS` by ours; a load-state-dict hook."""
    _rename(state, {f"{prefix}{stored}": f"{prefix}{ours}" for ours, stored in STORED_AS.items()})


def _rename(state: dict[str, Any], new_by_old: dict[str, str]) -> None:
    for old, new in new_by_old.items():
        for name in [name for name in state if name.startswith(old)]:
            state[new + name.removeprefix(old)] = state.pop(name)
