"""The baseline's experts: E full feed-forward networks, each on the rows sent to it.

Shapes: P rows sorted by expert, L rows of one expert, E local experts, D model width, F hidden width,
H = 2 F (gate | up).
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Implementation = Literal["auto", "loop", "grouped_mm"]


def swiglu(pre_PH: Tensor) -> Tensor:
    """`silu(gate) * up` of [P, gate | up] -> [P, F]."""
    gate_PF, up_PF = pre_PH.chunk(2, dim=-1)
    return functional.silu(gate_PF) * up_PF


def experts_loop(x_PD: Tensor, counts: Sequence[int], w_in: Sequence[Tensor], w_out: Sequence[Tensor]) -> Tensor:
    """One expert after the other on its `counts[e]` rows -> [P, D]; `w_in[e]` [D, 2F], `w_out[e]` [F, D]."""
    rows = torch.split(x_PD, list(counts))
    return torch.cat([swiglu(x_LD @ a) @ b for x_LD, a, b in zip(rows, w_in, w_out, strict=True)])


def experts_grouped(x_PD: Tensor, counts_E: Tensor, w_in_EDH: Tensor, w_out_EFD: Tensor) -> Tensor:
    """All experts at once by `grouped_mm` over stacked weights -> [P, D], without a synchronisation with the host."""
    ends_E = counts_E.to(x_PD.device).cumsum(0).to(torch.int32)
    h_PF = swiglu(functional.grouped_mm(x_PD, w_in_EDH, offs=ends_E))
    return functional.grouped_mm(h_PF, w_out_EFD, offs=ends_E)


class StandardExperts(nn.Module):
    """The local experts of a standard layer: SwiGLU networks of width F, one leaf parameter for each matrix.

    `init(e)` gives local expert e's (w_in [D, 2F], w_out [F, D]); drawing each from a generator of its own keeps the
    values independent of the rank layout. An expert without rows gets zero gradients, so that every rank reduces the
    same set. 'auto' is what measured faster: on the CPU the loop (grouped_mm took 1.1 to 1.2 times as long, over
    weights that were stacked already), on a GPU grouped_mm (not yet run on one).
    """

    def __init__(
        self, experts: int, init: Callable[[int], tuple[Tensor, Tensor]], implementation: Implementation = "auto"
    ) -> None:
        super().__init__()
        pairs = [init(e) for e in range(experts)]
        self.w_in = nn.ParameterList([nn.Parameter(w_in) for w_in, _ in pairs])
        self.w_out = nn.ParameterList([nn.Parameter(w_out) for _, w_out in pairs])
        self.implementation = implementation

    def forward(self, x_PD: Tensor, counts: Sequence[int] | Tensor) -> Tensor:
        """Rows sorted by local expert, `counts[e]` of them each P in all -> each row through its expert [P, D]."""
        grouped = self.implementation == "grouped_mm" or (self.implementation == "auto" and x_PD.device.type != "cpu")
        if grouped:
            counts_E = torch.as_tensor(counts, device=x_PD.device)
            return experts_grouped(x_PD, counts_E, torch.stack(list(self.w_in)), torch.stack(list(self.w_out)))
        counts_list = counts.tolist() if isinstance(counts, Tensor) else counts
        return experts_loop(x_PD, counts_list, list(self.w_in), list(self.w_out))
