"""Clustered experts in a DeepSpeed script.

Run it with `deepspeed --num_accelerators 2 docs/examples/deepspeed_training.py`, or with
`torchrun --nproc-per-node=2 docs/examples/deepspeed_training.py`.

On a CPU DeepSpeed first compiles an all-reduce of its own, which takes a minute.
"""

import deepspeed
import torch
from torch import Tensor, nn

from moe_dist.integrations.deepspeed import DeepSpeedClusteredMoE, attach


class Block(nn.Module):
    """A residual layer of experts; deepspeed.moe.layer.MoE has the same words up to `k`."""

    def __init__(self, width: int, ep_size: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.experts = DeepSpeedClusteredMoE(width, 16, ep_size, k=2, clusters=4, expert_hidden=64, rank=4)

    def forward(self, h: Tensor) -> Tensor:  # [sequence, batch, width]
        output, _, _ = self.experts(self.norm(h))
        return h + output


deepspeed.init_distributed("gloo" if not torch.cuda.is_available() else "nccl")
model = nn.Sequential(nn.Embedding(64, 32), Block(32, ep_size=2), Block(32, ep_size=2), nn.Linear(32, 64))
config = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
    "gradient_clipping": 1.0,
}
engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
attach(engine)  # exact gradient norm; selection biases follow the loads after each step

draw = torch.Generator().manual_seed(torch.distributed.get_rank())
losses = []
for _ in range(8):
    start = torch.randint(0, 64, (1, 4), generator=draw)
    tokens = (start + torch.arange(9)[:, None]) % 64  # each sequence counts upwards
    logits = engine(tokens[:-1].to(engine.device))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:].flatten().to(engine.device))
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
if torch.distributed.get_rank() == 0:
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
