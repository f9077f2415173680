"""Clustered experts in a plain torch loop with FSDP2: `torchrun --nproc-per-node=2 docs/examples/fsdp_training.py`."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moe_dist import ClusteredMoE, MoEConfig, clip_grad_norm_, update_load_balance
from moe_dist.integrations.fsdp import shard_experts


class Block(nn.Module):
    """A residual layer of experts."""

    def __init__(self, width: int, mesh: dist.DeviceMesh) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.experts = ClusteredMoE(width, MoEConfig(experts=16, clusters=4, expert_hidden=64, rank=4), mesh=mesh)

    def forward(self, h: Tensor) -> Tensor:  # [sequence, batch, width]
        return h + self.experts(self.norm(h))


dist.init_process_group("gloo" if not torch.cuda.is_available() else "nccl")
mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "ep"))  # two ranks hold all
blocks = [Block(32, mesh), Block(32, mesh)]
model = nn.Sequential(nn.Embedding(64, 32), *blocks, nn.Linear(32, 64))
shard_experts(model)  # each cluster over its own replicas ...
for block in blocks:
    fully_shard(block)  # ... and everything else over all ranks
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

draw = torch.Generator().manual_seed(dist.get_rank())
losses = []
for _ in range(8):
    start = torch.randint(0, 64, (1, 4), generator=draw)
    tokens = (start + torch.arange(9)[:, None]) % 64  # each sequence counts upwards
    logits = model(tokens[:-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:].flatten())
    loss.backward()
    clip_grad_norm_(model, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    update_load_balance(model)  # selection biases follow the loads
    losses.append(loss.item())
if dist.get_rank() == 0:
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
dist.destroy_process_group()
