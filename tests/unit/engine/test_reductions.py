"""Reductions of the engine: sums over ranks by hand, each rank played in turn without a process group."""

from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist.config import MoEConfig, OptimizerConfig, WorldShape
from moe_dist.distributed.init import RankInfo
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine, StepOutcome
from moe_dist.engine.gathered_optimizer_state import OwnedState, write_whole
from moe_dist.engine.gradient_norm import clip_factor, global_norm
from moe_dist.engine.optimizer import update_rule
from moe_dist.engine.optimizer_state import MASTER, STATE_NAMES, StateFragment
from moe_dist.moe.load_balancing import BalanceState

Result = TypeVar("Result")


class _CapturedError(Exception):
    """End of a rank's first turn, in which its addend was noted."""


def on_ranks(monkeypatch: pytest.MonkeyPatch, ranks: int, work: Callable[[int], Result]) -> list[Result]:
    """Return the results of `work(rank)`, which makes one all-reduce: first all addends are noted, then summed."""
    addends: list[Tensor] = []

    def note(tensor: Tensor, **_: Any) -> None:
        addends.append(tensor.clone())
        raise _CapturedError

    monkeypatch.setattr(dist, "all_reduce", note)
    for rank in range(ranks):
        with suppress(_CapturedError):
            work(rank)
    assert len(addends) == ranks, f"{len(addends)} of {ranks} ranks made an all-reduce"
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: tensor.copy_(torch.stack(addends).sum(0)))
    return [work(rank) for rank in range(ranks)]


def _outcome(rank: int, loss: float, stop: bool) -> tuple[StepOutcome, BalanceState]:
    """Outcome of one of two ranks: rank 1 has routed ten times and dropped twice as much, and has half the losses."""
    balance = BalanceState.create(2, MoEConfig(experts=4, clusters=2), torch.device("cpu"))
    balance.count_LE.copy_(torch.tensor([[1, 2, 3, 4], [0, 0, 0, 5]]) * 10**rank)
    balance.dropped_L.copy_(torch.tensor([1, 2]) * (rank + 1))
    balance.router_loss_2.copy_(torch.tensor([4.0, 8.0]) / 2**rank)
    engine: Any = DeepSpeedEngine.__new__(DeepSpeedEngine)
    mesh = SimpleNamespace(shape=WorldShape(2, 1, 1))
    engine.model = SimpleNamespace(context=SimpleNamespace(balance=balance, mesh=mesh), taught_2=None)
    engine._stages = None
    engine.process = RankInfo(rank, 2, torch.device("cpu"), timedelta(seconds=1))
    losses_and_targets_2K = torch.tensor([[loss, 1.0], [10.0, 5.0 * rank]], dtype=torch.float64)
    outcome: StepOutcome = engine._reduce_outcome(torch.tensor(loss), losses_and_targets_2K, stop)
    assert engine._count_LE.tolist() == outcome.count_LE.tolist(), "biases follow the same counts"
    return outcome, balance


def test_a_step_s_outcome_is_that_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for outcome, balance in on_ranks(monkeypatch, 2, lambda rank: _outcome(rank, 2.0 + 3 * rank, rank == 1)):
        assert outcome.loss == 3.5, "mean of 2 and 5"
        assert outcome.count_LE.tolist() == [[11, 22, 33, 44], [0, 0, 0, 55]]
        assert outcome.dropped == 3 + 6
        assert (outcome.balance_loss, outcome.z_loss) == (3, 6), "means of 4 and 2, of 8 and 4"
        assert outcome.broken_ranks == ()
        assert outcome.total_2K is not None
        assert outcome.total_2K.tolist() == [[7, 2], [20, 5]], "of two sources"
        assert outcome.stop, "one rank that was asked to stop stops all"
        assert not balance.count_LE.any(), "counts start anew in the next step"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_rank_alone(monkeypatch: pytest.MonkeyPatch, bad: float) -> None:
    for outcome, _ in on_ranks(monkeypatch, 2, lambda rank: _outcome(rank, bad if rank else 4.0, False)):
        assert outcome.broken_ranks == (1,)
        assert outcome.loss == 2, "the sum stays finite, so that loads can still be read"
        assert not outcome.stop


