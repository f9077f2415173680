"""Placements in a checkpoint's manifest, and how they are laid out on another shape of ranks."""

from moe_dist.checkpoint.manifest import PlacementRecord
from moe_dist.config import WorldShape
from moe_dist.errors import CheckpointError
from moe_dist.topology.placement import ExpertPlacement


def placement_to_record(placement: ExpertPlacement) -> PlacementRecord:
    """A placement as JSON takes it."""
    return PlacementRecord(
        members=[list(cluster) for cluster in placement.members],
        block_of_cluster=list(placement.block_of_cluster),
        blocks=placement.blocks,
        shards=placement.shards,
        version=placement.version,
    )


def placement_from_record(record: PlacementRecord, shape: WorldShape) -> ExpertPlacement:
    """The placement for ranks of `shape`: clusters keep their members in their slots, whatever ranks there are.

    Where the cluster axis has another size, clusters are dealt out over its blocks in the order of their numbers.

    Raises:
        CheckpointError: the record is no placement, or cannot be laid out on that shape.
    """
    blocks = list(record.block_of_cluster)
    if record.blocks != shape.cluster:
        per_block = max(1, len(record.members) // shape.cluster)
        blocks = [cluster // per_block for cluster in range(len(record.members))]
    members = tuple(tuple(cluster) for cluster in record.members)
    try:
        return ExpertPlacement(members, tuple(blocks), shape.cluster, shape.shard, record.version)
    except (ValueError, ZeroDivisionError, IndexError) as error:
        raise CheckpointError(f"the checkpoint's placement does not fit {shape}: {error}") from error
