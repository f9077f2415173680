"""The Triton kernels in Triton's interpreter against the reference, from stored factors too; and compiled for GPUs."""

import importlib.util
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_dist.compression import GroupFormat, QuantizedCluster, StorageFormat
from moe_dist.compression.cluster_weights import ClusterWeights
from moe_dist.compression.quantization import QuantizedFactor
from moe_dist.errors import ConfigError
from moe_dist.kernels import choose_backend, clustered_experts, lowrank_swiglu_triton, packed_experts
from moe_dist.kernels.kernel_selftest import kernel_selftest
from moe_dist.kernels.lowrank_swiglu import LowRankSwiGLU
from moe_dist.kernels.lowrank_swiglu_masked import lowrank_swiglu_masked
from moe_dist.kernels.lowrank_swiglu_sorted import lowrank_swiglu_sorted
from tests.unit.kernels import count_traffic
from tests.unit.kernels.test_shared_base_experts import (
    assert_agree,
    draw_routing,
    draw_weights,
    needs_interpreter,
    outputs,
)

CPU = torch.device("cpu")


@contextmanager
def small_tiles() -> Iterator[None]:
    """Several blocks, runs and splits in small problems: the interpreter takes its time."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("B", "L"):
            patch.setitem(lowrank_swiglu_triton._TILE, name, 16)
        patch.setattr(lowrank_swiglu_triton, "_RUN", 32)
        patch.setattr(lowrank_swiglu_triton, "_SPLIT", 32)
        yield


@pytest.fixture
def forgetful() -> Iterator[None]:
    """What is remembered of trials is forgotten, before and after."""
    lowrank_swiglu_triton._works.cache_clear()
    yield
    lowrank_swiglu_triton._works.cache_clear()


@needs_interpreter
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.sampled_from([0, 1, 17, 40]),
    experts=st.integers(1, 4),
    slots=st.integers(1, 4),
    expert_hidden=st.sampled_from([5, 16, 40]),
    rank=st.sampled_from([1, 3, 16, 17]),
    vectors=st.booleans(),
    absent=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_agrees_with_reference(
    seed: int, tokens: int, experts: int, slots: int, expert_hidden: int, rank: int, vectors: bool, absent: float
) -> None:
    torch.manual_seed(seed)
    weights = draw_weights(experts, 7, expert_hidden, rank, vectors, torch.float32)
    slot, gate = draw_routing(tokens, min(slots, experts), experts, absent, torch.float32)
    x = torch.randn(tokens, 7).requires_grad_()
    with small_tiles():
        found = outputs(x, slot, gate, weights, "triton")
    assert_agree(found, outputs(x, slot, gate, weights, "reference"), 1e-5)


@needs_interpreter
def test_the_same_bits_every_time_and_no_slot_is_lost_between_splits() -> None:
    torch.manual_seed(0)
    weights = draw_weights(3, 6, 20, 2, True, torch.bfloat16)
    slot, gate = draw_routing(70, 2, 3, 0.1, torch.float32)
    x = torch.randn(70, 6).bfloat16().requires_grad_()
    with small_tiles():
        one, two = (outputs(x, slot, gate, weights, "triton") for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "packing",
    [
        GroupFormat(group_size=16),
        GroupFormat(group_size=32, symmetric=False, scale_dtype=torch.float16),
        GroupFormat(bits=8, group_size=64),
    ],
    ids=str,
)
def test_stored_factors_are_unpacked_in_the_kernel_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, packing: GroupFormat, dtype: torch.dtype
) -> None:
    """An odd width: half a byte and a part of a group are left over in each row."""
    torch.manual_seed(0)
    packed = QuantizedCluster.of(
        draw_weights(3, 8, 45, 5, dtype == torch.float32, dtype), StorageFormat(packing, dtype)
    )
    (slot, gate), x = draw_routing(40, 2, 3, 0.1, torch.float32), torch.randn(40, 8).to(dtype)
    expected = clustered_experts(x, slot, gate.detach(), packed.weights(dtype), "triton")
    unpacked: list[int] = []
    unpack = QuantizedFactor.unpacked

    def counted(self: QuantizedFactor, to: torch.dtype) -> Tensor:
        unpacked.append(self.shape[-1])
        return unpack(self, to)

    monkeypatch.setattr(QuantizedFactor, "unpacked", counted)
    assert torch.equal(packed_experts(x, slot, gate.detach(), packed, "triton"), expected)
    assert len(unpacked) == 2  # the factors around the hidden step


@needs_interpreter
def test_gradients_pass_through_stored_experts() -> None:
    torch.manual_seed(0)
    packed = QuantizedCluster.of(
        draw_weights(3, 8, 32, 4, True, torch.float32), StorageFormat(GroupFormat(), torch.float32)
    )
    (slot, gate), x = draw_routing(20, 2, 3, 0.1, torch.float32), torch.randn(20, 8).requires_grad_()
    found = torch.autograd.grad(packed_experts(x, slot, gate, packed, "triton").sum(), [x, gate])
    expected = torch.autograd.grad(packed_experts(x, slot, gate, packed, "reference").sum(), [x, gate])
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@needs_interpreter
def test_a_slot_beyond_the_cluster_is_refused() -> None:
    weights = draw_weights(2, 4, 16, 1, False, torch.float32)
    with pytest.raises(RuntimeError, match="index 2 is out of bounds"):
        clustered_experts(torch.randn(1, 4), torch.tensor([[2]]), torch.ones(1, 1), weights, "triton")


@needs_interpreter
def test_a_cpu_takes_it_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = draw_weights(2, 4, 16, 1, False, torch.float32)
    assert lowrank_swiglu_triton.available(CPU, torch.float32, 1, 16)
    assert choose_backend(CPU, torch.float32, weights) != "triton"
    assert not lowrank_swiglu_triton.available(CPU, torch.float64, 1, 16)
    assert not lowrank_swiglu_triton.available(CPU, torch.float32, 65, 16)
    monkeypatch.delenv("TRITON_INTERPRET")
    refused = r"moe\.backend=triton is not available for torch\.float32 on cpu .* use moe\.backend=auto"
    with pytest.raises(ConfigError, match=refused):
        clustered_experts(torch.randn(1, 4), torch.tensor([[1]]), torch.ones(1, 1), weights, "triton")


def scaled(part: str) -> LowRankSwiGLU:
    """'masked' with one of its outputs, or the gradients behind them, off by a tenth."""

    def step(pre: Tensor, z: Tensor, slot: Tensor, gate: Tensor, weights: ClusterWeights) -> tuple[Tensor, Tensor]:
        hidden, thin = lowrank_swiglu_masked(pre, z, slot, gate, weights)
        if part == "gradient":
            return hidden + 0.1 * (hidden - hidden.detach()), thin
        return (hidden * 1.1, thin) if part == "hidden" else (hidden, thin * 1.1)

    return step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_trial_tells_right_from_wrong(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()

    def untouched(saved: Tensor) -> Tensor:
        raise AssertionError("a hook around the trial saw a tensor of it")

    with torch.inference_mode(), torch.autograd.graph.saved_tensors_hooks(untouched, untouched):
        assert kernel_selftest(lowrank_swiglu_sorted, CPU, dtype, 8) is None
    for part in ("hidden", "thin"):
        assert f"{part} differs from backend 'masked' by" in str(kernel_selftest(scaled(part), CPU, dtype, 8))
    assert "the gradient of" in str(kernel_selftest(scaled("gradient"), CPU, dtype, 8))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_tensor_is_as_large_as_the_hidden_units_of_all_slots() -> None:
    """pre read and hidden written once, pre kept; what comes on top is thin. Counted without running a kernel."""
    wide = count_traffic.F * 2  # bytes of a token's hidden units
    forward, backward, saved = count_traffic.counted("triton", 4, torch.bfloat16)
    assert 3 * wide < forward < 6 * wide
    assert 5 * wide < backward < 14 * wide
    assert 2 * wide < saved < 2.3 * wide


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 8, 32])
def test_the_kernels_agree_on_a_gpu(dtype: torch.dtype, rank: int) -> None:
    assert kernel_selftest(lowrank_swiglu_triton.lowrank_swiglu_triton, torch.device("cuda"), dtype, rank) is None


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("fault", ["wrong", "broken"])
def test_kernels_that_fail_their_trial_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    def broken(*_: object) -> tuple[Tensor, Tensor]:
        raise RuntimeError("ptxas: no such target\nmore")

    monkeypatch.setattr(lowrank_swiglu_triton, "lowrank_swiglu_triton", broken if fault == "broken" else scaled("thin"))
    monkeypatch.setattr(lowrank_swiglu_triton, "_capable", lambda device: True)  # as if it were a GPU
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for _ in range(2):
        assert not lowrank_swiglu_triton.available(CPU, torch.float32, 4, 16)
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert warning.startswith("backend 'triton' is not used on cpu, torch is: ")
    assert warning.endswith("RuntimeError: ptxas: no such target" if fault == "broken" else "of the largest entry")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other wheels of triton may lack NVIDIA's assembler")
def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """The interpreter takes Python that the compiler does not."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "ignore", str(script), "sm_80"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
