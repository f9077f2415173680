"""A tier's folder has one owner, and nothing that a dead one left stays in it."""

import os
from pathlib import Path

import pytest

from moe_dist.errors import OffloadError
from moe_dist.memory.owned_folder import OwnedFolder, folder_of, remove_other_ranks


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    owner = OwnedFolder(tmp_path / "tier")
    with pytest.raises(OffloadError, match=rf"{tmp_path}/tier is used by another run \(process {os.getpid()} on "):
        OwnedFolder(tmp_path / "tier")
    owner.close()
    OwnedFolder(tmp_path / "tier").close()
    assert not (tmp_path / "tier").exists()


def test_files_of_a_dead_owner_are_removed_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "tier").mkdir()
    for name in ("layer-000.bin", "layer-017.bin", "notes"):
        (tmp_path / "tier" / name).write_bytes(b"left")
    OwnedFolder(tmp_path / "tier").close()
    assert [path.name for path in (tmp_path / "tier").iterdir()] == ["notes"]


def test_what_cannot_be_removed_is_named(tmp_path: Path) -> None:
    (tmp_path / "tier" / "layer-000.bin").mkdir(parents=True)
    with pytest.raises(OffloadError, match=rf"memory.directory: {tmp_path}/tier/layer-000.bin cannot be removed: "):
        OwnedFolder(tmp_path / "tier")


def test_folders_of_ranks_that_a_run_lacks_are_removed_unless_owned(tmp_path: Path) -> None:
    for name in ("rank-00001", "rank-00002", "rank-00004", "rank-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "layer-000.bin").write_bytes(b"left")
    owner = OwnedFolder(folder_of(tmp_path, 3))
    remove_other_ranks(tmp_path, 2)
    left = ["rank-00001", "rank-00001/layer-000.bin", "rank-00003", "rank-00003/lock", "rank-x", "rank-x/layer-000.bin"]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == left
    owner.close()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OffloadError, match=rf"{tmp_path}/file/tier cannot be used: "):
        OwnedFolder(tmp_path / "file" / "tier")
