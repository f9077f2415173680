"""Standard experts: E full feed-forward networks, each applied to the rows routed to it.

Shapes: P rows sorted by expert, L rows of one expert, E local experts, D model width, F hidden width,
H = 2 F (gate | up).
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_dist.memory.offloaded_cluster import OffloadedCluster

Implementation = Literal["auto", "loop", "grouped_mm"]


def swiglu(pre_PH: Tensor) -> Tensor:
    """Return `silu(gate) * up` [P, F] of [P, gate | up]."""
    gate_PF, up_PF = pre_PH.chunk(2, dim=-1)
    return functional.silu(gate_PF) * up_PF


def experts_loop(x_PD: Tensor, counts: Sequence[int], w_in: Sequence[Tensor], w_out: Sequence[Tensor]) -> Tensor:
    """Apply the experts one after another, each to its `counts[e]` rows; `w_in[e]` [D, 2F], `w_out[e]` [F, D]."""
    rows = torch.split(x_PD, list(counts))
    return torch.cat([swiglu(x_LD @ a) @ b for x_LD, a, b in zip(rows, w_in, w_out, strict=True)])


def experts_grouped(x_PD: Tensor, counts_E: Tensor, w_in_EDH: Tensor, w_out_EFD: Tensor) -> Tensor:
    """Apply all experts by `grouped_mm` over stacked weights; return [P, D]. No host synchronization."""
    ends_E = counts_E.to(x_PD.device).cumsum(0).to(torch.int32)
    h_PF = swiglu(functional.grouped_mm(x_PD, w_in_EDH, offs=ends_E))
    return functional.grouped_mm(h_PF, w_out_EFD, offs=ends_E)


class StandardExperts(nn.Module):
    """Local experts of a standard layer: SwiGLU networks of width F, one leaf parameter per matrix.

    An expert without rows gets zero gradients, so that all ranks reduce the same set of gradients.

    Args:
        experts: number of local experts.
        init: returns the initial (w_in [D, 2F], w_out [F, D]) of a local expert; one generator per expert makes them
            independent of the rank layout.
        implementation: 'auto' is the loop on the CPU, where grouped_mm took 1.1 to 1.2 times as long with weights that
            were already stacked, and grouped_mm on a GPU (not yet measured).
        adopt: offloads an expert's parameters as soon as they are created; None: experts stay on the device.
    """

    def __init__(
        self,
        experts: int,
        init: Callable[[int], tuple[Tensor, Tensor]],
        implementation: Implementation = "auto",
        adopt: Callable[[int, dict[str, nn.Parameter]], OffloadedCluster] | None = None,
    ) -> None:
        super().__init__()
        self.w_in, self.w_out = nn.ParameterList(), nn.ParameterList()
        self._offloaded: list[OffloadedCluster] = []
        self.implementation = implementation
        for e in range(experts):
            w_in, w_out = (nn.Parameter(w) for w in init(e))
            self.w_in.append(w_in)
            self.w_out.append(w_out)
            if adopt is not None:
                self._offloaded.append(adopt(e, {"w_in": w_in, "w_out": w_out}))

    def forward(self, x_PD: Tensor, counts: Sequence[int] | Tensor) -> Tensor:
        """Apply to each row its expert; return [P, D].

        Args:
            x_PD: rows sorted by local expert.
            counts: number of rows of each local expert.
        """
        if self._offloaded:
            rows = torch.split(x_PD, counts.tolist() if isinstance(counts, Tensor) else list(counts))
            return torch.cat([self._run_offloaded(e, x_LD) for e, x_LD in enumerate(rows)])
        grouped = self.implementation == "grouped_mm" or (self.implementation == "auto" and x_PD.device.type != "cpu")
        if grouped:
            counts_E = torch.as_tensor(counts, device=x_PD.device)
            return experts_grouped(x_PD, counts_E, torch.stack(list(self.w_in)), torch.stack(list(self.w_out)))
        counts_list = counts.tolist() if isinstance(counts, Tensor) else counts
        return experts_loop(x_PD, counts_list, list(self.w_in), list(self.w_out))

    def _run_offloaded(self, e: int, x_LD: Tensor) -> Tensor:
        """Apply one offloaded expert to its rows, which is loaded unless there are none."""
        if not len(x_LD):
            self._offloaded[e].skip()
            return x_LD
        return self._offloaded[e].run(lambda x_LD: swiglu(x_LD @ self.w_in[e]) @ self.w_out[e], len(x_LD), x_LD)
