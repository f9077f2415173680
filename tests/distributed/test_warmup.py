"""A run that starts with standard experts and goes on with clustered ones: the same on any ranks, nothing lost."""

import gc
import json
import weakref
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from moe_dist.checkpoint.store import checkpoints_of
from moe_dist.config import load_config
from moe_dist.conversion.calibration_tokens import standard_layers
from moe_dist.engine.gathered_optimizer_state import GatheredOptimizerState, OwnedState
from moe_dist.errors import TrainingError
from moe_dist.model.language_model import LanguageModel
from moe_dist.moe.parameter_class import ParameterClass, class_of
from moe_dist.training import warmup
from moe_dist.training.trainer import Trainer, train
from moe_dist.training.warmup import cluster_experts
from tests.distributed.ranks import run_ranks
from tests.distributed.test_training import SMOKE

pytestmark = pytest.mark.timeout(400)
WARM = ["moe.warmup_standard=0.5", "moe.wire_dtype=float32", "tensorboard=false", "train.eval_every=2"]


def _words(folder: Path, *more: str) -> list[str]:
    return [f"runs_dir={folder}/runs", f"corpus.cache_dir={folder}/cache", *WARM, *more]


def _train(words: list[str]) -> None:
    train(load_config(SMOKE, words))


def _outcome(folder: Path, name: str) -> tuple[list[float], dict[str, Any], dict[str, Any]]:
    """Validation losses, the event and the summary of a run."""
    run = folder / "runs" / name
    summary = json.loads((run / "summary.json").read_text())
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (event,) = [one for one in events if one["event"] == "clustered"]
    return [point["loss"] for point in summary["validation"]["curve"]], event, summary


LAYOUTS: list[tuple[int, list[str]]] = [
    (2, ["world.cluster=2", "world.zero_stage=1"]),
    (4, ["world.cluster=4", "world.zero_stage=0"]),
    (4, ["world.data=2", "world.zero_stage=2"]),
    (4, ["world.shard=2", "world.shard_mode=experts", "world.zero_stage=1", "train.micro_batch_size=2"]),
    (4, ["world.pipeline=2", "world.cluster=2", "world.zero_stage=1", "train.micro_batch_size=4"]),
    (2, ["world.pipeline=2", "world.zero_stage=2", "train.micro_batch_size=4"]),
]


@pytest.mark.slow
def test_any_layout_goes_through_the_change_alike(tmp_path: Path) -> None:
    run_ranks(_train, 1, _words(tmp_path, "name=alone"))
    losses, event, summary = _outcome(tmp_path, "alone")
    assert losses[-1] < losses[1] < losses[0]
    for number, (ranks, words) in enumerate(LAYOUTS):
        run_ranks(_train, ranks, _words(tmp_path, f"name=on-{number}", *words))
        found, found_event, found_summary = _outcome(tmp_path, f"on-{number}")
        assert found == pytest.approx(losses, rel=1e-4), words
        assert found_summary["parameters"] == summary["parameters"]
        assert found_event["loss_after"] == pytest.approx(event["loss_after"], rel=1e-4)
        for row, expected in zip(found_event["output_errors"], event["output_errors"], strict=True):
            assert row == pytest.approx(expected, abs=2e-3), words


def test_bfloat16_goes_through_the_change(tmp_path: Path) -> None:
    run_ranks(_train, 2, _words(tmp_path, "name=half", "train.precision=bfloat16", "moe.wire_dtype=bfloat16"))
    run_ranks(_train, 1, _words(tmp_path, "name=full"))
    (half, _, _), (full, _, _) = _outcome(tmp_path, "half"), _outcome(tmp_path, "full")
    assert half == pytest.approx(full, rel=0.01)


def _states(model: LanguageModel, trained: Trainer) -> dict[str, GatheredOptimizerState]:
    """Everything dense, whole, under the names of the clustered model."""
    state, mesh = trained.engine.training_state(), model.context.mesh
    return {
        name: OwnedState.of(state, parameter, mesh).whole(torch.device("cpu"))
        for name, parameter in model.named_parameters()
        if class_of(parameter) is ParameterClass.DENSE
    }


def _change_and_look(words: list[str]) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    def watched(trained: Trainer, *args: Any) -> dict[str, Any]:
        old = [weakref.ref(trained.model), weakref.ref(trained.engine._engine.optimizer)]
        before, balance = _states(trained.model, trained), trained.model.context.balance
        steps, groups = trained.engine.training_state().steps, len(distributed_c10d._world.pg_map)
        figures = cluster_experts(trained, *args)
        gc.collect()
        seen["alive"] = [ref() is not None for ref in old]
        seen["groups"] = len(distributed_c10d._world.pg_map) - groups
        after = _states(trained.model, trained)
        seen["lost"] = [n for n in before.keys() | after.keys() if not _equal(before.get(n), after.get(n))]
        seen["steps"] = trained.engine.training_state().steps - steps
        seen["biases"] = torch.equal(balance.expert_bias_LE, trained.model.context.balance.expert_bias_LE)
        seen["biased"] = bool(balance.expert_bias_LE.any())
        seen["members"] = [p.members for p in trained.model.context.placements]
        seen["figures"] = figures
        return figures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warmup, "cluster_experts", watched)
        _train(words)
    return seen


