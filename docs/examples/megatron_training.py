"""Clustered experts in Megatron-core: `torchrun --nproc-per-node=2 docs/examples/megatron_training.py` (needs GPUs).

The parts of a Megatron-LM training script: a GPT whose layers get our `ModuleSpec`, Megatron's DDP and its optimizer.
"""

import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig

from moe_dist import MoEConfig
from moe_dist.integrations.megatron import clustered_moe_spec, finalize_model_grads
from moe_dist.model.megatron_backbone import SdpaCoreAttention

on_gpu = torch.cuda.is_available()
if on_gpu:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl" if on_gpu else "gloo")
parallel_state.initialize_model_parallel(expert_model_parallel_size=2, create_gloo_process_groups=False)
device = torch.cuda.current_device()

config = TransformerConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=2,
    use_cpu_initialization=True,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    bias_dropout_fusion=False,
    masked_softmax_fusion=False,
    gradient_accumulation_fusion=False,
    finalize_model_grads_func=finalize_model_grads,  # Megatron's, and then the selection biases
)
spec = get_gpt_layer_local_spec()
spec.submodules.self_attention.submodules.core_attention = SdpaCoreAttention  # works without CUDA too
spec.submodules.mlp = clustered_moe_spec(MoEConfig(experts=16, clusters=4, expert_hidden=64, rank=4))
gpt = GPTModel(config, spec, vocab_size=64, max_sequence_length=16).to(device)
model = DistributedDataParallel(config, DistributedDataParallelConfig(), gpt)
optimizer = get_megatron_optimizer(
    OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=1.0), [model], use_gloo_process_groups=False
)

draw = torch.Generator().manual_seed(dist.get_rank())
causal = torch.ones(8, 8, dtype=torch.bool, device=device).triu(1)[None, None]
losses = []
for _ in range(8):
    start = torch.randint(0, 64, (4, 1), generator=draw)
    tokens = ((start + torch.arange(9)) % 64).to(device)  # each sequence counts upwards
    positions = torch.arange(8, device=device).expand(4, 8)
    model.zero_grad_buffer()
    optimizer.zero_grad()
    loss = model(tokens[:, :-1], positions, causal, labels=tokens[:, 1:]).mean()
    loss.backward()
    config.finalize_model_grads_func([model])
    _, norm, _ = optimizer.step()
    losses.append(loss.item())
if dist.get_rank() == 0:
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, gradient norm {norm:.2f}")
dist.destroy_process_group()
