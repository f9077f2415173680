"""Masters and moments are found, and can be written, under every ZeRO stage and precision."""

from datetime import timedelta

import pytest
import torch
from torch import Tensor

from moe_dist.config import WorldShape, load_config, resolve_batch
from moe_dist.distributed.init import init_distributed
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.engine.optimizer import MOMENTS
from moe_dist.engine.optimizer_state import MASTER, STATE_NAMES
from moe_dist.model.language_model import LanguageModel
from tests.distributed.ranks import run_ranks
from tests.distributed.test_engine_equality import SEQUENCES, SMALL, VOCABULARY

pytestmark = pytest.mark.timeout(400)
VARIANTS = [
    [f"world.zero_stage={stage}", f"train.precision={precision}"]
    for stage in (0, 1, 2)
    for precision in ("float32", "bfloat16")
]
Owned = dict[str, tuple[int, int, dict[str, Tensor]]]
Held = dict[str, Tensor]


def _engine(axes: tuple[int, int, int], words: list[str]) -> DeepSpeedEngine:
    config = load_config(None, [*SMALL, *words])
    process = init_distributed(config.world)
    mesh = Mesh.create(WorldShape(*axes), timedelta(seconds=60))
    batch = resolve_batch(config, process.ranks)
    model = LanguageModel(config, VOCABULARY, mesh, Links.discover(process.device), batch.accumulation)
    return DeepSpeedEngine(model, config, batch, process)


def _step(engine: DeepSpeedEngine, rate: float) -> None:
    process = engine.process
    data = torch.randint(VOCABULARY, (SEQUENCES, 17), generator=torch.Generator().manual_seed(1))
    share = SEQUENCES // process.ranks
    engine.update(engine.forward_backward(data[process.rank * share : (process.rank + 1) * share]), rate)


def _after_two_steps(axes: tuple[int, int, int]) -> list[tuple[Owned, Held, int]]:
    found = []
    for words in VARIANTS:
        engine = _engine(axes, words)
        for _ in range(2):
            _step(engine, 1e-3)
        state, owned, held = engine.training_state(), {}, {}
        for name, parameter in engine.model.named_parameters():
            held[name] = parameter.detach().clone()
            fragment = state.fragment(parameter)
            if fragment is not None:
                values = {key: value.clone() for key, value in fragment.tensors.items()}
                owned[name] = (fragment.start, fragment.end, values)
        found.append((owned, held, state.steps))
    return found


@pytest.mark.parametrize("axes", [(2, 1, 1), (1, 2, 1)], ids=str)
def test_fragments_cover_every_parameter(axes: tuple[int, int, int]) -> None:
    ranks = run_ranks(_after_two_steps, 2, axes, timeout=180)
    for number, words in enumerate(VARIANTS):
        for rank in range(2):
            owned, held, steps = ranks[rank][number]
            assert steps == 2
            for name, (start, end, values) in owned.items():
                assert set(values) == set(STATE_NAMES)
                piece = held[name].flatten()[start:end]
                assert torch.equal(values[MASTER].to(piece.dtype), piece), f"{words}, rank {rank}, {name}"
        _assert_covered([ranks[rank][number][0] for rank in range(2)], ranks[0][number][1], axes, words)


def _assert_covered(owned: list[Owned], held: Held, axes: tuple[int, int, int], words: list[str]) -> None:
    whole = "world.zero_stage=0" in words
    for name, value in held.items():
        ranges = [one[name][:2] for one in owned if name in one]
        if whole or (axes == (1, 2, 1) and ".clusters." in name):  # one replica: all of it is here
            assert ranges == [(0, value.numel())] * 2, f"{words}: {name}"
        else:  # two replicas, or a dense parameter of two ranks: each element once
            assert sorted(e for pair in ranges for e in range(*pair)) == list(range(value.numel())), f"{words}: {name}"


def test_every_stage_keeps_the_same_state() -> None:
    one = run_ranks(_after_two_steps, 1, (1, 1, 1), timeout=180)[0]
    plain, *others = [one[number] for number, words in enumerate(VARIANTS) if "train.precision=float32" in words]
    for owned, _, _ in others:
        for name, (_, _, values) in plain[0].items():
            for key in STATE_NAMES:
                torch.testing.assert_close(owned[name][2][key], values[key], rtol=1e-5, atol=1e-7, msg=f"{name} {key}")


def _write_and_step() -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Writes chosen values to all state, then makes an update in which only they matter (rate 0: decay-free)."""
    results = []
    for words in VARIANTS:
        engine = _engine((1, 1, 1), [*words, "optimizer.weight_decay=0"])
        state = engine.training_state()
        assert state.steps == 0
        state.steps = 5
        written = {}
        for name, parameter in engine.model.named_parameters():
            fragment = state.fragment(parameter)
            assert fragment is not None
            fragment.tensors[MASTER].fill_(0.5)
            assert all(not fragment.tensors[moment].any() for moment in MOMENTS)
            written[name] = parameter
        _step(engine, 0.0)
        assert engine.training_state().steps == 6
        results.append({name: (parameter.detach().clone(), torch.tensor(0.5)) for name, parameter in written.items()})
    return results


def test_what_is_written_is_what_the_next_update_starts_from() -> None:
    (results,) = run_ranks(_write_and_step, 1)
    for words, parameters in zip(VARIANTS, results, strict=True):
        for name, (value, expected) in parameters.items():
            assert torch.equal(value, expected.to(value.dtype).expand_as(value)), f"{words}: {name}"
