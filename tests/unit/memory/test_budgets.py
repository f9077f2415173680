"""Budgets in which a cluster has no room are refused when it is made, with the least that would do."""

from pathlib import Path

import pytest
import torch
from torch import nn

from moe_dist.config import load_config
from moe_dist.errors import ConfigError
from moe_dist.memory import expert_memory as experts
from moe_dist.memory.expert_memory import ExpertMemory
from moe_dist.memory.quantized_clusters import QuantizedClusterMemory
from moe_dist.memory.tiers import Tiers, budget_of
from tests.unit.memory.stacked import CPU, StackedTiers


def _adopt(path: Path, budgets: list[str], tiers: type[Tiers], monkeypatch: pytest.MonkeyPatch) -> None:
    """One cluster of 160 parameters: a block takes 640 bytes in float32, weights in bfloat16 320."""
    monkeypatch.setattr(experts, "Tiers", tiers)
    words = ["memory.offload=true", f"memory.directory={path}", *budgets]
    memory = ExpertMemory(load_config(None, words), 1, 0, CPU)
    try:
        memory.adopt(0, 0, {"matrix": nn.Parameter(torch.zeros(10, 16))})
    finally:
        memory.close()


@pytest.mark.parametrize(("precision", "least"), [("float32", 5 * 640), ("bfloat16", 5 * 640 + 320)])
def test_a_host_budget_below_an_update_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, least: int
) -> None:
    words = ["memory.device_budget_bytes=1e6", f"train.precision={precision}"]
    _adopt(tmp_path, [*words, f"memory.host_budget={least}"], StackedTiers, monkeypatch)
    refusal = rf"^memory.host_budget={least - 1} is less than .* \(layer 0\): set it to {least} or more$"
    with pytest.raises(ConfigError, match=refusal):
        _adopt(tmp_path, [*words, f"memory.host_budget={least - 1}"], StackedTiers, monkeypatch)


def test_a_device_budget_is_bytes_or_a_ratio_of_the_dense_baseline() -> None:
    """Dense baseline of the feed-forward layers: 2 layers x 3 matrices x 128 x 512 numbers x 16 bytes = 6,291,456."""
    shape = ["model.layers=2", "model.hidden_size=128", "moe.top_k=2", "moe.expert_hidden=256"]
    assert budget_of(load_config(None, shape)) == 6_291_456
    assert budget_of(load_config(None, [*shape, "memory.device_budget_ratio=0.25"])) == 1_572_864
    assert budget_of(load_config(None, [*shape, "memory.device_budget_ratio=20"])) == 125_829_120
    assert budget_of(load_config(None, [*shape, "memory.device_budget_bytes=12"])) == 12


def test_a_ratio_that_is_too_small_is_refused_with_one_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"^memory.device_budget_ratio=1e-06 \(\d+ bytes\) is less than") as refusal:
        _adopt(tmp_path, ["memory.device_budget_ratio=1e-6"], Tiers, monkeypatch)
    least = str(refusal.value).rpartition("set it to ")[2].removesuffix(" or more")
    _adopt(tmp_path, [f"memory.device_budget_ratio={least}"], Tiers, monkeypatch)


def test_a_cpu_has_no_host_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _adopt(tmp_path, ["memory.device_budget_bytes=1e6", "memory.host_budget=1"], Tiers, monkeypatch)


def test_a_host_budget_below_a_stored_cluster_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_dist.memory.quantized_clusters.Tiers", StackedTiers)
    words = [
        "memory.offload=true",
        f"memory.directory={tmp_path}",
        "memory.device_budget_bytes=100",
        "memory.host_budget=99",
    ]
    memory = QuantizedClusterMemory(load_config(None, words), 1, 0, CPU)
    memory.adopt(0, 0, torch.zeros(99, dtype=torch.uint8))
    with pytest.raises(
        ConfigError, match=r"memory.host_budget=99 is less than the 100 bytes .*: set it to 100 or more"
    ):
        memory.adopt(0, 1, torch.zeros(100, dtype=torch.uint8))
    memory.close()
