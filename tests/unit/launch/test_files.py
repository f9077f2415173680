"""Names of files and folders that a user gives, before the work begins."""

from pathlib import Path

import pytest

from moe_dist.errors import LaunchError
from moe_dist.launch.files import new_folder_name


def test_a_new_folder_has_its_parents_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert new_folder_name(Path("runs/mine/one")) == tmp_path / "runs" / "mine" / "one"
    assert (tmp_path / "runs" / "mine").is_dir()
    assert not (tmp_path / "runs" / "mine" / "one").exists()


def test_a_name_that_is_taken_or_in_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match=r"^--output .*/taken: exists already: give another name, or remove it$"):
        new_folder_name(tmp_path / "taken")
    with pytest.raises(LaunchError, match=r"^--out .*/file/new: .*/file cannot be made: "):
        new_folder_name(tmp_path / "file" / "new", "--out")
