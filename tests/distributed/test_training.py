"""Whole small runs on several ranks: the same results for any number, the run folder, faults."""

import json
import math
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.config import load_config
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine, StepOutcome
from moe_dist.errors import DataError, TrainingError
from moe_dist.metrics import missing_keys
from moe_dist.model.language_model import LanguageModel
from moe_dist.training.preemption import StopSignals
from moe_dist.training.trainer import train
from tests.distributed.ranks import run_ranks

SMOKE = Path(__file__).parents[2] / "configs" / "test" / "smoke.yaml"


def _words(folder: Path, *more: str) -> list[str]:
    return [f"runs_dir={folder}/runs", f"corpus.cache_dir={folder}/cache", *more]


def _train(words: list[str]) -> None:
    train(load_config(SMOKE, words))


def _summary(folder: Path, name: str) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "runs" / name / "summary.json").read_text())
    return summary


def test_any_number_of_ranks_gives_the_same_validation_losses(tmp_path: Path) -> None:
    for ranks in (1, 2, 4):
        run_ranks(_train, ranks, _words(tmp_path, f"name=on-{ranks}", "moe.wire_dtype=float32"))
    one, two, four = (_summary(tmp_path, f"on-{ranks}") for ranks in (1, 2, 4))
    losses = [[point["loss"] for point in summary["validation"]["curve"]] for summary in (one, two, four)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
    assert [summary["world"]["cluster"] for summary in (one, two, four)] == [1, 2, 4]
    assert one["parameters"] == two["parameters"] == four["parameters"]
    assert one["all_to_all"]["bytes"] == 0 < two["all_to_all"]["bytes"] < four["all_to_all"]["bytes"]
    by_rank = [summary["load"].pop("rank") for summary in (one, four)]
    assert one["load"].pop("cluster") == pytest.approx(four["load"].pop("cluster"), rel=1e-3)
    assert one["load"] == pytest.approx(four["load"], rel=1e-3)
    assert by_rank[0]["max_over_mean"] == 1 < by_rank[1]["max_over_mean"]


def test_run_folder_keeps_its_contract(tmp_path: Path) -> None:
    run_ranks(_train, 2, _words(tmp_path, "tensorboard=true"))
    folder, summary = tmp_path / "runs" / "smoke", _summary(tmp_path, "smoke")
    assert missing_keys(summary) == []
    assert summary["tokens"] == 8 * 16 * 32
    assert summary["first_step_seconds"] > 0
    assert summary["validation"]["perplexity"] == pytest.approx(math.exp(summary["validation"]["loss"]))
    assert summary["all_to_all"]["bytes"] == sum(summary["all_to_all"]["bytes_by_payload"].values())
    token_layers = 8 * 16 * 32 * 2  # steps x sequences x tokens x layers
    assert summary["all_to_all"]["bytes_per_token_layer"] == summary["all_to_all"]["bytes"] / token_layers
    bases, residual = 4 * 3 * 32 * 32, 3 * 2 * (32 + 32) + 3 * 32 + 32  # 4 clusters; factors of rank 2, and vectors
    assert summary["parameters"]["expert"] == 2 * (bases + 16 * residual)
    assert summary["parameters"]["expert_standard"] == 2 * 16 * 3 * 32 * 32
    assert load_config(folder / "config.yaml") == load_config(SMOKE, _words(tmp_path, "tensorboard=true"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train" in line] == list(range(1, 9))
    loads = [json.loads(line) for line in (folder / "load.jsonl").read_text().splitlines()]
    assert [line["step"] for line in loads] == list(range(1, 9))
    for line in loads:
        assert [sum(layer) for layer in line["experts"]] == [16 * 32 * 2] * 2  # tokens x top_k, in each layer
        assert [sum(layer) for layer in line["ranks"]] == [16 * 32 * 2] * 2
    traffic = json.loads((folder / "traffic.json").read_text())
    assert list(traffic["stages"]) == ["one"]
    assert np.trace(traffic["stages"]["one"]["bytes"]) == 0
    assert np.sum(traffic["stages"]["one"]["bytes"]) == summary["all_to_all"]["bytes"]
    assert np.sum(traffic["stages"]["one"]["messages"]) == summary["all_to_all"]["messages"]
    assert all(
        line["memory"]["rss_bytes_max"] >= line["memory"]["rss_bytes_min"] > 0 for line in lines if "train" in line
    )
    events = [json.loads(line)["event"] for line in (folder / "events.jsonl").read_text().splitlines()]
    assert events == ["started", "placement", "backend", "evaluation", "evaluation", "checkpoint", "finished"]
    assert list((folder / "tensorboard").iterdir())


def _train_and_tell_dtypes(words: list[str]) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """Dtypes of the model's floating-point weights, and of what the optimizer updates with its moments."""
    update, engines = DeepSpeedEngine.update, []

    def seen(self: DeepSpeedEngine, outcome: StepOutcome, learning_rate: float) -> float:
        engines.append(self)
        return update(self, outcome, learning_rate)

    DeepSpeedEngine.update = seen  # type: ignore[method-assign]
    _train(words)
    optimizer = engines[-1]._engine.optimizer
    masters = [master for group in optimizer.param_groups for master in group["params"]]
    moments = [value for state in optimizer.state.values() for name, value in state.items() if "exp_avg" in name]
    assert moments
    weights = {parameter.dtype for parameter in engines[-1].model.parameters()}
    return weights, {tensor.dtype for tensor in (*masters, *moments)}


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_bfloat16_trains_with_float32_masters(tmp_path: Path, zero_stage: int) -> None:
    words = [f"world.zero_stage={zero_stage}", "train.steps=12", "train.eval_every=0", "optimizer.learning_rate=1e-3"]
    half_words = _words(tmp_path, *words, "name=half", "train.precision=bfloat16")
    for weights, masters in run_ranks(_train_and_tell_dtypes, 2, half_words):
        assert torch.bfloat16 in weights
        assert masters == {torch.float32}
    run_ranks(_train, 2, _words(tmp_path, *words, "name=full", "moe.wire_dtype=float32"))
    half, full = _summary(tmp_path, "half"), _summary(tmp_path, "full")
    assert half["validation"]["loss"] == pytest.approx(full["validation"]["loss"], rel=0.01)


@pytest.mark.parametrize("kind", ["standard", "dense"])
def test_baselines_run(tmp_path: Path, kind: str) -> None:
    words = [f"moe.kind={kind}", *(["moe.balance=aux_loss"] if kind == "standard" else [])]
    run_ranks(_train, 2, _words(tmp_path, *words))
    summary = _summary(tmp_path, "smoke")
    assert missing_keys(summary) == []
    assert (summary["parameters"]["expert_standard"] > 0) is (kind == "standard")
    assert (summary["load"]["variance"] is None) is (kind == "dense")
    lines = [json.loads(line) for line in (tmp_path / "runs" / "smoke" / "metrics.jsonl").read_text().splitlines()]
    told = [line["train"].get("balance_loss") for line in lines if "train" in line]
    if kind == "dense":
        assert set(told) == {None}
    else:  # 1 for each of two layers where loads are equal, times the weight
        assert told == pytest.approx([0.02] * len(told), rel=0.2)


def _train_with_a_broken_rank(words: list[str]) -> str:
    forward, calls = LanguageModel.forward, 0

    def sometimes_broken(self: LanguageModel, sequence_BS: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        loss = forward(self, sequence_BS)
        return loss * math.nan if calls == 3 and dist.get_rank() == 1 else loss

    LanguageModel.forward = sometimes_broken  # type: ignore[method-assign]
    with pytest.raises(TrainingError) as caught:
        _train(words)
    return str(caught.value)


def test_a_loss_that_is_not_finite_stops_all_ranks(tmp_path: Path) -> None:
    messages = run_ranks(_train_with_a_broken_rank, 2, _words(tmp_path))
    assert all(message.startswith("step 3: the loss of rank 1 is NaN or infinite") for message in messages)
    events = (tmp_path / "runs" / "smoke" / "events.jsonl").read_text()
    assert json.loads(events.splitlines()[-1])["event"] == "failed"
    assert not (tmp_path / "runs" / "smoke" / "summary.json").exists()


def _train_on_texts_of_each_rank(words: list[str]) -> str:
    with pytest.raises(DataError) as caught:
        _train([*words, f"corpus.max_bytes={400_000 + 100_000 * dist.get_rank()}"])
    return str(caught.value)


def test_ranks_with_other_text_are_refused(tmp_path: Path) -> None:
    for message in run_ranks(_train_on_texts_of_each_rank, 2, _words(tmp_path)):
        assert message.startswith("rank 1 prepared other tokens than rank 0")


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine")
def test_trains_on_the_accelerator(tmp_path: Path) -> None:
    run_ranks(_train, 1, _words(tmp_path))
    assert _summary(tmp_path, "smoke")["memory"]["peak_device_bytes"] > 0


def _train_until_asked(words: list[str]) -> bool:
    """Rank 1 alone gets the signal, in the middle of step 3."""
    forward, calls = LanguageModel.forward, 0
    hear, heard = StopSignals._hear, threading.Event()

    def hear_and_tell(self: StopSignals, signum: int) -> None:
        hear(self, signum)
        heard.set()

    def asked(self: LanguageModel, sequence_BS: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert heard.wait(60)  # for the thread that listens
        return forward(self, sequence_BS)

    StopSignals._hear = hear_and_tell  # type: ignore[method-assign]
    LanguageModel.forward = asked  # type: ignore[method-assign]
    return train(load_config(SMOKE, words))


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path: Path) -> None:
    assert run_ranks(_train_until_asked, 2, _words(tmp_path)) == [True, True]
    run = tmp_path / "runs" / "smoke"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in events[-2:]] == [("checkpoint", 3), ("stopped", 3)]
    assert not (run / "summary.json").exists()
    run_ranks(_train, 2, _words(tmp_path, "name=undisturbed"))
    run_ranks(_train, 2, _words(tmp_path, "checkpoint.resume=auto"))
    assert _summary(tmp_path, "smoke")["validation"] == _summary(tmp_path, "undisturbed")["validation"]
