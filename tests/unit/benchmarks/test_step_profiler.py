"""Step profiler: the part of every interval, forward and backward, with a clock that counts by itself."""

import itertools

import pytest
import torch
from torch import Tensor

from moe_dist.benchmarks.step import profiler as module
from moe_dist.benchmarks.step.parts import PARTS, step_profiler
from moe_dist.benchmarks.step.profiler import StepPart, StepProfiler
from moe_dist.benchmarks.step.spec import StepBenchSpec
from moe_dist.config import load_config
from moe_dist.errors import ConfigError

SEEN: list[tuple[str, StepPart]] = []


class _Spy(torch.autograd.Function):
    """Tells in which part its forward and backward run."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, profiler: StepProfiler, name: str) -> Tensor:
        ctx.profiler, ctx.name = profiler, name  # type: ignore[attr-defined]
        SEEN.append((f"{name} forward", profiler.part))
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        SEEN.append((f"{ctx.name} backward", ctx.profiler.part))  # type: ignore[attr-defined]
        return grad, None, None


def test_parts_are_the_same_backwards() -> None:
    profiler = StepProfiler()

    def spy(x: Tensor, name: str) -> Tensor:
        y: Tensor = _Spy.apply(x, profiler, name)  # type: ignore[no-untyped-call]
        return y

    experts = profiler.wrap(StepPart.EXPERTS, lambda x: spy(x, "experts"))
    dispatch = profiler.wrap(StepPart.PERMUTE, lambda x: spy(experts(spy(x, "there")), "back"))
    SEEN.clear()
    profiler.start()
    x = torch.ones(2, requires_grad=True)
    y = spy(dispatch(spy(x, "before")), "after")
    y.sum().backward()
    profiler.stop()
    for way in ("forward", "backward"):
        found = {name: part for name, part in SEEN if name.endswith(way)}
        assert found == {
            f"before {way}": StepPart.ELSE,
            f"there {way}": StepPart.PERMUTE,
            f"experts {way}": StepPart.EXPERTS,
            f"back {way}": StepPart.PERMUTE,
            f"after {way}": StepPart.ELSE,
        }
    assert torch.equal(x.grad if x.grad is not None else x, torch.ones(2))


def test_what_is_handed_on_stays_with_its_maker() -> None:
    """A part's result that goes straight into the next part, or out of the one around it."""
    profiler = StepProfiler()

    def spy(x: Tensor, name: str) -> Tensor:
        y: Tensor = _Spy.apply(x, profiler, name)  # type: ignore[no-untyped-call]
        return y

    routing = profiler.wrap(StepPart.ROUTING, lambda x: spy(x, "routing"))
    experts = profiler.wrap(StepPart.EXPERTS, lambda x: spy(x, "experts"))
    dispatch = profiler.wrap(StepPart.PERMUTE, lambda x: experts(x))
    SEEN.clear()
    profiler.start()
    dispatch(routing(torch.ones(2, requires_grad=True))).sum().backward()
    profiler.stop()
    assert ("experts backward", StepPart.EXPERTS) in SEEN
    assert ("routing backward", StepPart.ROUTING) in SEEN


def test_all_time_belongs_to_some_part(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(module, "_now", lambda: float(next(ticks)))
    profiler = StepProfiler()
    profiler.start()  # 0
    inner = profiler.wrap(StepPart.ROUTING, lambda: None)
    profiler.wrap(StepPart.PERMUTE, lambda: inner())()  # 1 2 3 4
    profiler.stop()  # 5
    assert profiler.seconds == {StepPart.ELSE: 2.0, StepPart.PERMUTE: 2.0, StepPart.ROUTING: 1.0}


def test_a_part_that_fails_gives_its_time_back() -> None:
    profiler = StepProfiler()
    profiler.start()
    with pytest.raises(ZeroDivisionError):
        profiler.wrap(StepPart.EXPERTS, lambda: 1 / 0)()
    assert profiler.part is StepPart.ELSE


def test_an_idle_clock_leaves_no_marks() -> None:
    profiler = StepProfiler()
    y = profiler.wrap(StepPart.EXPERTS, lambda: torch.ones(1, requires_grad=True) * 2)()
    assert profiler.part is StepPart.ELSE
    assert not profiler.seconds
    y.backward()


def test_every_part_exists_and_is_put_back() -> None:
    before = [getattr(owner, name) for members in PARTS.values() for owner, name in members]
    with step_profiler():
        during = [getattr(owner, name) for members in PARTS.values() for owner, name in members]
        assert not any(a is b for a, b in zip(before, during, strict=True))
    assert [getattr(owner, name) for members in PARTS.values() for owner, name in members] == before


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        (StepBenchSpec(kinds=("sparse",)), "--kind sparse: use clustered, standard, dense"),
        (StepBenchSpec(kinds=()), "--kind : use"),
        (StepBenchSpec(rounds=0), "--rounds 0 must be 1 or more"),
        (StepBenchSpec(divided=-1), "--divided -1 must be 0 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(spec: StepBenchSpec, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        spec.configs(load_config(None, []))


@pytest.mark.parametrize(
    "words",
    [
        ["train.precision=bfloat16"],
        ["world.pipeline=2", "world.virtual_pipeline=2", "model.layers=4"],
        ["moe.dense_layers=1", "moe.dense_hidden=64", "model.layers=2"],
        ["moe.shared_expert_hidden=64"],
        ["moe.capacity_factor=1.5"],
    ],
)
def test_megatrons_own_model_is_refused_what_it_would_not_do(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=rf"--kind megatron-moe: {words[0].split('=')[0]}|world.virtual_pipeline=2: "):
        StepBenchSpec(("megatron-moe",)).configs(load_config(None, ["train.precision=float32", *words]))
