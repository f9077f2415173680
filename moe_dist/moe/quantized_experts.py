"""Clustered experts for inference, kept and computed in quantized form.

Shapes: A rows at a shard, D hidden, F expert hidden, H = 2 F, N experts of a cluster on this shard, K chosen experts,
B bytes of an expert.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from moe_dist.compression import ClusterWeights, GroupFormat, QuantizedCluster, StorageFormat
from moe_dist.config import RunConfig
from moe_dist.kernels import packed_experts
from moe_dist.memory.block import BlockLayout
from moe_dist.memory.quantized_clusters import QuantizedBlock, QuantizedClusterMemory


def storage_format(config: RunConfig) -> StorageFormat:
    """Return the format in which a run stores quantized clusters."""
    precision = config.precision
    factors = GroupFormat(
        precision.bits, precision.group_size, precision.symmetric, getattr(torch, precision.scale_dtype)
    )
    return StorageFormat(factors, getattr(torch, precision.bases or config.train.precision))


def stored_sizes(config: RunConfig, experts: int) -> QuantizedCluster:
    """Return a quantized cluster part with this number of experts on the `meta` device, for its sizes."""
    sizes = (experts, config.model.hidden_size, config.moe.expert_hidden, config.moe.rank)
    vectors, dtype = config.moe.expert_vectors, getattr(torch, config.train.precision)
    return QuantizedCluster.of(
        ClusterWeights.without_values(*sizes, vectors=vectors, dtype=dtype), storage_format(config)
    )


class QuantizedClusterExperts(nn.Module):
    """Base of one cluster, and its experts on this rank as one row of bytes each.

    The bytes are buffers, or a block in memory tiers that is brought to the device for each pass. Low-rank factors are
    unpacked for each pass, some of them inside a kernel. There are no parameters: nothing here is trained.
    """

    base_in_DH: Tensor
    base_out_FD: Tensor
    expert_NB: Tensor

    def __init__(self, packed: QuantizedCluster, dtype: torch.dtype, backend: str = "auto") -> None:
        """Store quantized weights as buffers.

        Args:
            packed: quantized weights.
            dtype: dtype of the computation.
            backend: as `moe.backend`.
        """
        super().__init__()
        self.register_buffer("base_in_DH", packed.base_in_DH)
        self.register_buffer("base_out_FD", packed.base_out_FD)
        self.register_buffer("expert_NB", packed.experts.to_bytes())
        self.dtype, self.backend = dtype, backend
        self._like = packed.experts.without_values()
        self._kept: QuantizedBlock | None = None

    def keep_in(self, memory: QuantizedClusterMemory, layer: int, local: int) -> None:
        """Move the bytes from the buffers to memory tiers.

        Raises:
            ConfigError, OffloadError: the memory has no room for them.
        """
        parts = dict(self.named_buffers())
        self._layout = BlockLayout.of({name: torch.Size([part.nbytes]) for name, part in parts.items()})
        flat = torch.zeros(self._layout.elements, dtype=torch.uint8, device=self.base_in_DH.device)
        for name, view in self._layout.views(flat).items():
            view.copy_(parts[name].contiguous().view(-1).view(torch.uint8))
            setattr(self, name, parts[name].to("meta"))
        self._kept = memory.adopt(layer, local, flat)

    @contextmanager
    def packed(self, rows: int = 0) -> Iterator[QuantizedCluster]:
        """Enter a context with the quantized weights on the device.

        Args:
            rows: number of rows that will be computed.
        """
        with nullcontext() if self._kept is None else self._kept.pinned(rows) as flat:
            parts = dict(self.named_buffers())
            if flat is not None:
                views = self._layout.views(flat)
                parts = {name: views[name].view(part.dtype).view(part.shape) for name, part in parts.items()}
            own = self._like.with_bytes(parts["expert_NB"])
            yield QuantizedCluster(parts["base_in_DH"], parts["base_out_FD"], own)

    def weights(self) -> ClusterWeights:
        """Return a dequantized copy of the weights in the dtype of the computation."""
        with self.packed() as packed:
            weights = packed.weights(self.dtype)
            return replace(weights, base_in_DH=weights.base_in_DH.clone(), base_out_FD=weights.base_out_FD.clone())

    def forward(self, x_AD: Tensor, slot_AK: Tensor, gate_AK: Tensor) -> Tensor:
        """Return the gated sum [A, D] over the chosen experts of this shard; slots of other shards are -1.

        Raises:
            RuntimeError: a gradient is needed, but the cluster is kept in memory tiers.
        """
        if self._kept is not None:
            if torch.is_grad_enabled() and x_AD.requires_grad:
                raise RuntimeError("a backward pass would read weights of a cluster that is no longer on the device")
            if not len(x_AD):
                self._kept.skip()
                return x_AD
        with self.packed(len(x_AD)) as packed:
            return packed_experts(x_AD, slot_AK, gate_AK, packed, self.backend)
