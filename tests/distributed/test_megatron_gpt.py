"""Megatron-core's own GPT, the baseline of `bench step`, and our model train alike from the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.benchmarks.baselines.megatron_gpt import MegatronTraining
from moe_dist.config import load_config, resolve_world
from moe_dist.data import prepare_data
from moe_dist.distributed.init import init_distributed
from moe_dist.metrics.recorder import NullRecorder
from moe_dist.moe.dense_feed_forward import SwiGLU
from moe_dist.moe.standard_moe import StandardMoE
from moe_dist.training.trainer import Trainer
from tests.distributed.ranks import run_ranks

SMOKE = Path(__file__).parents[2] / "configs" / "test" / "smoke.yaml"
STEPS, RATE = 4, 0.01
WORDS = [
    "train.precision=float32", f"optimizer.learning_rate={RATE}", "optimizer.weight_decay=0", "optimizer.clip_norm=0.2",
    "optimizer.router_lr_scale=1", "moe.gate_scale=1", "moe.wire_dtype=float32", "moe.balance=none",
    "train.micro_batch_size=4", "train.steps=8", "train.warmup_steps=0",
]  # fmt: skip
WINDOW = ["model.window=9", "model.window_from=1"]
LAYOUTS = {
    2: [[], ["world.zero_stage=0"], ["world.tensor=2"], ["world.context=2"], ["world.pipeline=2", *WINDOW]],
    4: [["world.tensor=2", "world.pipeline=2"]],
}


def _losses(folder: Path, variants: list[list[str]]) -> list[tuple[list[float], list[float]]]:
    return [_of_both(folder, [*words, f"moe.kind={kind}"]) for words in variants for kind in ("dense", "standard")]


def _of_both(folder: Path, words: list[str]) -> tuple[list[float], list[float]]:
    """Losses of each step of our model and of Megatron's."""
    config = load_config(SMOKE, [*WORDS, f"corpus.cache_dir={folder}", f"runs_dir={folder}", *words])
    process = init_distributed(config.world)
    data = prepare_data(config.corpus, config.tokenizer)
    own = Trainer(config, process, resolve_world(config, process.ranks), data, NullRecorder(folder))
    megatron = MegatronTraining(config, process, data)
    _copy_feed_forward(own, megatron.model.module)
    ours, theirs = [], []
    for step in range(STEPS):
        own.model.target_share = 1.0
        outcome = own.engine.forward_backward(own.loader.batch(step).sequences_BS, lambda: False)
        own.engine.update(outcome, RATE)
        ours.append(outcome.loss)
        mean, last = torch.tensor(megatron.step()), own.mesh.stage == own.shape.pipeline - 1
        sums = torch.stack([mean * last, torch.tensor(float(last))])
        dist.all_reduce(sums)
        theirs.append((sums[0] / sums[1]).item())
    own.loader.close()
    megatron.close()
    return ours, theirs


@torch.no_grad()
def _copy_feed_forward(own: Trainer, gpt: Any) -> None:
    tensor, part = own.shape.tensor, own.mesh.in_attention.tensor
    own_gpt: Any = own.model.gpt
    for ours, theirs in zip(own_gpt.decoder.layers, gpt.decoder.layers, strict=True):
        inner: Any = ours.mlp.inner
        if isinstance(inner, SwiGLU):
            _copy(inner.w_in_DH, inner.w_out_FD, theirs.mlp, tensor, part)
        else:
            assert isinstance(inner, StandardMoE)
            theirs.mlp.router.weight.copy_(inner.router.weight_ED)
            experts = inner.experts
            for w_in, w_out, expert in zip(experts.w_in, experts.w_out, theirs.mlp.experts.local_experts, strict=True):
                _copy(w_in, w_out, expert, 1, 0)


def _copy(w_in_DH: Tensor, w_out_FD: Tensor, mlp: Any, tensor: int, part: int) -> None:
    """Copy one network, of which a rank of a tensor group has a part of the gate's rows and of the others'."""
    halves = [half.T.chunk(tensor)[part] for half in w_in_DH.chunk(2, dim=1)]
    mlp.linear_fc1.weight.copy_(torch.cat(halves))
    mlp.linear_fc2.weight.copy_(w_out_FD.T.chunk(tensor, dim=1)[part])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", LAYOUTS)
def test_megatron_trains_as_we_do(ranks: int, tmp_path: Path) -> None:
    variants = LAYOUTS[ranks]
    for found in run_ranks(_losses, ranks, tmp_path, variants, timeout=250):
        for number, (ours, theirs) in enumerate(found):
            assert ours[0] - ours[-1] > 0.05
            what = f"{variants[number // 2]}, {('dense', 'standard')[number % 2]}"
            assert theirs == pytest.approx(ours, rel=1e-5), what
