"""Whitening of a projection's inputs: a root S of their second moments, `S^T S = E[x x^T]`, so `E |x D|^2 = |S D|^2`.

The tokens themselves are such a root; neither moments nor their root need be computed.

Shapes: T tokens, I inputs of a projection, O its outputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

Root = Tensor | None
"""Root of second moments: [any number of rows, I]; or [I], a diagonal; or None, the identity."""


@dataclass(frozen=True)
class WhiteningRoots:
    """Roots of the inputs of an expert's projections, over the tokens routed to it; any scale."""

    x: Root
    hidden: Root

    @classmethod
    def of_moments(cls, x: Tensor, hidden: Tensor) -> "WhiteningRoots":
        """Compute the roots from second moments [I, I], or their diagonals [I]."""
        return cls(_root_of_moment(x), _root_of_moment(hidden))

    @classmethod
    def of_tokens(cls, x_TD: Tensor, hidden_TF: Tensor) -> "WhiteningRoots":
        """Compute the roots from the tokens and their hidden units."""
        return cls(_root_of_tokens(x_TD), _root_of_tokens(hidden_TF))

    def projections(self) -> tuple[Root, Root, Root]:
        """Return the roots for gate, up and output projection."""
        return self.x, self.x, self.hidden


def apply_root(root: Root, w_IO: Tensor) -> Tensor:
    """Return `S W`."""
    if root is None:
        return w_IO
    return root[:, None] * w_IO if root.ndim == 1 else root @ w_IO


def _root_of_moment(moment: Tensor) -> Tensor:
    """Compute the root of a moment matrix; rounding below zero is clipped."""
    if moment.ndim == 1:
        return moment.clamp(min=0).sqrt()
    value_I, vector_II = torch.linalg.eigh(moment)
    root_II: Tensor = value_I.clamp(min=0).sqrt()[:, None] * vector_II.T
    return root_II


def _root_of_tokens(x_TI: Tensor) -> Tensor:
    """Return the R factor of the tokens' QR decomposition, or the tokens if they are fewer than their width."""
    if len(x_TI) <= x_TI.shape[1]:
        return x_TI
    root_II: Tensor = torch.linalg.qr(x_TI, mode="r").R
    return root_II
