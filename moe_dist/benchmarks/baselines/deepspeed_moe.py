"""DeepSpeed's own MoE layer as a baseline of benchmarks; no model is trained with it."""

from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn

from moe_dist.config import RunConfig
from moe_dist.engine.deepspeed_init import init_deepspeed
from moe_dist.moe.dense_feed_forward import SwiGLU


class DeepSpeedMoE(nn.Module):
    """`deepspeed.moe.layer.MoE` over all ranks with the experts of our standard layer; [T, D] -> [T, D]."""

    def __init__(self, config: RunConfig, ranks: int, capacity_factor: float | None = None) -> None:
        """Create the layer; collective, since DeepSpeed forms its process groups here.

        Args:
            capacity_factor: capacity of an expert as a multiple of a uniform share; None: no dropping.
        """
        super().__init__()
        init_deepspeed()
        moe = config.moe
        expert = SwiGLU(0, moe.expert_hidden, config.model, config.seed)
        self.layer: Any = MoE(
            config.model.hidden_size,
            expert,
            moe.experts,
            ep_size=ranks,
            k=moe.top_k,
            capacity_factor=capacity_factor or 1.0,
            drop_tokens=capacity_factor is not None,
            use_rts=False,
        )
        groups._EXPERT_PARALLEL_GROUP.pop(self.layer.expert_group_name, None)  # of a model of ours before it
        groups._EXPERT_DATA_PARALLEL_GROUP.pop(self.layer.expert_group_name, None)
        with redirect_stdout(StringIO()):  # it prints a line for each group
            self.layer.set_deepspeed_parallelism()

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return the layer's output, with the auxiliary loss added to every element so that both get a gradient."""
        y_TD, loss, _ = self.layer(x_TD)
        total: Tensor = y_TD + loss.to(y_TD.dtype)
        return total
