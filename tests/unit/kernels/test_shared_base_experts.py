"""Every backend of clustered experts against the reference: values and all gradients."""

import importlib.metadata
import importlib.util
import os
import shutil
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_dist.compression import ClusterWeights
from moe_dist.errors import ConfigError
from moe_dist.kernels import choose_backend, clustered_experts
from moe_dist.kernels.lowrank_swiglu_cpu import available


def interpreter() -> bool:
    """Whether Triton's interpreter can run the kernels here; that of 3.5 fails with NumPy 2.4."""
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
        return False
    return tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) >= (3, 9)


needs_interpreter = pytest.mark.skipif(not interpreter(), reason="no triton 3.9, or a GPU that would run its kernels")
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
SOON = ["masked", "sorted", pytest.param("cpu", marks=needs_compiler)]
FORMS = [*SOON, pytest.param("triton", marks=needs_interpreter)]
CPU = torch.device("cpu")


def draw_weights(
    experts: int, hidden: int, expert_hidden: int, rank: int, vectors: bool, dtype: torch.dtype
) -> ClusterWeights:
    shapes: list[tuple[float, tuple[int, ...]]] = [
        (hidden**-0.5, (hidden, 2 * expert_hidden)),
        (expert_hidden**-0.5, (expert_hidden, hidden)),
        (hidden**-0.5, (experts, hidden, 2 * rank)),
        (0.5, (experts, 2, rank, expert_hidden)),
        (expert_hidden**-0.5, (experts, expert_hidden, rank)),
        (0.5, (experts, rank, hidden)),
    ]
    if vectors:
        shapes += [(0.5, (experts, width)) for width in (expert_hidden, 2 * expert_hidden, hidden)]
    drawn = [(std * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_() for std, shape in shapes]
    return ClusterWeights(*drawn)


def draw_routing(tokens: int, slots: int, experts: int, absent: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    slot_TK = torch.rand(tokens, experts).argsort(1)[:, :slots]
    slot_TK = torch.where(torch.rand(tokens, slots) < absent, -1, slot_TK)
    return slot_TK, torch.rand(tokens, slots, dtype=dtype).requires_grad_()


def outputs(x: Tensor, slot: Tensor, gate: Tensor, weights: ClusterWeights, backend: str) -> dict[str, Tensor]:
    """y and the gradients of a fixed weighted sum of y, by name."""
    leaves = {"x": x, "gate": gate}
    leaves |= {f.name: getattr(weights, f.name) for f in fields(weights) if getattr(weights, f.name) is not None}
    y = clustered_experts(x, slot, gate, weights, backend)
    d_y = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    gradients = torch.autograd.grad(y, list(leaves.values()), d_y, allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def assert_agree(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Errors relative to a tensor's largest entry (or 1): sums of many terms cancel in single entries."""
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert found[name].dtype == value.dtype, name
        scale = max(1.0, value.abs().max().item()) if value.numel() else 1.0
        error = (found[name] - value).abs().max().item() / scale if value.numel() else 0.0
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("backend", SOON)  # triton: test_hidden_triton.py
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.sampled_from([0, 1, 7, 40, 150, 300]),
    experts=st.integers(1, 8),
    slots=st.integers(1, 4),
    hidden=st.integers(1, 24),
    expert_hidden=st.sampled_from([16, 48, 144]),
    rank=st.sampled_from([1, 3, 8, 9]),
    vectors=st.booleans(),
    absent=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_agrees_with_reference_in_float32(
    backend: str,
    seed: int,
    tokens: int,
    experts: int,
    slots: int,
    hidden: int,
    expert_hidden: int,
    rank: int,
    vectors: bool,
    absent: float,
) -> None:
    torch.manual_seed(seed)
    weights = draw_weights(experts, hidden, expert_hidden, rank, vectors, torch.float32)
    slot, gate = draw_routing(tokens, min(slots, experts), experts, absent, torch.float32)
    x = torch.randn(tokens, hidden).requires_grad_()
    assert_agree(outputs(x, slot, gate, weights, backend), outputs(x, slot, gate, weights, "reference"), 1e-5)


@pytest.mark.parametrize("backend", ["masked", "sorted"])
@pytest.mark.parametrize("vectors", [False, True])
def test_agrees_with_reference_in_float64(backend: str, vectors: bool) -> None:
    torch.manual_seed(0)
    weights = draw_weights(6, 12, 20, 3, vectors, torch.float64)
    slot, gate = draw_routing(50, 3, 6, 0.2, torch.float64)
    x = torch.randn(50, 12, dtype=torch.float64).requires_grad_()
    assert_agree(outputs(x, slot, gate, weights, backend), outputs(x, slot, gate, weights, "reference"), 1e-12)


@pytest.mark.parametrize("backend", FORMS)
def test_bfloat16_is_as_close_as_its_precision_allows(backend: str) -> None:
    """Inputs are the same numbers, so the float32 reference on them is what bfloat16 approximates (2^-8 a rounding)."""
    torch.manual_seed(0)
    weights = draw_weights(6, 16, 64, 4, True, torch.bfloat16)
    slot, gate = draw_routing(100, 2, 6, 0.1, torch.float32)
    x = torch.randn(100, 16).bfloat16().requires_grad_()
    exact_weights = ClusterWeights(*(w.detach().float().requires_grad_() for w in vars(weights).values()))
    expected = outputs(x.detach().float().requires_grad_(), slot, gate, exact_weights, "reference")
    found = outputs(x, slot, gate, weights, backend)
    assert found["y"].dtype == found["x"].dtype == torch.bfloat16
    assert found["gate"].dtype == torch.float32
    assert_agree({name: value.float() for name, value in found.items()}, expected, 0.03)


@pytest.mark.parametrize("backend", FORMS)
def test_experts_without_tokens_get_zero_gradients(backend: str) -> None:
    torch.manual_seed(0)
    weights = draw_weights(4, 8, 32, 2, True, torch.float32)
    slot, gate = torch.full((10, 1), 2), torch.rand(10, 1).requires_grad_()
    found = outputs(torch.randn(10, 8).requires_grad_(), slot, gate, weights, backend)
    for name in (
        "in_u_NDR",
        "in_v_NRH",
        "out_u_NFR",
        "out_v_NRD",
        "hidden_gate_NF",
        "hidden_bias_NH",
        "output_bias_ND",
    ):
        assert found[name][[0, 1, 3]].abs().max() == 0, name
        assert found[name][2].abs().max() > 0, name


@pytest.mark.parametrize("backend", FORMS)
def test_extreme_and_broken_inputs_come_through(backend: str) -> None:
    """Saturated gates stay exact; NaN in one token stays in that token and is not hidden."""
    torch.manual_seed(0)
    weights = draw_weights(3, 4, 16, 1, False, torch.float32)
    slot, gate = draw_routing(20, 2, 3, 0.0, torch.float32)
    x = (torch.randn(20, 4) * 300).requires_grad_()
    expected = outputs(x, slot, gate, weights, "reference")
    assert_agree(outputs(x, slot, gate, weights, backend), expected, 1e-5)
    broken = x.detach().clone()
    broken[5] = torch.nan
    y = clustered_experts(broken, slot, gate, weights, backend)
    assert y[5].isnan().all()
    assert y[[0, 4, 6, 19]].isfinite().all()


@needs_compiler
def test_threads_agree() -> None:
    torch.manual_seed(0)
    weights = draw_weights(4, 8, 16 * 27, 5, True, torch.float32)
    slot, gate = draw_routing(200, 3, 4, 0.1, torch.float32)
    x = torch.randn(200, 8).requires_grad_()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = outputs(x, slot, gate, weights, "cpu")
        torch.set_num_threads(3)
        assert_agree(outputs(x, slot, gate, weights, "cpu"), one, 1e-6)
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_there_is_a_compiler_the_operator_is_used(dtype: torch.dtype) -> None:
    """The others are slower and agree, so that nothing else would notice a hidden.c that does not compile."""
    weights = draw_weights(4, 8, 32, 2, True, dtype)
    assert available(CPU, dtype, weights.rank, weights.expert_hidden)
    assert choose_backend(CPU, dtype, weights) == "cpu"


def test_the_operator_asked_for_by_name_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_DIST_NATIVE", "0")
    weights = draw_weights(4, 8, 32, 2, False, torch.float32)
    routed = (torch.randn(1, 8), torch.tensor([[3]]), torch.ones(1, 1))
    with pytest.raises(ConfigError, match=r"moe\.backend=cpu is not available for torch\.float32 on cpu"):
        clustered_experts(*routed, weights, "cpu")
    assert clustered_experts(*routed, weights, "auto").shape == (1, 8)


@needs_compiler
def test_a_slot_beyond_the_cluster_is_refused() -> None:
    weights = draw_weights(4, 8, 32, 2, False, torch.float32)
    with pytest.raises(IndexError, match="a slot is 4, but the cluster has 4 experts"):
        clustered_experts(torch.randn(1, 8), torch.tensor([[4]]), torch.ones(1, 1), weights)


def test_choice_of_form(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, wide = (draw_weights(n, 8, 32, 4, False, torch.float32) for n in (8, 16))
    odd = draw_weights(4, 8, 20, 4, False, torch.float32)
    assert choose_backend(CPU, torch.float64, narrow) == "masked"
    assert choose_backend(CPU, torch.float64, wide) == "sorted"
    assert choose_backend(CPU, torch.float32, odd) == "masked"
    assert choose_backend(torch.device("cuda"), torch.bfloat16, wide) == "masked"
    monkeypatch.setenv("MOE_DIST_NATIVE", "0")
    assert choose_backend(CPU, torch.float32, narrow) == "masked"
