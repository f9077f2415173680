"""Kernels of low-rank SwiGLU on a GPU against the reference; their speed beside dense layers and grouped GEMMs."""

import traceback
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import Tensor

from moe_dist import ClusteredMoE, MoEConfig
from moe_dist.benchmarks.layer.local import render, run_layer_bench
from moe_dist.benchmarks.layer.spec import LayerBenchSpec
from moe_dist.kernels import lowrank_swiglu_triton
from moe_dist.kernels.kernel_selftest import kernel_selftest
from moe_dist.kernels.lowrank_swiglu_sorted import lowrank_swiglu_sorted

Report = Callable[[str, str], None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 8, 32])
def test_triton_agrees_with_masked(device: torch.device, on_gpu: bool, dtype: torch.dtype, rank: int) -> None:
    if not on_gpu:
        pytest.skip("triton's interpreter is tested elsewhere")
    assert lowrank_swiglu_triton.available(device, dtype, rank, 64)
    assert kernel_selftest(lowrank_swiglu_triton.lowrank_swiglu_triton, device, dtype, rank) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_sorted_agrees_with_masked(device: torch.device, dtype: torch.dtype) -> None:
    assert kernel_selftest(lowrank_swiglu_sorted, device, dtype, 8) is None


@pytest.mark.parametrize("top_clusters", [1, 2])
@pytest.mark.parametrize("base", ["cluster", "shared+cluster"])
def test_a_layer_computes_on_the_device_what_it_computes_on_the_cpu(
    device: torch.device, top_clusters: int, base: str
) -> None:
    sizes = {"experts": 16, "clusters": 4, "top_clusters": top_clusters, "top_k": 2, "expert_hidden": 64, "rank": 4}
    moe = MoEConfig.model_validate({**sizes, "base": base})
    here, there = ClusteredMoE(32, moe, init_std=0.3), ClusteredMoE(32, moe, init_std=0.3)
    there.load_state_dict(here.state_dict())
    there.to(device)
    x_TD = torch.randn(256, 32, generator=torch.Generator().manual_seed(1))
    ours = x_TD.clone().to(device).requires_grad_()
    theirs = x_TD.clone().requires_grad_()
    y_TD, expected_TD = there(ours), here(theirs)
    torch.testing.assert_close(y_TD.cpu(), expected_TD, rtol=2e-3, atol=2e-3)  # TF32 and other orders of sums
    y_TD.square().sum().backward()
    expected_TD.square().sum().backward()
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad.cpu(), theirs.grad, rtol=5e-3, atol=5e-3)
    for (name, mine), other in zip(there.named_parameters(), here.parameters(), strict=True):
        if other.grad is not None:
            assert mine.grad is not None, name
            torch.testing.assert_close(mine.grad.cpu(), other.grad, rtol=1e-2, atol=1e-2, msg=f"gradient of {name}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_speed_is_reported(device: torch.device, on_gpu: bool, report: Report, dtype: str) -> None:
    """Asserts nothing of time: the table is for docs/results.md."""
    spec = LayerBenchSpec(
        tokens=16384, hidden=2048, expert_hidden=4096, experts=64, clusters=8, rank=16, top_k=(2,), dtypes=(dtype,),
        repeats=5, backend="masked", backends=("sorted", "triton"), device=device.type,
    )  # fmt: skip
    if not on_gpu:
        spec = replace(
            spec, tokens=64, hidden=32, expert_hidden=32, experts=8, clusters=4, rank=2, backends=("sorted",)
        )
    console = Console(record=True, width=160)
    render(run_layer_bench(spec), console)
    report("speed", f"{spec}\n{console.export_text()}")


@pytest.mark.parametrize("way", ["compile", "graph"])
def test_a_layer_under_compile_and_graphs_is_reported(
    device: torch.device, on_gpu: bool, report: Report, way: str
) -> None:
    """Routing reads counts on the host, so a layer as a whole may not be captured: what happens is the finding."""
    if not on_gpu:
        pytest.skip("a CUDA graph needs a GPU")
    moe = MoEConfig(experts=16, clusters=4, top_k=2, expert_hidden=64, rank=4)
    layer = ClusteredMoE(32, moe).to(device)
    x_TD = torch.randn(256, 32, device=device, requires_grad=True)
    expected_TD = layer(x_TD)
    try:
        y_TD = _compiled(layer, x_TD) if way == "compile" else _captured(layer, x_TD)
    except Exception as error:  # what is refused, and by whom, is what we want to know
        report("capture", f"{way}: {type(error).__name__}: {error}\n{traceback.format_exc()}")
        return
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-3, atol=1e-3)
    report("capture", f"{way}: the same output")


def _compiled(layer: ClusteredMoE, x_TD: Tensor) -> Tensor:
    y_TD: Tensor = torch.compile(layer)(x_TD)
    y_TD.square().sum().backward()
    return y_TD


def _captured(layer: ClusteredMoE, x_TD: Tensor) -> Tensor:
    beside = torch.cuda.Stream()
    with torch.cuda.stream(beside):
        for _ in range(3):
            layer(x_TD).square().sum().backward()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_TD: Tensor = layer(x_TD)
        y_TD.square().sum().backward()
    graph.replay()
    return y_TD
