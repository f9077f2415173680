"""Training in float16: close to float32 on any ranks, and steps that overflow are skipped on all of them together."""

import json
import math
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.checkpoint.model_state import training_tensors_of
from moe_dist.config import WorldShape, load_config, resolve_batch
from moe_dist.distributed.init import init_distributed
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.engine import loss_scale
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.memory.expert_memory import ExpertMemory
from moe_dist.model.language_model import LanguageModel
from moe_dist.training.trainer import train
from tests.distributed.ranks import run_ranks
from tests.distributed.test_engine_equality import SEQUENCES, SMALL, VOCABULARY
from tests.distributed.test_offload import _final, _weights
from tests.distributed.test_training import SMOKE

pytestmark = pytest.mark.timeout(400)
STEPS, BROKEN = 4, 2
HALF = ["train.precision=float16", "moe.wire_dtype=float16"]
AUX = ["moe.balance=aux_loss", "moe.aux_loss_weight=1", "moe.z_loss_weight=0.1"]
AWAY = ["memory.offload=true", "memory.device_budget_bytes=120000"]


@dataclass
class Story:
    """What one rank saw of a run."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    dtypes: set[str] = field(default_factory=set)
    unchanged: bool = True
    behind: int = 0


def _story(axes: tuple[int, ...], words: list[str], directory: Path, broken: str = "") -> Story:
    """Train some steps; in one of them the last rank's gradient of a parameter whose name has `broken` is infinite."""
    shape = WorldShape(*axes)  # type: ignore[arg-type]
    layout = ["train.micro_batch_size=2", f"world.pipeline={shape.pipeline}", f"memory.directory={directory}"]
    config = load_config(None, [*SMALL, *layout, *words])
    process = init_distributed(config.world)
    mesh, batch = Mesh.create(shape, timedelta(seconds=60)), resolve_batch(config, process.ranks)
    memory = None
    if config.memory.offload:
        memory = ExpertMemory(config, config.moe.clusters // axes[1], process.rank, process.device)
    model = LanguageModel(config, VOCABULARY, mesh, Links.discover(process.device), batch.accumulation, memory=memory)
    engine, story, share = DeepSpeedEngine(model, config, batch, process), Story(), SEQUENCES // shape.sequence_groups
    for step in range(STEPS):
        data = torch.randint(VOCABULARY, (SEQUENCES, 17), generator=torch.Generator().manual_seed(step))
        hooks = []
        if broken and step == BROKEN and process.rank == process.ranks - 1:
            chosen = next(parameter for name, parameter in model.named_parameters() if broken in name)
            hooks.append(chosen.register_hook(lambda gradient: torch.full_like(gradient, math.inf)))
        group = mesh.in_attention.group
        outcome = engine.forward_backward(data[group * share : (group + 1) * share])
        before = _state(model, engine) if broken and step == BROKEN else {}
        story.losses.append(outcome.loss)
        story.norms.append(engine.update(outcome, 1e-3))
        story.scales.append(engine.loss_scale.scale)
        if before:
            after = _state(model, engine)
            story.unchanged = not [key for key, value in before.items() if not torch.equal(value, after[key])]
        for hook in hooks:
            hook.remove()
    story.dtypes = {str(value.dtype) for value in _weights(model).values()}
    if memory is not None:
        story.behind = sum(cluster.has_gradient for cluster in memory.clusters.values())
        memory.close()
    return story


def _state(model: LanguageModel, engine: DeepSpeedEngine) -> dict[str, Tensor]:
    state, balance = engine.training_state(), model.context.balance
    tensors = training_tensors_of(model, state)
    found = {f"{n} {s.start}": s.values.clone() for n, t in tensors.items() for s in t.shards} | _weights(model)
    biases = {"expert": balance.expert_bias_LE.clone(), "cluster": balance.cluster_bias_LG.clone()}
    return found | biases | {"steps": torch.tensor(state.steps)}


def _both(axes: tuple[int, ...], variants: list[list[str]], directory: Path) -> list[tuple[Story, Story]]:
    return [(_story(axes, [*words, *HALF], directory), _story(axes, words, directory)) for words in variants]


STAGED = (1, 1, 1, 1, 1, 1, 0, 2)
"""Two pipeline stages."""


def _ranks(axes: tuple[int, ...]) -> int:
    return WorldShape(*axes).ranks  # type: ignore[arg-type]


@pytest.mark.parametrize("axes", [(1, 1, 1), (1, 2, 1), (2, 1, 2), STAGED], ids=str)
def test_float16_trains_like_float32(axes: tuple[int, ...], tmp_path: Path) -> None:
    """Norms would show a gradient whose scale is not removed, or that was never scaled."""
    variants = [["world.zero_stage=0", *AUX], ["world.zero_stage=2", *AUX], ["world.zero_stage=1", *AWAY, *AUX]]
    variants.append(["world.zero_stage=0", "optimizer.clip_norm=0", *AWAY])
    variants = [words for words in variants if axes != STAGED or AWAY[0] not in words]
    for stories in run_ranks(_both, _ranks(axes), axes, variants, tmp_path, timeout=300):
        for words, (half, full) in zip(variants, stories, strict=True):
            assert half.dtypes == {"torch.float16"}
            assert half.losses == pytest.approx(full.losses, rel=5e-3), words
            assert half.norms == pytest.approx(full.norms, rel=2e-2), words
            assert half.scales == [loss_scale.INITIAL] * STEPS


def _injected(axes: tuple[int, ...], cases: list[tuple[list[str], str]], directory: Path) -> list[Story]:
    return [_story(axes, [*words, *HALF], directory, broken) for words, broken in cases]


@pytest.mark.parametrize("axes", [(1, 1, 1), (1, 2, 1), (2, 2, 1), STAGED], ids=str)
def test_an_overflow_on_one_rank_skips_the_step_on_all(axes: tuple[int, ...], tmp_path: Path) -> None:
    cases = [([f"world.zero_stage={stage}"], "in_u_NDR") for stage in (0, 1, 2)]
    cases += [([*AWAY, "world.zero_stage=1"], name) for name in ("embedding", "w_in_DH")]
    cases.append(([*AWAY, "world.zero_stage=0"], "w_in_DH"))
    cases = [(words, name) for words, name in cases if axes != STAGED or AWAY[0] not in words]
    for stories in run_ranks(_injected, _ranks(axes), axes, cases, tmp_path, timeout=300):
        for case, story in zip(cases, stories, strict=True):
            assert [math.isfinite(norm) for norm in story.norms] == [step != BROKEN for step in range(STEPS)], case
            assert story.unchanged, case
            assert story.scales == [2**16, 2**16, 2**15, 2**15], case
            assert all(map(math.isfinite, story.losses)), case
            assert story.behind == 0, "no gradient is left over"


def _train(words: list[str]) -> None:
    loss_scale.WINDOW = 2  # so that the scale grows in a few steps
    train(load_config(SMOKE, words))


def _summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


@pytest.mark.parametrize("words", [["world.zero_stage=1"], [*AWAY[:1], "memory.device_budget_bytes=200000"]], ids=str)
def test_a_run_resumes_with_its_scale_and_in_other_precisions(tmp_path: Path, words: list[str]) -> None:
    runs = tmp_path / "runs"
    common = [f"runs_dir={runs}", f"corpus.cache_dir={tmp_path}/cache", "tensorboard=false", "train.steps=6"]
    common += ["checkpoint.every=3", *words]
    resume = f"checkpoint.resume={runs}/straight/checkpoints/step-00000003"
    for name, more in {
        "straight": HALF,
        "again": [*HALF, resume],
        "wide": ["train.precision=float32", resume],
        "brain": ["train.precision=bfloat16", resume],
        "back": [*HALF, f"checkpoint.resume={runs}/wide/checkpoints/step-00000006", "train.steps=8"],
    }.items():
        run_ranks(_train, 1, [*common, f"name={name}", *more], timeout=200)
    straight, again = _summary(runs / "straight"), _summary(runs / "again")
    assert straight["loss_scale"] == again["loss_scale"] == {"scale": 2.0**19, "skipped_steps": 0}
    assert straight["validation"] == again["validation"]
    expected, found = _final(runs / "straight"), _final(runs / "again")
    assert not [key for key, value in expected.items() if not torch.equal(found[key], value)]
    for name in ("wide", "brain"):
        assert _summary(runs / name)["loss_scale"] is None
        assert _summary(runs / name)["validation"]["loss"] == pytest.approx(straight["validation"]["loss"], rel=5e-3)
    assert _summary(runs / "back")["loss_scale"]["scale"] == 2.0**17, "a new scale, grown once"
    lines = [json.loads(line) for line in (runs / "straight" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss_scale", "skipped_steps"} <= lines[0]["train"].keys()
