"""`import moe_dist`: fast, without torch, with every public name behind it; the layers need little beside torch."""

import subprocess
import sys

import pytest

import moe_dist

LAYER_CODE = """
import sys
import torch
from moe_dist import ClusteredMoE, MoEConfig
layer = ClusteredMoE(16, MoEConfig(experts=8, clusters=2, expert_hidden=16, rank=2))
layer(torch.randn(4, 2, 16)).sum().backward()
unwanted = ("deepspeed", "megatron", "datasets", "scipy", "sklearn", "tensorboard", "xxhash")
print(*(name for name in unwanted if name in sys.modules))
"""


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_every_public_name_can_be_imported() -> None:
    assert set(moe_dist.__all__) == set(dir(moe_dist))
    for name in moe_dist.__all__:
        assert getattr(moe_dist, name) is not None
    expected = "ClusteredMoE StandardMoE MoEConfig Mesh load_config load_model Coordinator TrafficLedger"
    assert set(expected.split()) <= set(moe_dist.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'moe_dist' has no attribute 'Clustered'"):
        moe_dist.Clustered  # noqa: B018


def test_importing_the_package_imports_no_torch() -> None:
    assert _python("import sys, moe_dist; dir(moe_dist); print('torch' in sys.modules)") == "False"


def test_a_layer_needs_no_framework_and_no_scipy() -> None:
    assert _python(LAYER_CODE) == ""
