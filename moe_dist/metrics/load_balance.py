"""Balance of the experts' loads.

Legend: L layers, E experts.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Figures = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LoadStatistics:
    """Balance of one step, each figure a mean over the layers that routed tokens (formulas: docs/metrics.md).

    Attributes:
        variance: Var_e(s_e) of the shares s_e = n_e / sum(n), in share squared; 0 is perfect balance.
        cv2: Var_e(n_e) / mean_e(n_e)^2 = E^2 * variance; dimensionless, comparable across numbers of experts.
        max_over_mean: max_e(n_e) / mean_e(n_e); the slowest expert's work over a fair share, 1 to E.
        entropy: -sum(s_e ln s_e) / ln E; 1 is perfect balance, 0 is all on one expert.
    """

    variance: float
    cv2: float
    max_over_mean: float
    entropy: float


def load_statistics(counts: npt.ArrayLike) -> LoadStatistics:
    """Compute the balance of the copies routed to each expert.

    Args:
        counts: copies per layer and expert, [L, E], or [E] for one layer; summed over ranks, not negative.

    Returns:
        The statistics; all NaN when no layer routed anything.

    Raises:
        ValueError: wrong number of dimensions, no expert, or a negative count.
    """
    counts_LE: Figures = np.atleast_2d(np.asarray(counts, dtype=np.float64))
    if counts_LE.ndim != 2 or counts_LE.shape[1] == 0 or (counts_LE < 0).any():
        raise ValueError(f"counts must be [layers, experts] and not negative, not of shape {counts_LE.shape}")
    counts_LE = counts_LE[counts_LE.sum(axis=1) > 0]
    if not len(counts_LE):
        return LoadStatistics(*[float("nan")] * 4)
    experts = counts_LE.shape[1]
    shares_LE = counts_LE / counts_LE.sum(axis=1, keepdims=True)
    variance = float(shares_LE.var(axis=1).mean())
    return LoadStatistics(
        variance=variance,
        cv2=variance * experts**2,
        max_over_mean=float(shares_LE.max(axis=1).mean()) * experts,
        entropy=float(_normalized_entropy(shares_LE).mean()),
    )


def _normalized_entropy(shares_LE: Figures) -> Figures:
    experts = shares_LE.shape[1]
    if experts == 1:
        return np.ones(len(shares_LE))
    logs_LE = np.log(shares_LE, out=np.zeros_like(shares_LE), where=shares_LE > 0)
    entropy_L: Figures = -(shares_LE * logs_LE).sum(axis=1) / np.log(experts)
    return entropy_L
