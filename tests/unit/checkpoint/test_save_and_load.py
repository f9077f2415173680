"""What is written in some pieces is read in any others; what does not fit is refused in one line."""

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_dist.checkpoint import storage
from moe_dist.checkpoint.manifest import read_index
from moe_dist.checkpoint.save_and_load import read_checkpoint, write_checkpoint
from moe_dist.checkpoint.sharded_tensor import OffloadedShard, Shard, ShardedTensor, Staging, State
from moe_dist.checkpoint.store import check
from moe_dist.errors import CheckpointError
from tests.unit.checkpoint.samples import manifest, saved, state

SIZE = 24
CUTS = st.sets(st.integers(1, SIZE - 1), max_size=6)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8])


def pieces(values: Tensor, cuts: set[int]) -> list[Shard]:
    ends = [0, *sorted(cuts), len(values)]
    return [Shard(first, values[first:last]) for first, last in pairwise(ends)]


@settings(max_examples=50)
@given(CUTS, CUTS, DTYPES)
def test_any_cut_reads_what_any_other_wrote(written: set[int], read: set[int], dtype: torch.dtype) -> None:
    values, target = torch.arange(SIZE).to(dtype), torch.zeros(SIZE, dtype=dtype)
    with TemporaryDirectory() as folder:
        source: State = {"x": ShardedTensor((4, 6), dtype, pieces(values, written))}
        write_checkpoint(Path(folder) / "c", manifest(), source, rank=0)
        read_checkpoint(Path(folder) / "c", {"x": ShardedTensor((4, 6), dtype, pieces(target, read))})
    assert torch.equal(target, values)


def test_a_part_alone_is_read_and_its_type_converted(tmp_path: Path) -> None:
    (checkpoint,) = saved(tmp_path, 1)
    target = torch.full((4,), torch.nan, dtype=torch.bfloat16)
    read_checkpoint(checkpoint, {"weight/a": ShardedTensor((3, 4), torch.bfloat16, [Shard(5, target)])})
    assert target.tolist() == [5, 6, 7, 8]


def test_what_is_away_is_written_in_several_files_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "OFFLOADED_FILE_BYTES", 40)  # two of four pieces, of 16 bytes each
    values, target = torch.arange(16.0), torch.zeros(16)

    def away(piece: int) -> OffloadedShard:
        kept, goal = values[4 * piece :][:4], target[4 * piece :][:4]

        def write(start: int, part: Tensor) -> None:
            goal[start : start + len(part)] = part

        return OffloadedShard(4 * piece, 4, torch.float32, kept.clone, write)

    pieces_away: State = {"x": ShardedTensor((16,), torch.float32, [away(piece) for piece in range(4)])}
    write_checkpoint(tmp_path / "c", manifest(), {**state(), **pieces_away}, rank=0)
    files = ["rank-00000-001.safetensors", "rank-00000.safetensors"]
    assert sorted(path.name for path in (tmp_path / "c").glob("*.safetensors")) == files
    check(tmp_path / "c")
    read_checkpoint(tmp_path / "c", pieces_away)
    assert torch.equal(target, values)


def test_the_index_says_what_is_where(tmp_path: Path) -> None:
    index = read_index(saved(tmp_path, 1)[0])
    assert index.tensors["weight/a"].shape == [3, 4]
    assert index.tensors["weight/a"].torch_dtype is torch.float32
    assert index.tensors["weight/b"].chunks == [(0, 2, "rank-00000.safetensors")]


def test_a_tensor_with_a_hole_is_never_written(tmp_path: Path) -> None:
    torn: State = {"x": ShardedTensor((4,), torch.float32, [Shard(0, torch.zeros(3))])}
    with pytest.raises(CheckpointError, match=r"x of shape \[4\] is incomplete"):
        write_checkpoint(tmp_path / "c", manifest(), torn, rank=0)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("weight/c", (3, 4), "has no tensor weight/c"), ("weight/a", (4, 3), r"weight/a has shape \(3, 4\)")],
)
def test_what_the_model_needs_and_the_checkpoint_lacks_is_named(
    tmp_path: Path, name: str, shape: tuple[int, ...], message: str
) -> None:
    (checkpoint,) = saved(tmp_path, 1)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(checkpoint, {name: ShardedTensor.whole(torch.zeros(shape))})


def test_staged_copies_do_not_change_with_training_and_their_buffers_are_reused() -> None:
    staging, live = Staging(), state()
    first = staging.copy(live)
    buffer = first["weight/a"].shards[0].values
    live["weight/a"].shards[0].values.fill_(-1)
    assert buffer.tolist() == list(range(12))
    assert staging.copy(live)["weight/a"].shards[0].values is buffer
    assert buffer.unique().tolist() == [-1]


def test_a_row_of_each_rank() -> None:
    row = ShardedTensor.row(torch.arange(6.0).view(2, 3), rank=2, ranks=4)
    assert row.shape == (4, 2, 3)
    assert [(shard.start, len(shard.values)) for shard in row.shards] == [(12, 6)]


def test_what_is_away_is_filled_from_several_pieces(tmp_path: Path) -> None:
    values, target = torch.arange(12.0), torch.zeros(12)

    def write(start: int, part: Tensor) -> None:
        target[start : start + len(part)] = part

    write_checkpoint(tmp_path / "c", manifest(), {"x": ShardedTensor((12,), values.dtype, pieces(values, {5}))}, rank=0)
    away = OffloadedShard(0, 12, values.dtype, target.clone, write)
    read_checkpoint(tmp_path / "c", {"x": ShardedTensor((12,), values.dtype, [away])})
    assert torch.equal(target, values)
