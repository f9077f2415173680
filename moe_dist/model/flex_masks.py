"""Attention by torch's FlexAttention, which skips keys that documents and windows hide (`model.attention`).

A mask in memory, as `document_mask.py` makes it, has S x S elements for each sequence; a block mask has one for each
pair of blocks of 128 tokens. FlexAttention has a backward pass on GPUs only, where it is compiled.

Shapes: B sequences, H heads, S tokens, W width of a head.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


class FlexMasks:
    """Block masks of the sequences of one pass, each made when a layer first needs it."""

    def __init__(self, document_BS: Tensor | None, tokens: int, device: torch.device) -> None:
        """Create the masks.

        Args:
            document_BS: number of each token's document; None: a token attends to all earlier ones.
            tokens: S.
        """
        self._document_BS, self._tokens, self._device = document_BS, tokens, device
        self._made: dict[int | None, BlockMask] = {}

    def within(self, window: int | None) -> BlockMask:
        """Return which keys a query attends to: itself and earlier ones of its document, within a sliding window."""
        if window not in self._made:
            self._made[window] = self._make(window)
        return self._made[window]

    def _make(self, window: int | None) -> BlockMask:
        document_BS = self._document_BS

        def attends(sequence: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = query >= key
            if window is not None:
                seen = seen & (query - key < window)
            if document_BS is not None:
                seen = seen & (document_BS[sequence, query] == document_BS[sequence, key])
            return seen

        sequences = None if document_BS is None else len(document_BS)
        make = _compiled(create_block_mask) if self._device.type == "cuda" else create_block_mask
        mask: BlockMask = make(attends, sequences, None, self._tokens, self._tokens, device=self._device)
        return mask


def attend(q_BHSW: Tensor, k_BHSW: Tensor, v_BHSW: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    """Return the output of attention, [B, H, S, W]; keys and values may have fewer heads than queries."""
    grouped = q_BHSW.shape[1] != k_BHSW.shape[1]
    kernel: Any = _compiled(flex_attention) if q_BHSW.is_cuda else flex_attention
    output: Tensor = kernel(q_BHSW, k_BHSW, v_BHSW, block_mask=mask, scale=scale, enable_gqa=grouped)
    return output


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
