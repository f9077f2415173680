"""Sizes, mesh and context of a standalone MoE layer."""

import math

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moe_dist.config import MoEConfig, WorldShape
from moe_dist.dispatch.traffic_ledger import TrafficLedger
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.errors import ConfigError
from moe_dist.moe.layer_context import LayerContext, StandaloneSizes


def standalone(
    kind: str,
    hidden_size: int,
    moe: MoEConfig,
    mesh: Mesh | DeviceMesh | None,
    seed: int,
    init_std: float,
    output_init_std: float | None,
    ledger: TrafficLedger | None,
) -> tuple[StandaloneSizes, LayerContext]:
    """Return sizes and context of a standalone layer; collective if a mesh must be created.

    Raises:
        ConfigError: the configuration has another kind, or the experts cannot be divided over the mesh.
    """
    if moe.kind != kind:
        raise ConfigError(f"moe.kind={moe.kind} does not make this layer: give MoEConfig(kind={kind!r}, ...)")
    ranks = mesh_for(moe, mesh)
    _check_divisible(moe, ranks.shape)
    sizes = StandaloneSizes(hidden_size, init_std, init_std if output_init_std is None else output_init_std)
    if ledger is None and dist.is_initialized():
        ledger = TrafficLedger(Links.one_node(dist.get_rank(), dist.get_world_size()))
    return sizes, LayerContext.standalone(moe, ranks, seed, ledger)


def mesh_for(moe: MoEConfig, mesh: Mesh | DeviceMesh | None) -> Mesh:
    """Return the mesh of a layer: `mesh`, or one created from a device mesh, over all ranks, or of a single process."""
    if isinstance(mesh, Mesh):
        return mesh
    if mesh is not None:
        return Mesh.from_device_mesh(mesh)
    if not dist.is_initialized():
        return Mesh.alone()
    ranks = dist.get_world_size()
    cluster = math.gcd(ranks, moe.layer_kind.cluster_units(moe, 1))
    return Mesh.over_world(WorldShape(ranks // cluster, cluster, 1))


def _check_divisible(moe: MoEConfig, shape: WorldShape) -> None:
    if moe.layer_kind.clustered:
        if moe.clusters % shape.cluster:
            raise ConfigError(f"clusters={moe.clusters} cannot be divided over a mesh of cluster={shape.cluster}")
        if moe.experts_per_cluster % shape.shard:
            raise ConfigError(
                f"a cluster of {moe.experts_per_cluster} experts cannot be divided over a mesh of shard={shape.shard}"
            )
    elif moe.experts % (shape.cluster * shape.shard):
        raise ConfigError(
            f"experts={moe.experts} cannot be divided over a mesh of cluster={shape.cluster} x shard={shape.shard}"
        )
