"""A checkpoint that an enemy wrote gives an error and nothing else: no code runs, no other file is read."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moe_dist.checkpoint.export import export_weights
from moe_dist.checkpoint.find import latest_valid_checkpoint
from moe_dist.checkpoint.manifest import Manifest, read_manifest, write_manifest
from moe_dist.checkpoint.save_and_load import read_checkpoint
from moe_dist.checkpoint.storage import recorded
from moe_dist.checkpoint.store import check
from moe_dist.checkpoint.trained_weights import find_weights
from moe_dist.errors import CheckpointError
from tests.unit.checkpoint.samples import saved, state

SHARD = "rank-00000.safetensors"


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def signed(checkpoint: Path) -> None:
    """An enemy can compute checksums as well as we can."""
    manifest: Manifest = read_manifest(checkpoint)
    files = {name: recorded(checkpoint / name) for name in manifest.files}
    write_manifest(checkpoint, manifest.model_copy(update={"files": files}))


def change_index(checkpoint: Path, change: dict[str, Any]) -> None:
    index = json.loads((checkpoint / "index.json").read_text())
    index["tensors"]["weight/a"].update(change)
    (checkpoint / "index.json").write_text(json.dumps(index))
    signed(checkpoint)


@pytest.mark.parametrize("writer", ["pickle", "torch.save"])
def test_a_pickle_instead_of_tensors_is_not_executed(tmp_path: Path, writer: str) -> None:
    (checkpoint,) = saved(tmp_path, 1)
    bomb = Bomb(tmp_path / "trace")
    if writer == "pickle":
        (checkpoint / SHARD).write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, checkpoint / SHARD)
    signed(checkpoint)
    check(checkpoint)
    with pytest.raises(CheckpointError, match=f"is damaged: {SHARD}"):
        read_checkpoint(checkpoint, state())
    (checkpoint / "index.json").write_bytes(pickle.dumps(bomb))
    signed(checkpoint)
    with pytest.raises(CheckpointError, match=r"index.json is not JSON"):
        check(checkpoint)
    (checkpoint / "manifest.json").write_bytes(pickle.dumps(bomb))
    with pytest.raises(CheckpointError, match=r"manifest.json is not JSON"):
        check(checkpoint)
    assert not (tmp_path / "trace").exists()
    with pytest.raises(FileExistsError):  # the bomb is real
        [pickle.loads(pickle.dumps(bomb)) for _ in range(2)]  # noqa: S301


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunks": [[0, 12, "../../../secret.safetensors"]]}, "should match pattern"),
        ({"chunks": [[0, 12, "/etc/passwd"]]}, "should match pattern"),
        ({"chunks": [[0, 12, "rank-00007.safetensors"]]}, "in a file not listed"),
        ({"chunks": [[0, 3, SHARD]]}, "is incomplete"),
        ({"chunks": [[-1, 12, SHARD]]}, "greater than or equal to 0"),
        ({"shape": [10**9, 10**9], "chunks": [[0, 10**18, SHARD]]}, "more data than its files hold"),
        ({"dtype": "object"}, "Input should be"),
        ({"extra": 1}, "Extra inputs are not permitted"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (checkpoint,) = saved(tmp_path, 1)
    change_index(checkpoint, change)
    with pytest.raises(CheckpointError, match=message):
        check(checkpoint)


def test_a_shard_that_is_not_what_the_index_says_is_an_error(tmp_path: Path) -> None:
    (checkpoint,) = saved(tmp_path, 1)
    save_file({"other": torch.zeros(100)}, checkpoint / SHARD)
    signed(checkpoint)
    check(checkpoint)
    with pytest.raises(CheckpointError, match=f"{SHARD}: "):
        read_checkpoint(checkpoint, state())
    save_file({"weight/a@0": torch.zeros(3), "weight/b@0": torch.zeros(100)}, checkpoint / SHARD)
    signed(checkpoint)
    with pytest.raises(CheckpointError):
        read_checkpoint(checkpoint, state())


@pytest.mark.parametrize("content", ["[" * 100_000, "{}", "[]", "null", '{"checksum": "x"}', "\x00"])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (checkpoint,) = saved(tmp_path, 1)
    (checkpoint / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError):
        latest_valid_checkpoint(tmp_path)


def test_files_outside_the_checkpoint_cannot_be_listed(tmp_path: Path) -> None:
    (checkpoint,) = saved(tmp_path, 1)
    manifest = read_manifest(checkpoint)
    outside = manifest.model_copy(update={"files": {**manifest.files, "../../x": manifest.files[SHARD]}})
    write_manifest(checkpoint, outside)
    with pytest.raises(CheckpointError, match="should match pattern"):
        check(checkpoint)


def test_a_configuration_from_nowhere_is_refused(tmp_path: Path) -> None:
    (checkpoint,) = saved(tmp_path, 1)
    manifest = read_manifest(checkpoint)
    write_manifest(checkpoint, manifest.model_copy(update={"config": {"name": "$(touch x)"}}))
    with pytest.raises(CheckpointError, match=r"is invalid in this version: .*name"):
        find_weights(tmp_path)


def test_exported_weights_are_the_checkpoint_s(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    file = tmp_path / "out.safetensors"
    assert export_weights(find_weights(tmp_path), file) == 14
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        assert torch.equal(opened.get_tensor("a"), torch.arange(12.0).view(3, 4))
        assert json.loads(opened.metadata()["config"])["name"] == "run"
    for nowhere in (tmp_path / "nowhere", file):
        with pytest.raises(CheckpointError, match=r"out.safetensors: cannot be written: N"):
            export_weights(find_weights(tmp_path), nowhere / "out.safetensors")


def test_what_is_no_run_is_refused_by_what_it_is(tmp_path: Path) -> None:
    (checkpoint,) = saved(tmp_path, 1)
    export_weights(find_weights(tmp_path), tmp_path / "out.safetensors")
    (tmp_path / "empty").mkdir()
    cases = {
        tmp_path / "empty": "empty holds no weights: give the folder of a run",
        tmp_path / "nowhere": "nowhere does not exist: give the folder of a run",
        tmp_path / "out.safetensors" / "run": "out.safetensors/run does not exist: give the folder of a run",
        checkpoint / "index.json": r"index.json cannot be read as a file of moe-dist export \(.*\): give one, or the",
        checkpoint / SHARD: r"is not a file that moe-dist export wrote \(no step in its metadata\): give one, or the",
        tmp_path / "out.safetensors": "out.safetensors is an exported file already: give its run or checkpoint",
    }
    for path, said in cases.items():
        with pytest.raises(CheckpointError, match=said):
            export_weights(find_weights(path), tmp_path / "again.safetensors")
    assert not (tmp_path / "again.safetensors").exists()
