"""Clustered experts that are not being trained: held, and computed with, in the form in which they are stored.

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
    """What a run's clusters are stored as where they are stored in few bits."""
    precision = config.precision
    factors = GroupFormat(
        precision.bits, precision.group_size, precision.symmetric, getattr(torch, precision.scale_dtype)
    )
    return StorageFormat(factors, getattr(torch, precision.bases or config.train.precision))


def stored_sizes(config: RunConfig, experts: int) -> QuantizedCluster:
    """What a part of a cluster with so many experts is stored as, on `meta`."""
    sizes = (experts, config.model.hidden_size, config.moe.expert_hidden, config.moe.rank)
    vectors, dtype = config.moe.expert_vectors, getattr(torch, config.train.precision)
    return QuantizedCluster.of(
        ClusterWeights.without_values(*sizes, vectors=vectors, dtype=dtype), storage_format(config)
    )


class QuantizedClusterExperts(nn.Module):
    """The part of one cluster that this rank holds: its base, and one row of bytes for each expert.

    They are buffers, or a block of a memory's tiers, which then brings them to the device for each pass. Factors are
    unpacked for each pass, some in a kernel, and not kept. No parameters: nothing here can be trained.
    """

    base_in_DH: Tensor
    base_out_FD: Tensor
    expert_NB: Tensor

    def __init__(self, packed: QuantizedCluster, dtype: torch.dtype, backend: str = "auto") -> None:
        """Args: dtype: what is computed in; form: as `moe.backend`."""
        super().__init__()
        self.register_buffer("base_in_DH", packed.base_in_DH)
        self.register_buffer("base_out_FD", packed.base_out_FD)
        self.register_buffer("expert_NB", packed.experts.to_bytes())
        self.dtype, self.backend = dtype, backend
        self._like = packed.experts.without_values()
        self._kept: QuantizedBlock | None = None

    def keep_in(self, memory: QuantizedClusterMemory, layer: int, local: int) -> None:
        """Hands the bytes over to a memory.

        Raises:
            ConfigError, OffloadError: it cannot take them.
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
        """The value that this holds, for the length of a `with`. `rows`: that will be computed."""
        with nullcontext() if self._kept is None else self._kept.pinned(rows) as flat:
            parts = dict(self.named_buffers())
            if flat is not None:
                views = self._layout.views(flat)
                parts = {name: views[name].view(part.dtype).view(part.shape) for name, part in parts.items()}
            own = self._like.with_bytes(parts["expert_NB"])
            yield QuantizedCluster(parts["base_in_DH"], parts["base_out_FD"], own)

    def weights(self) -> ClusterWeights:
        """A copy of the tensors in the form that the computation takes."""
        with self.packed() as packed:
            weights = packed.weights(self.dtype)
            return replace(weights, base_in_DH=weights.base_in_DH.clone(), base_out_FD=weights.base_out_FD.clone())

    def forward(self, x_AD: Tensor, slot_AK: Tensor, gate_AK: Tensor) -> Tensor:
        """As `ClusteredExperts.forward`, from the stored form; without gradients where clusters are kept in tiers."""
        if self._kept is not None:
            if torch.is_grad_enabled() and x_AD.requires_grad:
                raise RuntimeError("a backward pass would read weights of a cluster that is no longer on the device")
            if not len(x_AD):
                self._kept.skip()
                return x_AD
        with self.packed(len(x_AD)) as packed:
            return packed_experts(x_AD, slot_AK, gate_AK, packed, self.backend)