def _equal(a: dict[str, Tensor] | None, b: dict[str, Tensor] | None) -> bool:
    return a is not None and b is not None and all(torch.equal(a[kind], b[kind]) for kind in a)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 1), (2, 2)])
def test_what_is_not_an_expert_is_kept_whole_and_the_old_model_is_freed(tmp_path: Path, ranks: int, stage: int) -> None:
    for seen in run_ranks(_change_and_look, ranks, _words(tmp_path, f"world.zero_stage={stage}", "world.data=1")):
        assert seen["lost"] == []
        assert seen["steps"] == 0
        assert seen["biases"]
        assert seen["biased"]
        assert seen["alive"] == [False, False]
        assert seen["groups"] == 0
        assert seen["members"][0] != seen["members"][1], "each layer is clustered by itself"


@pytest.mark.parametrize("levels", [[], ["moe.base=shared+cluster"]], ids=["one level", "two levels"])
def test_nothing_changes_where_nothing_is_cut_off(tmp_path: Path, levels: list[str]) -> None:
    """One cluster and full rank: the clustered model is the standard one in another form."""
    (seen,) = run_ranks(_change_and_look, 1, _words(tmp_path, "moe.clusters=1", "moe.rank=32", *levels))
    figures = seen["figures"]
    assert figures["loss_after"] == pytest.approx(figures["loss_before"], rel=1e-5)
    assert figures["output_error_largest"] < 1e-4 < figures["output_error_of_bases"]


def _train_with_a_broken_expert(words: list[str]) -> str:
    def broken(trained: Trainer, *args: Any) -> dict[str, Any]:
        with torch.no_grad():
            state = trained.engine.training_state()
            for layer in (one for one in standard_layers(trained.model) if one.layer == 0):
                fragment = state.fragment(layer.experts.w_in[0])
                assert fragment is not None
                fragment.tensors["master"][0] = float("nan")
        return cluster_experts(trained, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warmup, "cluster_experts", broken)
        with pytest.raises((TrainingError, ConnectionError)) as caught:
            _train(words)
    return str(caught.value)


def test_experts_that_are_not_finite_are_not_clustered(tmp_path: Path) -> None:
    for message in run_ranks(_train_with_a_broken_expert, 2, _words(tmp_path)):
        assert message.startswith("experts cannot be clustered: weights of expert 0, 8 of layer 0 are NaN")
    words = ["world.pipeline=2", "train.micro_batch_size=4"]
    first, second = run_ranks(_train_with_a_broken_expert, 2, _words(tmp_path, *words))
    assert first.startswith("experts cannot be clustered: weights of expert 0 of layer 0 are NaN")
    assert second == f"rank 0 failed: {first}", "the stage that has no such layer"


def test_reclustering_goes_on_after_the_change(tmp_path: Path) -> None:
    words = ["recluster.period=2", "recluster.start=3", "recluster.growth=1", "recluster.transition=refit"]
    loose = ["recluster.threshold=0", "recluster.max_loss_increase=1", "recluster.similarity=random"]
    run_ranks(_train, 2, _words(tmp_path, *words, *loose))
    events = [json.loads(line) for line in (tmp_path / "runs" / "smoke" / "events.jsonl").read_text().splitlines()]
    story = [(e["event"], e["step"]) for e in events if e["event"] in ("placement", "clustered", "recluster")]
    assert story == [("placement", 4), ("clustered", 4), ("recluster", 5), ("recluster", 7)]
    for event in (e for e in events if e["event"] == "recluster"):
        assert event["moved_experts"] > 0
        assert event["bytes"] > 0
        found = [error for errors in event["output_errors"].values() for error in errors.values()]
        assert 0 < min(found) < median(found) < 1, "moves by chance, which a seldom used expert may take badly"


def test_a_run_resumes_before_and_after_the_change(tmp_path: Path) -> None:
    words = ["world.zero_stage=2", "checkpoint.every=3"]  # after steps 3, with standard experts, and 6
    run_ranks(_train, 2, _words(tmp_path, "name=straight", *words))
    checkpoints = sorted(checkpoints_of(tmp_path / "runs" / "straight"))
    assert len(checkpoints) == 2
    _, _, expected = _outcome(tmp_path, "straight")
    for number, checkpoint in enumerate(checkpoints):
        resume = f"checkpoint.resume={checkpoint}"
        run_ranks(_train, 2, _words(tmp_path, f"name=again-{number}", *words, resume))
        summary = json.loads((tmp_path / "runs" / f"again-{number}" / "summary.json").read_text())
        for key in ("validation", "load", "all_to_all", "parameters"):
            assert summary[key] == expected[key], f"{checkpoint.name}: {key}"
    run_ranks(_train, 1, _words(tmp_path, "name=alone", f"checkpoint.resume={checkpoints[0]}"))
    losses = _outcome(tmp_path, "alone")[0]
    assert losses == pytest.approx([point["loss"] for point in expected["validation"]["curve"]], rel=1e-4)
