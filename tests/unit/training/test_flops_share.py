"""The share of a device's peak that a token takes."""

import pytest

from moe_dist.config import load_config
from moe_dist.config.device_peaks import peak_flops
from moe_dist.config.token_work import work_of
from moe_dist.training.flops_share import share_of_peak


def test_three_passes_over_the_peak() -> None:
    config = load_config(None, ["model.layers=2"])
    forward = work_of(config, 512).token(2)
    assert share_of_peak(config, 512, 1e12) == pytest.approx(3 * forward / 1e12)


def test_peaks_are_found_by_the_driver_s_names() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak_flops("Tesla T4") is None
