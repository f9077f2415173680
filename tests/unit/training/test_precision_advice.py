"""A precision without instructions is named with the measured ratio."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from moe_dist.config import RunConfig, load_config
from moe_dist.distributed.init import RankInfo
from moe_dist.errors import ConfigError
from moe_dist.kernels.gemm_speed import relative_gemm_speed
from moe_dist.training import precision_advice as module
from tests.distributed.ranks import run_ranks

CPU = torch.device("cpu")


def bfloat16() -> RunConfig:
    return load_config(None, ["train.precision=bfloat16"])


def test_a_slow_type_is_named_with_its_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "relative_gemm_speed", lambda dtype, device: 1 / 40)
    wanted = (
        "products in train.precision=bfloat16 are 40.0 times slower here than in float32: set it to float32 or auto"
    )
    assert module.precision_advice(bfloat16(), CPU) == wanted
    assert module.precision_advice(load_config(None, ["train.precision=float32"]), CPU) is None
    monkeypatch.setattr(module, "relative_gemm_speed", lambda dtype, device: 0.9)
    assert module.precision_advice(bfloat16(), CPU) is None


def test_the_ratio_is_measured() -> None:
    assert 0 < relative_gemm_speed(torch.bfloat16, CPU) < 100


def _on_unlike_machines() -> str:
    rank = dist.get_rank()
    config = load_config(None, [f"train.precision={'float32' if rank == 1 else 'bfloat16'}"])
    try:
        module.check_same_precision(config, RankInfo(rank, 2, CPU, timedelta(seconds=60)))
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_that_resolve_auto_differently_are_refused() -> None:
    for rank, line in enumerate(run_ranks(_on_unlike_machines, 2)):
        precision = "float32" if rank == 1 else "bfloat16"
        assert line == (
            f"train.precision=auto is {precision} on rank {rank}, but not the same on all ranks (other than rank 0: "
            "1): set it to float32 or bfloat16"
        )
