"""Clustered experts that are not being trained: held, and computed with, in the form in which they are stored.

Shapes: A rows at a shard, D hidden, F expert hidden, H = 2 F, N experts of a cluster on this shard, K chosen experts,
B bytes of an expert.
"""

import torch
from torch import Tensor, nn

from moe_dist.compression import ClusterWeights, GroupFormat, PackedCluster, StoredForm, stored_experts
from moe_dist.config import RunConfig


def stored_form(config: RunConfig) -> StoredForm:
    """What a run's clusters are stored as where they are stored in few bits."""
    precision = config.precision
    factors = GroupFormat(
        precision.bits, precision.group_size, precision.symmetric, getattr(torch, precision.scale_dtype)
    )
    return StoredForm(factors, getattr(torch, precision.bases or config.train.precision))


class StoredExperts(nn.Module):
    """The part of one cluster that this rank holds: its base, and one row of bytes for each expert.

    Factors are unpacked for each pass, some in a kernel, and not kept. No parameters: nothing here can be trained.
    """

    base_in_DH: Tensor
    base_out_FD: Tensor
    expert_NB: Tensor

    def __init__(self, packed: PackedCluster, dtype: torch.dtype, form: str = "auto") -> None:
        """Args: dtype: what is computed in; form: as `moe.form`."""
        super().__init__()
        self.register_buffer("base_in_DH", packed.base_in_DH)
        self.register_buffer("base_out_FD", packed.base_out_FD)
        self.register_buffer("expert_NB", packed.experts.to_bytes())
        self.dtype, self.form = dtype, form
        self._like = packed.experts

    def packed(self) -> PackedCluster:
        """The value that this holds."""
        return PackedCluster(self.base_in_DH, self.base_out_FD, self._like.with_bytes(self.expert_NB))

    def weights(self) -> ClusterWeights:
        """The tensors in the form that the computation takes."""
        return self.packed().weights(self.dtype)

    def forward(self, x_AD: Tensor, slot_AK: Tensor, gate_AK: Tensor) -> Tensor:
        return stored_experts(x_AD, slot_AK, gate_AK, self.packed(), self.form)
