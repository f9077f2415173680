"""Expert placements in a checkpoint's manifest, and their layout on another number of ranks."""

from moe_dist.checkpoint.manifest import Manifest, PlacementRecord
from moe_dist.config import WorldShape
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.errors import CheckpointError
from moe_dist.model.language_model import LanguageModel


def placement_to_record(placement: ExpertPlacement) -> PlacementRecord:
    """Convert a placement to JSON values."""
    return PlacementRecord(
        members=[list(cluster) for cluster in placement.members],
        block_of_cluster=list(placement.block_of_cluster),
        blocks=placement.blocks,
        shards=placement.shards,
        version=placement.version,
    )


def placement_from_record(record: PlacementRecord, shape: WorldShape) -> ExpertPlacement:
    """Return the placement for ranks of `shape`: clusters keep their members in their slots for any number of ranks.

    If the cluster axis has another size, clusters are distributed over its blocks in the order of their numbers.

    Raises:
        CheckpointError: the record is invalid, or does not divide over that shape.
    """
    blocks = list(record.block_of_cluster)
    if record.blocks != shape.cluster:
        per_block = max(1, len(record.members) // shape.cluster)
        blocks = [cluster // per_block for cluster in range(len(record.members))]
    members = tuple(tuple(cluster) for cluster in record.members)
    try:
        return ExpertPlacement(members, tuple(blocks), shape.cluster, shape.expert_shards, record.version)
    except (ValueError, ZeroDivisionError, IndexError) as error:
        raise CheckpointError(f"the checkpoint's placement does not fit {shape}: {error}") from error


def adopt_placements(model: LanguageModel, manifest: Manifest) -> None:
    """Set a model's placements to those of a checkpoint, before its weights are loaded.

    Raises:
        CheckpointError: they belong to another model, or do not divide over its ranks.
    """
    context, records = model.context, manifest.placements
    placements = [placement_from_record(record, context.mesh.shape) for record in records]
    sizes = [(placement.experts, placement.clusters) for placement in placements]
    if sizes != [(placement.experts, placement.clusters) for placement in context.placements]:
        raise CheckpointError("the checkpoint's placements are of another number of layers, experts or clusters")
    context.placements[:] = placements
    for layer in model.clustered_layers():
        layer.follow_placement()
