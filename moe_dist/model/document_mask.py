"""Masks of attention: inside documents only, for sequences that hold several, and inside a sliding window.

Positions need no restart: rotary attention depends on differences of positions, and these are the same.

Shapes: B sequences, S tokens.
"""

import torch
from torch import Tensor

INSIDE = 1 << 30
"""Bit of an end-of-document token that ends a part of a document, such as a message of a chat, and not the document."""


def document_mask(tokens_BS: Tensor, end_of_document: int) -> Tensor:
    """Return which token (row) attends to which (column), bool [B, 1, S, S]: itself and earlier ones of its document.

    Args:
        end_of_document: the token that ends each document and belongs to it.
    """
    document_BS = document_numbers(tokens_BS, end_of_document)
    return (document_BS[:, :, None] == document_BS[:, None, :]).tril()[:, None]


def document_numbers(tokens_BS: Tensor, end_of_document: int) -> Tensor:
    """Return the number of each token's document in its sequence, from 0, int64 [B, S]; an end belongs to its own."""
    ends_BS = (tokens_BS == end_of_document).long()
    return ends_BS.cumsum(1) - ends_BS


def window_mask(tokens: int, window: int, device: torch.device) -> Tensor:
    """Return which token (row) attends to which (column), bool [S, S]: the last `window` ones, itself included."""
    within_SS = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    return within_SS.tril().triu(1 - window)
