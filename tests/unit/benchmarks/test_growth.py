"""The growth benchmark on a toy size: figures are complete, saved bytes are what autograd holds, refusals are clear."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from moe_dist.benchmarks.growth.bench import render, run_growth
from moe_dist.benchmarks.growth.plot import plot_growth
from moe_dist.benchmarks.layer.spec import GrowthSpec, LayerShape, clusters_for
from moe_dist.benchmarks.saved_bytes import saved_bytes
from moe_dist.errors import ConfigError

TOY = GrowthSpec(
    LayerShape(tokens=32, hidden=16, expert_hidden=32, rank=2), experts=(4, 8), repeats=1, standard_up_to=4
)


def test_every_size_is_measured_and_shown(tmp_path: Path) -> None:
    result = run_growth(TOY)
    assert [(case.experts, case.clusters) for case in result.cases] == [(4, 2), (8, 4)]
    small, large = (case.layers for case in result.cases)
    assert list(small) == ["dense", "clustered m=1", "clustered m=2", "standard"]
    assert "standard" not in large
    assert small["dense"].over_dense.median == 1
    assert small["dense"].weight_bytes == large["dense"].weight_bytes == 3 * 16 * 32 * 4
    assert small["standard"].weight_bytes == 4 * small["dense"].weight_bytes + 4 * 16 * 4  # and the router
    console = Console(file=io.StringIO(), width=160)
    render(result, console)
    assert isinstance(console.file, io.StringIO)
    assert "clustered m=1: time over dense grows by" in console.file.getvalue()
    json.dumps(result.to_dict())
    plot_growth(result, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_saved_bytes_count_each_storage_once_and_no_weights() -> None:
    layer, x = nn.Linear(4, 8, bias=False), torch.randn(5, 4)
    assert saved_bytes(lambda: layer(x), layer) == x.numel() * 4
    assert saved_bytes(lambda: layer(x).sigmoid() * x[:, :1], layer) == (5 * 4 + 5 * 8) * 4  # x and its view: one


@pytest.mark.parametrize(
    ("experts", "clusters"),
    [(1, 1), (4, 2), (12, 4), (15, 1), (16, 4), (32, 8), (64, 8), (128, 16), (256, 16)],
)
def test_clusters_follow_the_experts(experts: int, clusters: int) -> None:
    assert clusters_for(experts) == clusters


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"experts": (16, 8)}, "experts=16,8 must grow"),
        ({"experts": (0, 8)}, "experts=0 must be 1 or more"),
        ({"dtype": "int4"}, "dtype 'int4' is unknown"),
        ({"threads": 0}, "threads=0 must be 1 or more"),
        ({"top_k": 3}, "moe.top_k=3 is larger than a cluster"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        replace(TOY, **change).check()
