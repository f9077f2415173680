"""Clustered layers under Megatron-core's own DDP: gradients, norm, recomputation and checkpoints as of one process."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from moe_dist.errors import ConfigError
from tests.distributed.drop_in import (
    CLIP,
    MOE,
    RATE,
    STEPS,
    WIDTH,
    OnCpu,
    SmallModel,
    assert_trained_alike,
    loss_of,
    losses_of_example,
    plain_training,
    weights_of,
)
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.timeout(300)


def _config(**more: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=2, hidden_size=WIDTH, num_attention_heads=2, init_method_std=0.3, use_cpu_initialization=True, **more
    )


def _model(config: Any) -> SmallModel:
    from megatron.core.transformer.spec_utils import build_module

    from moe_dist.integrations.megatron import clustered_moe_spec

    def layer(seed: int) -> Any:
        built = build_module(clustered_moe_spec(MOE, output_init_std=0.3), config=config)
        built.set_layer_number(seed + 1)
        return built

    return SmallModel(layer)


def _optimizer(model: Any) -> Any:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = OptimizerConfig(optimizer="sgd", lr=RATE, weight_decay=0.0, sgd_momentum=0.0, clip_grad=CLIP)
    return get_megatron_optimizer(config, [model], use_gloo_process_groups=False)


def _train(model: Any, steps: range) -> list[float]:
    """Train by Megatron's DDP, gradient norm and optimizer."""
    from moe_dist.integrations.megatron import finalize_model_grads

    optimizer, losses = _optimizer(model), []
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for step in steps:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        loss = loss_of(model, step, rank, ranks)
        loss.backward()
        finalize_model_grads([model])
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / ranks)
    return losses


def _wrapped(**more: Any) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    config = _config(**more)
    return DistributedDataParallel(config, DistributedDataParallelConfig(), _model(config))


def _trainings(cases: list[tuple[int, bool]], folder: str) -> list[Any]:
    with OnCpu():
        return _trainings_on_cpu(cases, folder)


def _trainings_on_cpu(cases: list[tuple[int, bool]], folder: str) -> list[Any]:
    from megatron.core import parallel_state

    from moe_dist.model.megatron_backbone import initialize_megatron

    found: list[Any] = []
    for expert_parallel, recompute in cases:
        initialize_megatron(60, expert_parallel)
        more = {"recompute_granularity": "selective", "recompute_modules": ["moe"]} if recompute else {}
        model = _wrapped(**more)
        found.append((_train(model, range(STEPS)), weights_of(model.module)))
    if folder:
        found += [_through_a_checkpoint(model.module, folder), _refusals()]
        parallel_state.destroy_model_parallel()
        found.append(losses_of_example("megatron_training.py"))
    return found


def _through_a_checkpoint(trained: SmallModel, folder: str) -> dict[str, Any]:
    """Weights of a model on other expert parallelism that has read Megatron's distributed checkpoint of this one."""
    from megatron.core import dist_checkpointing

    from moe_dist.model.megatron_backbone import initialize_megatron

    dist_checkpointing.save(_sharded(trained), folder)
    initialize_megatron(60, 1)
    other = _model(_config())
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(dist_checkpointing.load(_sharded(other), folder), strict=False)
    return {name: value for name, value in weights_of(other).items() if not name.startswith("dense")}


def _sharded(model: SmallModel) -> dict[str, Any]:
    layers: Any = model.layers
    return {k: v for i, layer in enumerate(layers) for k, v in layer.sharded_state_dict(f"layers.{i}.").items()}


def _refusals() -> list[str]:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from moe_dist.integrations.megatron import MegatronClusteredMoE

    assert issubclass(MegatronClusteredMoE, MoELayer), "what Megatron-core asks in its layers"
    messages = []
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"tensor_model_parallel_size": 2}, {}), ({}, {"z_loss_weight": 0.1}), ({"cuda_graph_impl": "local"}, {}),
    ]  # fmt: skip
    for config, moe in cases:
        with pytest.raises(ConfigError) as caught:
            MegatronClusteredMoE(SimpleNamespace(**vars(_config()) | config), MOE.model_copy(update=moe))
        messages.append(str(caught.value))
    return messages


def test_two_ranks_train_like_one_process(tmp_path: Path) -> None:
    expected, cases = plain_training(clip=True), [(1, False), (2, False), (2, True)]
    for results in run_ranks(_trainings, 2, cases, str(tmp_path), timeout=240):
        *trainings, reloaded, refusals, losses = results
        for case, found in zip(cases, trainings, strict=True):
            assert_trained_alike(found, expected, f"expert parallel, recomputation {case}: ")
        assert_trained_alike((expected[0], reloaded), expected, "reloaded: ")
        assert sum(".residuals.in_u_NDR" in name for name in reloaded) == 2 * MOE.clusters
        assert losses[-1] < losses[0] - 0.3, "the example learns"
        tensor, loss, graph = refusals
        assert tensor.startswith("tensor_model_parallel_size=2, expert_tensor_parallel_size=")
        assert loss == "balance=bias, z_loss_weight=0.1: use balance='bias' and no z-loss"
        assert graph == "cuda_graph_impl=local: clustered layers need 'none'; rows of a rank vary"


def test_four_ranks_train_like_one_process() -> None:
    expected = plain_training(clip=True)
    for (found,) in run_ranks(_trainings, 4, [(2, False)], "", timeout=240):
        assert_trained_alike(found, expected, "4 ranks: ")
