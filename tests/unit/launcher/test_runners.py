"""What `moe-dist launch` would start."""

import os
import socket
import sys
from pathlib import Path

import pytest

from launcher import runners
from launcher.environment import free_port
from launcher.runners import Job, Launcher
from moe_dist.errors import ConfigError, LaunchError


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "a run.yaml"
    path.write_text("world: {data: 2, cluster: 2}\n")
    return str(path)


def test_deepspeed_command(config: str) -> None:
    words = runners.command(runners.plan(Launcher.DEEPSPEED, None, config, ["seed=1"]))
    assert words[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert "--num_gpus=4" in words  # data 2 x cluster 2
    assert "--master_addr=127.0.0.1" in words
    assert words[-3:] == [str(runners.ENTRY), config, "seed=1"]
    assert runners.ENTRY.is_file()


def test_torchrun_command_names_no_port(config: str) -> None:
    words = runners.command(runners.plan(Launcher.TORCHRUN, 4, config, []))
    assert words[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert {"--standalone", "--nproc-per-node=4", "--local-addr=127.0.0.1"} < set(words)
    assert not any("port" in word for word in words)


@pytest.mark.parametrize(
    ("ranks", "overrides", "error"),
    [
        (3, [], ConfigError),
        (4, ["train.global_batch_size=6"], ConfigError),
        (0, [], LaunchError),
        (4, ["moe.top_k=20"], ConfigError),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(
    config: str, ranks: int, overrides: list[str], error: type[Exception]
) -> None:
    with pytest.raises(error):
        runners.plan(Launcher.DEEPSPEED, ranks, config, overrides)


@pytest.fixture
def gpus_2_and_5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "has_gpu", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)


@pytest.mark.usefixtures("gpus_2_and_5")
def test_deepspeed_takes_the_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def devices(ranks: int) -> list[str]:
        words = runners.command(Job(Launcher.DEEPSPEED, ranks, ()))
        return [word for word in words if word.startswith(("--include", "--num_gpus"))]

    assert devices(2) == ["--include=localhost:2,5"]
    assert devices(1) == ["--include=localhost:2"]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert devices(2) == ["--num_gpus=2"]
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1a2b")
    assert devices(1) == ["--num_gpus=1"]


@pytest.mark.usefixtures("gpus_2_and_5")
def test_more_ranks_than_visible_gpus_are_refused(config: str) -> None:
    with pytest.raises(LaunchError, match="4 ranks are more than the 2 GPUs of CUDA_VISIBLE_DEVICES=2,5"):
        runners.plan(Launcher.DEEPSPEED, 4, config, [])
    assert runners.plan(Launcher.DEEPSPEED, 4, config, ["world.backend=gloo"]).ranks == 4


def test_dry_run_quotes_words(config: str) -> None:
    assert f"'{config}'" in runners.dry_run(runners.plan(Launcher.TORCHRUN, 4, config, []))


def test_ranks_do_not_inherit_our_own_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "RANK", "3")
    monkeypatch.setitem(os.environ, "KEPT", "yes")
    variables = runners.environment(Job(Launcher.DEEPSPEED, 2, (), threads=3))
    assert "RANK" not in variables
    assert (variables["KEPT"], variables["OMP_NUM_THREADS"]) == ("yes", "3")


def test_a_free_port_can_be_bound() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))
