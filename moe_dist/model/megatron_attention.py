"""Core attention and rotary positions for Megatron-core's layers, on any device and over parts of sequences.

Context parallelism is Ulysses' (DeepSpeed-Ulysses, arXiv 2309.14509): each rank has a run of tokens with all heads;
around core attention an all-to-all exchanges them for all tokens with a part of the heads.

Shapes: S tokens of this rank, B sequences, C ranks of the context group, H heads, W width of a head.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_find_correction_range,
    _yarn_linear_ramp_mask,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from moe_dist.config import ModelConfig
from moe_dist.config.sections.model import RopeScaling
from moe_dist.distributed.mesh import RankGroup
from moe_dist.model.document_mask import window_mask
from moe_dist.model.flex_masks import FlexMasks, attend


class SdpaCoreAttention(nn.Module):
    """Causal attention with torch's scaled_dot_product_attention; layout [S, B, H, W] of Megatron-core.

    A mask, bool [B, 1, CS, CS], is true where a token attends, as torch's is and Megatron-core's is not. With
    `FlexMasks` in its place attention is computed by FlexAttention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        context: RankGroup | None = None,
        windows: Sequence[int | None] = (),
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        """Create the module.

        Args:
            layer_number: number of the layer in Megatron-core's count, from 1.
            context: ranks that hold the other tokens of the sequences; None: this rank has them all.
            windows: sliding window of each of these layers, or None; empty: no layer has one.
            softmax_scale: factor of the logits; None: 1 / sqrt(width of a head).
        """
        super().__init__()
        self._scale = softmax_scale
        self._window = windows[layer_number - 1] if windows else None
        self._context = context if context is not None and context.size > 1 else None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask_B1SS: Tensor | FlexMasks | None = None, *_: Any, **__: Any
    ) -> Tensor:
        """Return [S, B, H * W]; `key` and `value` have one head for each query group."""
        if self._context is not None:
            query, key, value = (_all_tokens(x, self._context) for x in (query, *self._divisible(query, key, value)))
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if isinstance(mask_B1SS, FlexMasks):
            out = attend(q, k, v, mask_B1SS.within(self._window), self._scale)
        else:
            mask_B1SS = self._in_window(mask_B1SS, query)
            grouped = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(
                q, k, v, mask_B1SS, is_causal=mask_B1SS is None, scale=self._scale, enable_gqa=grouped
            )
        out_SBHW = out.permute(2, 0, 1, 3)
        if self._context is not None:
            out_SBHW = _all_heads(out_SBHW, self._context)
        return out_SBHW.flatten(2)

    def _in_window(self, mask_B1SS: Tensor | None, query: Tensor) -> Tensor | None:
        """Return a mask within the sliding window, of which a shorter sequence needs none."""
        tokens = query.shape[0]
        if self._window is None or tokens <= self._window:
            return mask_B1SS
        within_SS = window_mask(tokens, self._window, query.device)
        return within_SS[None, None] if mask_B1SS is None else mask_B1SS & within_SS

    def _divisible(self, query: Tensor, *grouped: Tensor) -> list[Tensor]:
        """Repeat the heads of keys and values where there are too few to be divided over the context group."""
        assert self._context is not None
        heads = grouped[0].shape[2]
        if heads % self._context.size == 0:
            return list(grouped)
        return [x.repeat_interleave(query.shape[2] // heads, dim=2) for x in grouped]


def _all_tokens(x_SBHW: Tensor, group: RankGroup) -> Tensor:
    """Exchange this rank's tokens with all heads for all tokens with its part of the heads, [CS, B, H/C, W]."""
    return _exchange(x_SBHW.unflatten(2, (group.size, -1)).movedim(2, 0), group).flatten(0, 1)


def _all_heads(x_SBHW: Tensor, group: RankGroup) -> Tensor:
    """Undo `_all_tokens`."""
    return _exchange(x_SBHW.unflatten(0, (group.size, -1)), group).movedim(0, 2).flatten(2, 3)


def _exchange(x_C: Tensor, group: RankGroup) -> Tensor:
    """Send entry c of the first dimension to rank c of the group, and return what the ranks have sent, in order."""
    received: Tensor = _HeadExchange.apply(x_C, group)  # type: ignore[no-untyped-call]
    return received


class _HeadExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_C: Tensor, group: RankGroup) -> Tensor:
        ctx.group = group
        received_C = torch.empty_like(x_C, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received_C, x_C.contiguous(), group=group.handle)
        return received_C

    @staticmethod
    def backward(ctx: Any, grad_C: Tensor) -> tuple[Tensor, None]:
        return _exchange(grad_C, ctx.group), None


class RotaryOnDevice(RotaryEmbedding):  # type: ignore[misc]
    """Rotary embedding on any device; its frequencies are always float32 and move with the model.

    Megatron-core's class creates them on the current CUDA device and fails for a model on the CPU.
    """

    inv_freq: Tensor

    def __init__(self, model: ModelConfig, part: int = 0) -> None:
        """Create the module for part number `part` of each sequence."""
        super().__init__(model.rotary_width, 1.0, rotary_base=model.rope_base, use_cpu_initialization=True)
        self._part, scaling = part, model.rope_scaling
        if scaling is not None and scaling.kind == "linear":
            self.inv_freq = self.inv_freq / scaling.factor
        elif scaling is not None and scaling.kind == "yarn":
            self.inv_freq = _yarn_frequencies(self.inv_freq, model.rope_base, scaling)
        elif scaling is not None:
            factors = (scaling.factor, scaling.low_frequency_factor, scaling.high_frequency_factor)
            self.inv_freq = self._apply_scaling(self.inv_freq, *factors, scaling.original_length)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        self.inv_freq = self.inv_freq.to(fn(torch.empty(0, device=self.inv_freq.device)).device)
        return super()._apply(fn, *args, **kwargs)

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Return the angles of `max_seq_len` positions, those of this rank's part of a sequence."""
        freqs = self.get_freqs_non_repeated(max_seq_len, offset + self._part * max_seq_len)
        return torch.cat((freqs, freqs), dim=-1)[:, None, None, :]


def _yarn_frequencies(inv_freq: Tensor, base: int, scaling: RopeScaling) -> Tensor:
    """Return frequencies of which the low ones are divided by the factor (YaRN, arXiv 2309.00071)."""
    pairs = len(inv_freq)
    rotations = (scaling.fast_rotations, scaling.slow_rotations)
    low, high = _yarn_find_correction_range(*rotations, 2 * pairs, base, scaling.original_length)
    kept = 1 - _yarn_linear_ramp_mask(low, high, pairs, inv_freq.device)
    blended: Tensor = inv_freq / scaling.factor * (1 - kept) + inv_freq * kept
    return blended
