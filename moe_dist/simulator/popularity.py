"""Popularity of experts: an assumed skew, or the loads of a recorded run.

Shapes: L distinct layers, E experts, S sampled tokens, K choices.
"""

import json
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_dist.errors import ConfigError

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
SAMPLE = 4096
MOST_EXPERTS = 2**20
"""Largest number of experts of a trace; a larger choice is damage."""
DAMAGED = (
    OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, OverflowError, MemoryError, RuntimeError,
    SyntaxError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""Errors of numpy's and zipfile's readers on a damaged archive."""


def zipf(experts: int, skew: float, layers: int, generator: np.random.Generator) -> Floats:
    """Return popularity_LE: the i-th most popular expert, drawn, has a share proportional to 1 / i^skew."""
    share_E = np.arange(1, experts + 1) ** -float(skew)
    return np.stack([generator.permutation(share_E / share_E.sum()) for _ in range(layers)])


def recorded(run: Path, experts: int) -> Floats:
    """Return popularity_LE of a run folder: from `load.jsonl`, or from `routing.npz` of a traffic measurement.

    Raises:
        ConfigError: the folder has neither, or another number of experts.
    """
    counts_LE = _from_loads(run / "load.jsonl") if (run / "load.jsonl").exists() else _from_routing(run, experts)
    if counts_LE is None:
        raise ConfigError(
            f"--trace {run}: has no whole load.jsonl, nor routing.npz: give a run's or measurement's folder"
        )
    if counts_LE.shape[1] != experts:
        raise ConfigError(f"--trace {run}: is of {counts_LE.shape[1]} experts, the configuration has {experts}")
    counts_LE = counts_LE + 1e-9 * counts_LE.sum()  # an expert that was never chosen can be
    popularity_LE: Floats = counts_LE / counts_LE.sum(axis=1, keepdims=True)
    return popularity_LE


def _from_loads(file: Path) -> Floats | None:
    """Return the copies over the last half of the lines."""
    lines = []
    for row in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(np.array(json.loads(row)["experts"], dtype=np.float64))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue  # half-written
    whole = [counts for counts in lines if counts.ndim == 2 and counts.shape == lines[0].shape]
    return np.sum(whole[len(whole) // 2 :], axis=0) if whole else None


def _from_routing(run: Path, experts: int) -> Floats | None:
    """Return choices of experts (flat), or of clusters, whose consecutive experts get equal shares."""
    try:
        with np.load(run / "routing.npz", allow_pickle=False) as arrays:
            flat = [name for name in arrays.files if name.endswith(".flat")]
            one = [name for name in arrays.files if name.endswith(".one")]
            if flat:
                return np.stack([_frequencies(arrays[name], experts) for name in sorted(flat)])
            clusters = 1 + max((int(arrays[name].max()) for name in one), default=0)
            if not one or clusters < 1 or experts % clusters:
                return None
            slots = experts // clusters
            return np.stack([np.repeat(_frequencies(arrays[name], clusters), slots) for name in sorted(one)])
    except DAMAGED:
        return None


def _frequencies(choices: Integers, bins: int) -> Floats:
    if choices.dtype.kind not in "iu" or choices.max(initial=0) >= MOST_EXPERTS:
        raise ValueError("choices must be whole numbers")
    kept = choices[choices >= 0].astype(np.int64)
    return np.bincount(kept, minlength=bins).astype(np.float64)


def sample(popularity_E: Floats, top_k: int, generator: np.random.Generator, tokens: int = SAMPLE) -> Integers:
    """Return choice_SK: K different experts of each token, drawn by their shares without replacement (Gumbel top-k)."""
    return top_choices(scores(popularity_E, generator, tokens), top_k)


def scores(popularity_E: Floats, generator: np.random.Generator, tokens: int = SAMPLE) -> Floats:
    """Return score_SE, whose K best per token are a draw of K different experts by their shares."""
    return np.log(popularity_E) + generator.gumbel(size=(tokens, len(popularity_E)))


def top_choices(score_SE: Floats, top_k: int) -> Integers:
    """Return the indices of the K largest of each row, in no order."""
    return np.argpartition(score_SE, -top_k, axis=1)[:, -top_k:]


def balanced_clusters(popularity_E: Floats, clusters: int) -> Integers:
    """Return cluster_E: equally large clusters of nearly equal popularity, as re-clustering for load would form them.

    Experts, sorted by popularity, are dealt to the clusters back and forth.
    """
    order_E = np.argsort(-popularity_E)
    there = np.arange(clusters)
    snake = np.concatenate([there if i % 2 == 0 else there[::-1] for i in range(len(order_E) // clusters)])
    cluster_E = np.empty(len(order_E), dtype=np.int64)
    cluster_E[order_E] = snake
    return cluster_E


def shares(hit_SB: npt.NDArray[np.bool_]) -> Floats:
    """Return the share of sampled tokens that use each bin."""
    share_B: Floats = hit_SB.mean(axis=0)
    return share_B


def touched(home_SK: Integers, bins: int) -> npt.NDArray[np.bool_]:
    """Return hit_SB: whether any of a token's choices is in each bin."""
    hit_SB = np.zeros((len(home_SK), bins), dtype=np.bool_)
    np.put_along_axis(hit_SB, home_SK, True, axis=1)
    return hit_SB