def test_every_element_counts_once_in_the_global_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense gradient (3, 4) on both ranks, an expert's (12) on rank 0, an offloaded square of 84 on rank 1."""

    def norm(rank: int) -> Tensor:
        gradients = [(torch.tensor([3.0, 4.0]), 2), *([(torch.tensor([12.0]), 1)] if rank == 0 else [])]
        return global_norm(gradients, torch.device("cpu"), lambda: torch.tensor(84.0 * rank, dtype=torch.float64))

    for found in on_ranks(monkeypatch, 2, norm):
        assert found.dtype is torch.float32
        assert found.item() == pytest.approx((25 + 144 + 84) ** 0.5)


def test_clipping_shrinks_large_gradients_and_leaves_small_ones() -> None:
    adamw = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    assert clip_factor(adamw, torch.tensor(8.0), 2.0) == pytest.approx(0.25, rel=1e-6)
    assert clip_factor(adamw, torch.tensor(1.0), 2.0) == 1
    assert clip_factor(adamw, torch.tensor(8.0), 0.0) is None


def test_partitioned_clipping_divides_as_deepspeed_does(monkeypatch: pytest.MonkeyPatch) -> None:
    class Partitioned:
        loss_scale = 1.0

    monkeypatch.setattr("moe_dist.engine.gradient_norm.DeepSpeedZeroOptimizer", Partitioned)
    assert clip_factor(Partitioned(), torch.tensor(8.0), 2.0) == pytest.approx(0.25, rel=1e-6)
    assert clip_factor(Partitioned(), torch.tensor(1.0), 2.0) == 1
    assert clip_factor(Partitioned(), torch.tensor(1.0), 0.0) is None
    Partitioned.loss_scale = 4.0
    assert clip_factor(Partitioned(), torch.tensor(8.0), 2.0) == pytest.approx(0.25 / 4, rel=1e-6)
    assert clip_factor(Partitioned(), torch.tensor(8.0), 0.0) == 0.25


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("layers.0.attention.weight", (2, 2), (0.1, 1.0)),
        ("layers.0.norm.weight", (2,), (0.0, 1.0)),
        ("embedding.word_embeddings.weight", (2, 2), (0.0, 1.0)),
        ("clusters.0.residuals.in_u_NDR", (2, 2, 2), (0.1, 1.0)),
        ("clusters.0.residuals.hidden_bias_NH", (2, 2), (0.0, 1.0)),
        ("clusters.0.base.w_in_DH", (2, 2), (0.1, 0.5)),
        ("experts.w_out.3", (2, 2), (0.1, 0.5)),
        ("layers.0.mlp.router.weight_ED", (2, 2), (0.1, 0.25)),
    ],
)
def test_each_parameter_has_the_decay_and_rate_of_its_kind(
    name: str, shape: tuple[int, ...], expected: tuple[float, float]
) -> None:
    options = OptimizerConfig(weight_decay=0.1, feed_forward_lr_scale=0.5, router_lr_scale=0.25)
    assert update_rule(name, nn.Parameter(torch.zeros(shape)), options) == expected


def test_a_divided_state_is_gathered_from_its_fragments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 owns elements 0 and 1 of four, rank 1 elements 2 and 3."""

    def whole(rank: int) -> dict[str, Tensor]:
        tensors = {name: torch.tensor([1.0, 2.0]) + 2 * rank + 10 * row for row, name in enumerate(STATE_NAMES)}
        fragment = StateFragment(2 * rank, tensors)
        return OwnedState(torch.Size([2, 2]), fragment, None, divided=True).whole(torch.device("cpu"))

    for found in on_ranks(monkeypatch, 2, whole):
        for row, name in enumerate(STATE_NAMES):
            assert found[name].tolist() == [[1 + 10 * row, 2 + 10 * row], [3 + 10 * row, 4 + 10 * row]]


def test_whole_values_are_written_into_this_rank_s_fragment() -> None:
    parameter = nn.Parameter(torch.zeros(2, 2))
    fragment = StateFragment(1, {name: torch.zeros(2) for name in STATE_NAMES})
    state: Any = SimpleNamespace(
        fragment=lambda _: fragment, offloaded=None, set_value=lambda held, value: held.detach().copy_(value)
    )
    write_whole(state, parameter, {MASTER: torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
    assert parameter.tolist() == [[1, 2], [3, 4]]
    assert fragment.tensors[MASTER].tolist() == [2, 3]
    assert not fragment.tensors["exp_avg"].any()
