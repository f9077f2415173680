"""The folder of checkpoints: commits are atomic, damage is found, and the last good one is never deleted."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.checkpoint import storage
from moe_dist.checkpoint.find import checked, latest_valid_checkpoint
from moe_dist.checkpoint.manifest import Manifest
from moe_dist.checkpoint.save_and_load import write_checkpoint
from moe_dist.checkpoint.store import check, checkpoints_of, prune, remove_partial, set_aside, step_of
from moe_dist.config import CheckpointConfig
from moe_dist.errors import CheckpointError
from tests.unit.checkpoint.samples import manifest, saved, state

SHARD = "rank-00000.safetensors"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [SHARD, "index.json", "manifest.json"])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=["cut short", "one bit", "missing"])
def test_any_damage_is_found_and_the_one_before_is_used(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    older, newer = saved(tmp_path, 1, 2)
    damage(newer / name)
    with pytest.raises(CheckpointError, match=r"checkpoint .*step-00000002"):
        check(newer)
    found = latest_valid_checkpoint(tmp_path)
    assert found is not None
    assert (found.path, found.manifest.step, list(found.damaged)) == (older, 1, [newer])
    damage(older / name)
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        latest_valid_checkpoint(tmp_path)


def test_ranks_share_the_reading(tmp_path: Path) -> None:
    (checkpoint,) = saved(tmp_path, 1)
    flip(checkpoint / SHARD)
    found = []
    for part in range(2):
        try:
            check(checkpoint, part, parts=2)
        except CheckpointError:
            found.append(part)
    assert len(found) == 1


def test_a_run_without_checkpoints_is_no_error(tmp_path: Path) -> None:
    assert latest_valid_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"manifest.json cannot be read"):
        checked(tmp_path)


def test_what_is_not_committed_is_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, manifest: Manifest) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write_manifest", fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        saved(tmp_path, 3)
    assert checkpoints_of(tmp_path) == []
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [".step-00000003.partial"]
    remove_partial(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_checkpoint_of_the_same_step_takes_the_name_over(tmp_path: Path) -> None:
    (checkpoint,) = saved(tmp_path, 3)
    changed = manifest(3).model_copy(update={"updates": 17})
    write_checkpoint(checkpoint, changed, state(), rank=0)
    assert check(checkpoint).updates == 17
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_set_aside_keeps_every_damaged_one(tmp_path: Path) -> None:
    kept = [set_aside(saved(tmp_path, 3)[0]).name for _ in range(2)]
    assert kept == ["damaged-step-00000003", "damaged-step-00000003-2"]
    assert checkpoints_of(tmp_path) == []


@settings(max_examples=25)
@given(st.sets(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 3), st.integers(0, 10), st.data())
def test_pruning_keeps_the_newest_whole_ones_and_every_nth(
    tmp_path_factory: pytest.TempPathFactory, steps: set[int], last: int, every: int, data: st.DataObject
) -> None:
    run = tmp_path_factory.mktemp("run")
    broken = data.draw(st.sets(st.sampled_from(sorted(steps))))
    for folder in saved(run, *sorted(steps)):
        if step_of(folder) in broken:
            cut(folder / SHARD)
    prune(run, CheckpointConfig(keep_last=last, keep_every=every))
    left = {step_of(path) for path in checkpoints_of(run)}
    whole = sorted(steps - broken)
    assert left == broken | set(whole[-last:]) | {step for step in whole if every and step % every == 0}
    shutil.rmtree(run)


def test_what_a_crash_leaves_of_a_deletion_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1, 2)
    monkeypatch.setattr(shutil, "rmtree", lambda path: None)
    prune(tmp_path, CheckpointConfig(keep_last=1))
    assert [step_of(path) for path in checkpoints_of(tmp_path)] == [2]


def test_the_manifest_is_a_table_for_people_too(tmp_path: Path) -> None:
    (checkpoint,) = saved(tmp_path, 3)
    content = json.loads((checkpoint / "manifest.json").read_text())
    assert (content["step"], content["kind"], content["data"]["vocab_size"]) == (3, "training", 300)
    assert set(content["files"]) == {SHARD, "index.json"}


def test_weights_come_from_the_latest_step(tmp_path: Path) -> None:
    def latest() -> str:
        found = latest_valid_checkpoint(tmp_path, weights=True)
        assert found is not None
        return found.path.name

    saved(tmp_path, 3)
    write_checkpoint(tmp_path / "final", manifest(3), state(), rank=0)
    assert latest() == "final"
    saved(tmp_path, 5)  # the run went on
    assert latest() == "step-00000005"
    write_checkpoint(tmp_path / "final", manifest(6), state(), rank=0)
    cut(tmp_path / "final" / "manifest.json")
    assert latest() == "step-00000005"


def test_training_does_not_resume_from_final_weights(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    write_checkpoint(tmp_path / "final", manifest(4), state(), rank=0)
    found = latest_valid_checkpoint(tmp_path)
    assert found is not None
    assert found.path.name == "step-00000003"


def test_a_manifest_that_was_changed_is_damaged(tmp_path: Path) -> None:
    (checkpoint,) = saved(tmp_path, 3)
    file = checkpoint / "manifest.json"
    file.write_text(file.read_text().replace('"step": 3', '"step": 4'))
    with pytest.raises(CheckpointError, match=r"the checksum of manifest\.json is wrong"):
        check(checkpoint)
