"""Which device and how many threads a rank takes."""

import os

import pytest
import torch

from moe_dist.distributed import init as startup
from moe_dist.errors import LaunchError


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine that says it has two CUDA GPUs; returns those that were chosen."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    return chosen


@pytest.mark.parametrize("backend", ["auto", "nccl"])
def test_each_rank_takes_a_gpu_of_its_own(backend: str, two_gpus: list[int]) -> None:
    assert startup._device(backend, 1) == torch.device("cuda", 1)
    assert two_gpus == [1]


@pytest.mark.parametrize(("backend", "accelerator"), [("gloo", None), ("auto", "cpu"), ("gloo", "cpu")])
def test_the_cpu_is_used_where_it_is_wanted(
    backend: str, accelerator: str | None, two_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if accelerator:
        monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    assert startup._device(backend, 0) == torch.device("cpu")
    assert two_gpus == []


@pytest.mark.usefixtures("two_gpus")
def test_a_rank_without_a_gpu_is_refused() -> None:
    with pytest.raises(LaunchError, match="LOCAL_RANK=2 has no GPU: torch finds 2"):
        startup._device("auto", 2)


def test_nccl_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, two_gpus: list[int]) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(LaunchError, match=r"world\.backend=nccl needs a CUDA GPU, but DS_ACCELERATOR=cpu is set"):
        startup._device("nccl", 0)
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LaunchError, match="torch finds none here"):
        startup._device("nccl", 0)
    assert startup._device("auto", 5) == torch.device("cpu")


@pytest.mark.parametrize(
    ("wanted", "given", "set_to"),
    [(3, None, [3]), (3, "5", [3]), (0, "5", []), (0, None, [1])],
)
def test_threads(wanted: int, given: str | None, set_to: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    startup._set_threads(wanted, 4)
    assert found == set_to
