"""The layer benchmark on a toy size: all contenders run, figures are consistent, refusals are clear."""

import io
import json

import pytest
import torch
from rich.console import Console

from moe_dist.benchmarks.layer.local import (
    _contenders,
    _draw_layer,
    render,
    run_layer_bench,
)
from moe_dist.benchmarks.layer.spec import LayerBenchSpec
from moe_dist.errors import ConfigError
from moe_dist.metrics.spread import Spread

TOY = LayerBenchSpec(
    tokens=64, hidden=16, expert_hidden=32, experts=8, clusters=2, rank=2, top_k=(1, 3), repeats=3, vectors=True
)


def test_result_is_complete_and_consistent() -> None:
    threads = torch.get_num_threads()
    result = run_layer_bench(TOY)
    assert torch.get_num_threads() == threads
    assert [(case.dtype, case.top_k) for case in result.cases] == [
        ("float32", 1),
        ("float32", 3),
        ("bfloat16", 1),
        ("bfloat16", 3),
    ]
    for case in result.cases:
        assert set(case.seconds) == {"dense", "clustered", "standard/loop", "standard/grouped_mm"}
        fastest = min(case.seconds[name].median for name in ("standard/loop", "standard/grouped_mm"))
        assert case.seconds[case.standard].median == fastest
        assert case.compiled == (case.backend == "cpu")
        assert case.speedup.smallest <= case.speedup.lower <= case.speedup.median <= case.speedup.upper
    json.dumps(result.to_dict())


def test_table_shows_every_contender() -> None:
    console = Console(file=io.StringIO(), width=160)
    render(run_layer_bench(LayerBenchSpec(**{**vars(TOY), "backends": ("masked",), "repeats": 1})), console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for name in ("dense", "clustered (", "clustered/mask", "standard/loop", "standard/grouped_mm", "bfloat16"):
        assert name in text


def test_contenders_of_a_kind_compute_the_same() -> None:
    layer = _draw_layer(TOY, torch.float32, 3)
    contenders = _contenders(layer, "masked", ("reference", "sorted"))
    y = {name: run() for name, run in contenders.items()}
    torch.testing.assert_close(y["standard/loop"], y["standard/grouped_mm"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y["clustered"], y["clustered/reference"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y["clustered"], y["clustered/sorted"], rtol=1e-4, atol=1e-4)


def test_impossible_specs_are_refused() -> None:
    with pytest.raises(ConfigError, match="experts=6 is not divisible by clusters=4"):
        LayerBenchSpec(experts=6, clusters=4)
    with pytest.raises(ConfigError, match=r"top_k=9 must be in 1\.\.8"):
        LayerBenchSpec(top_k=(9,))
    with pytest.raises(ConfigError, match="dtype 'int8' is unknown"):
        LayerBenchSpec(dtypes=("int8",))
    for name in ("clusters", "threads", "repeats", "rank"):
        with pytest.raises(ConfigError, match=f"{name}=0 must be 1 or more"):
            LayerBenchSpec(**{**vars(TOY), name: 0})
    with pytest.raises(ConfigError, match=r"top_k=0 must be in 1\.\.8"):
        LayerBenchSpec(top_k=(2, 0))
    backends = "auto, masked, sorted, cpu, triton, reference"
    with pytest.raises(ConfigError, match=f"backend 'foo' is unknown: use one of {backends}"):
        run_layer_bench(LayerBenchSpec(backend="foo"))
    with pytest.raises(ConfigError, match=r"device 'tpu' is not available: use cpu"):
        run_layer_bench(LayerBenchSpec(device="tpu"))
    with pytest.raises(ConfigError, match="backend 'bar' is unknown"):
        run_layer_bench(LayerBenchSpec(backends=("masked", "bar")))


def test_spread() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.5, 2.5, 1.0, 3.0)
    assert Spread.of([4.0]) == Spread(4.0, 4.0, 4.0, 4.0, 4.0)
