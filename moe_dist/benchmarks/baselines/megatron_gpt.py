"""Megatron-core's own GPT in training, as a baseline: its layers, schedules, DDP and optimizer.

Only what Megatron-core cannot do without CUDA or Transformer Engine is ours: core attention (torch's, and Ulysses'
all-to-all where sequences are divided), rotary positions and RMSNorm. Adam is torch's fused one in the place of Apex's.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from moe_dist.benchmarks.baselines.megatron_moe import moe_options, stand_ins
from moe_dist.benchmarks.baselines.on_cpu import OnCpu
from moe_dist.config import RunConfig, resolve_batch, resolve_world
from moe_dist.data import PrefetchingLoader, PreparedData
from moe_dist.data.batches import open_batches
from moe_dist.distributed.init import RankInfo
from moe_dist.distributed.mesh import Mesh
from moe_dist.model.initial_values import draw_initial_values
from moe_dist.model.megatron_attention import RotaryOnDevice
from moe_dist.model.megatron_backbone import (
    RmsNorm,
    attention_spec,
    initialize_megatron,
    stage_model,
    transformer_config,
)
from moe_dist.model.megatron_schedule import replace_devices
from moe_dist.model.megatron_tensor_parallel import install_stand_ins, mark_shards
from moe_dist.model.pipeline_stage import StageLayers, positions


class MegatronTraining:
    """Megatron-core's GPT with its MLP (kind dense) or its `MoELayer` (kind standard), in the layout of `world`.

    Expert parallelism goes over all ranks of a stage, as in our mesh. Weights are float32; with `world.zero_stage`
    above 0 the optimizer is Megatron's distributed one.
    """

    def __init__(self, config: RunConfig, process: RankInfo, data: PreparedData) -> None:
        """Create model and optimizer; collective."""
        self.config, self.batch = config, resolve_batch(config, process.ranks)
        self.shape = shape = resolve_world(config, process.ranks)
        self.mesh = Mesh.create(shape, process.timeout)
        self.device = process.device
        batches = open_batches(config, data, self.mesh.in_attention.group, shape.sequence_groups)
        self.loader, self.done = PrefetchingLoader(batches), 0
        initialize_megatron(config.world.timeout_seconds, shape.cluster * shape.shard, shape.tensor, shape.pipeline)
        install_stand_ins()
        replace_devices()
        with stand_ins(), OnCpu():
            gpt = _gpt(config, data.vocab_size, self.mesh).to(process.device)
            zero = config.world.zero_stage > 0
            ddp = DistributedDataParallelConfig(use_distributed_optimizer=zero)
            self.model = DistributedDataParallel(gpt.config, ddp, gpt)
            optimizer = config.optimizer
            self.optimizer = get_megatron_optimizer(
                OptimizerConfig(
                    optimizer="adam",
                    lr=optimizer.learning_rate,
                    weight_decay=optimizer.weight_decay,
                    adam_beta1=optimizer.beta1,
                    adam_beta2=optimizer.beta2,
                    adam_eps=optimizer.epsilon,
                    clip_grad=optimizer.clip_norm or 0.0,
                    use_distributed_optimizer=zero,
                ),
                [self.model],
                use_gloo_process_groups=False,
            )
        for group in self.optimizer.param_groups:
            group["fused"] = True

    def step(self) -> float:
        """Train one step; return the mean loss of this rank's micro-batches, 0 before the last stage."""
        sequences_BS, _ = self.loader.batch(self.done)
        self.done += 1
        micro_batches = sequences_BS.to(self.device).split(self.batch.micro)
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        with stand_ins():
            losses = get_forward_backward_func()(
                forward_step_func=self._forward,
                data_iterator=iter(micro_batches),
                model=self.model,
                num_microbatches=len(micro_batches),
                seq_length=self.config.model.sequence_length // self.shape.context,
                micro_batch_size=self.batch.micro,
                forward_only=False,
            )
            with OnCpu():
                self.optimizer.step()
        mean: float = sum(each["loss"].item() for each in losses) / max(1, len(losses))
        return mean

    def _forward(self, batches: Iterator[Tensor], model: nn.Module) -> tuple[Tensor, Any]:
        part = self.mesh.in_attention.context
        sequence_BS = next(batches)
        tokens_BS, labels_BS = (x.chunk(self.shape.context, 1)[part] for x in (sequence_BS[:, :-1], sequence_BS[:, 1:]))
        output = model(tokens_BS, positions(tokens_BS), None, labels=labels_BS)

        def loss_of(losses_BS: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = losses_BS.mean()
            return loss, {"loss": loss.detach().clone()}  # the schedule divides the loss in place

        return output, loss_of

    def close(self) -> None:
        """End the loader's thread."""
        self.loader.close()


def _gpt(config: RunConfig, vocab_size: int, mesh: Mesh) -> nn.Module:
    """Return this stage's part of the model; outside the feed-forward layers it has the initial values of ours."""
    model, moe, tensor = config.model, config.moe, mesh.shape.tensor
    layers = StageLayers.of(model.layers, mesh)
    standard = moe.kind == "standard"
    options = moe_options(config, mesh.shape.cluster * mesh.shape.shard) if standard else {}
    transformer = replace(
        transformer_config(model, tensor),
        pipeline_model_parallel_size=layers.stages,
        pipeline_dtype=torch.float32,
        batch_p2p_comm=False,
        ffn_hidden_size=moe.expert_hidden if standard else moe.dense_width,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        bias_activation_fusion=False,
        init_method=None,
        output_layer_init_method=None,
        embedding_init_method=None,
        init_method_std=model.init_std,
        finalize_model_grads_func=finalize_model_grads,
        **options,
    )
    spec = attention_spec(model, mesh, range(model.layers))  # it counts the layers of earlier stages too
    spec.submodules.mlp = get_mlp_module_spec(use_te=False, num_experts=moe.experts if standard else None)
    torch.manual_seed(config.seed)
    gpt = stage_model(model, vocab_size, layers, transformer, spec, tied=model.tie_embeddings)
    gpt.rotary_pos_emb = RotaryOnDevice(model, mesh.in_attention.context)
    mark_shards(gpt)
    draw_initial_values(gpt, model, config.seed, tensor, mesh.in_attention.tensor)
    gpt.setup_embeddings_and_output_layer()  # copies a tied embedding to the last stage
    for module in gpt.modules():
        if isinstance(module, RmsNorm):  # each rank of a tensor group sees a part of the tokens
            module.weight.sequence_parallel = tensor > 1  # type: ignore[attr-defined]
    return cast(nn.Module, gpt)
