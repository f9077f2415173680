"""Clusters that are not trained: bytes in every tier, brought up as they are, within the budget, and never written."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_dist.compression import ClusterWeights, GroupFormat, QuantizedCluster, StorageFormat
from moe_dist.config import RunConfig, load_config
from moe_dist.errors import ConfigError, OffloadError
from moe_dist.memory.quantized_clusters import QuantizedBlock, QuantizedClusterMemory
from moe_dist.moe.quantized_experts import QuantizedClusterExperts

CPU = torch.device("cpu")
LAYERS, CLUSTERS, BYTES = 2, 3, 1000
FORM = StorageFormat(GroupFormat(group_size=32), torch.bfloat16)


def config(path: Path, budget: int, prefetch: int = 0) -> RunConfig:
    memory = [f"memory.device_budget_bytes={budget}", f"memory.directory={path}", f"memory.prefetch={prefetch}"]
    return load_config(None, [f"model.layers={LAYERS}", "memory.offload=true", *memory])


def filled(path: Path, at_once: int, prefetch: int = 0) -> tuple[QuantizedClusterMemory, list[QuantizedBlock]]:
    memory = QuantizedClusterMemory(config(path, at_once * BYTES, prefetch), CLUSTERS, 0, CPU)
    places = [(layer, local) for layer in range(LAYERS) for local in range(CLUSTERS)]
    return memory, [memory.adopt(*place, values(number)) for number, place in enumerate(places)]


def values(number: int) -> Tensor:
    return torch.full((BYTES,), number, dtype=torch.uint8)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("at_once", [1, 4, 6])
def test_every_pass_finds_the_bytes_within_the_budget(tmp_path: Path, at_once: int, prefetch: int) -> None:
    memory, blocks = filled(tmp_path, at_once, prefetch)
    written = memory.tiers.figures()["bytes_out"]
    for _ in range(3):
        for number, block in enumerate(blocks):
            with block.pinned(10) as flat:
                assert torch.equal(flat, values(number))
    figures = memory.tiers.figures()
    assert figures["peak_device_bytes"] <= at_once * BYTES
    assert figures["bytes_out"] <= max(written, len(blocks) * BYTES), "each once: nothing of it changes"
    memory.close()
    assert not (tmp_path / "rank-00000").exists()


def test_what_has_room_stays_from_pass_to_pass(tmp_path: Path) -> None:
    """Passes always begin at the first layer: what was used last is needed last, and leaves."""
    memory, blocks = filled(tmp_path, 4)

    def brought_in_by_a_pass() -> int:
        before = memory.tiers.figures()["bytes_in"]
        for block in blocks:
            with block.pinned(10):
                pass
        return memory.tiers.figures()["bytes_in"] - before

    first, *later = (brought_in_by_a_pass() for _ in range(4))
    assert first <= len(blocks) * BYTES
    assert max(later) <= 3 * BYTES, "of six, of which four have room; oldest first it would be all six"
    memory.close()


def test_a_cluster_without_rows_is_not_brought_in(tmp_path: Path) -> None:
    memory, blocks = filled(tmp_path, 1)
    before = memory.tiers.figures()["bytes_in"]
    blocks[0].skip()
    assert memory.tiers.figures()["bytes_in"] == before
    memory.close()


def test_a_budget_below_a_cluster_is_refused(tmp_path: Path) -> None:
    memory = QuantizedClusterMemory(config(tmp_path, BYTES - 1), CLUSTERS, 0, CPU)
    with pytest.raises(
        ConfigError, match=r"device_budget_bytes=999 is less than the 1,000 bytes .*: set it to 1000 or more"
    ):
        memory.adopt(0, 0, values(0))
    memory.close()


def test_damage_is_named(tmp_path: Path) -> None:
    memory, blocks = filled(tmp_path, 1)
    (tmp_path / "rank-00000" / "layer-000.bin").write_bytes(b"\xa5" * 3 * 4096)
    with (
        pytest.raises(OffloadError, match=r"layer-000.bin: quantized weights of layer 0, cluster index 1 is damaged"),
        blocks[1].pinned(1),
    ):
        pass
    memory.close()


@pytest.mark.parametrize("vectors", [True, False])
def test_experts_compute_the_same_wherever_their_bytes_are(tmp_path: Path, vectors: bool) -> None:
    sizes = ClusterWeights.without_values(4, 40, 24, 3, vectors=vectors, dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    drawn = {
        name: None if value is None else torch.randn(value.shape, generator=draw) for name, value in vars(sizes).items()
    }
    packed = QuantizedCluster.of(ClusterWeights(**drawn), FORM)  # type: ignore[arg-type]
    experts = QuantizedClusterExperts(packed, torch.float32)
    inputs = (torch.randn(9, 40, generator=draw), torch.randint(4, (9, 2), generator=draw), torch.rand(9, 2))
    expected, weights = experts(*inputs), experts.weights()
    memory = QuantizedClusterMemory(config(tmp_path, packed.nbytes + 48), 1, 0, CPU)
    experts.keep_in(memory, 0, 0)
    other = QuantizedClusterExperts(packed, torch.float32)
    other.keep_in(memory, 1, 0)  # there is room for one of the two
    assert all(buffer.is_meta for buffer in (*experts.buffers(), *other.buffers()))
    for _ in range(2):
        assert torch.equal(experts(*inputs), expected)
        assert torch.equal(other(*inputs), expected)
    kept = vars(experts.weights())
    other.weights()  # takes the place of the first in the arena
    assert all(value is None or torch.equal(value, kept[name]) for name, value in vars(weights).items())
    assert len(experts(inputs[0][:0], inputs[1][:0], inputs[2][:0])) == 0
    assert packed.nbytes <= memory.tiers.figures()["peak_device_bytes"] <= packed.nbytes + 48
    memory.close()
