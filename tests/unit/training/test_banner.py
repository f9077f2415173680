"""The start of a run: the command that continues it, and GPUs that are not used."""

from pathlib import Path

import pytest

from moe_dist.config import machine
from moe_dist.launch.environment import COMMAND
from moe_dist.training.banner import continuing_command


def test_the_command_that_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(COMMAND, raising=False)
    assert continuing_command(tmp_path / "my runs" / "a") == "the same command with checkpoint.resume='my runs/a'"
    for given in ("moe-dist train a.yaml", "moe-dist train a.yaml checkpoint.resume=runs/before"):
        monkeypatch.setenv(COMMAND, given)
        assert continuing_command(tmp_path / "a") == "moe-dist train a.yaml checkpoint.resume=a"


def test_gpus_that_are_not_used_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*machine.GIVEN_GPUS, "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "GPU_DEVICES", (str(tmp_path / "gpu"),))
    monkeypatch.setattr(machine, "_torch_is_cpu_build", lambda: True)
    assert machine.unused_gpus() is None
    (tmp_path / "gpu").touch()
    assert machine.unused_gpus() == "this torch is built for the CPU"
    (tmp_path / "gpu").unlink()
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    monkeypatch.setattr(machine, "_torch_is_cpu_build", lambda: False)
    assert machine.unused_gpus() == "torch finds none: see `moe-dist doctor`"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert machine.unused_gpus() == "DS_ACCELERATOR=cpu is set"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.unused_gpus() == "CUDA_VISIBLE_DEVICES hides them"
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "0")
    assert machine.unused_gpus() is None


def test_the_processor_has_a_name() -> None:
    assert machine.processor_name()
