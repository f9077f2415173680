"""Cells of a study: every combination of the axes' values with its overrides, checked before anything runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import product
from pathlib import Path

from moe_dist.config import RunConfig, resolve_batch, resolve_world
from moe_dist.errors import ConfigError
from moe_dist.studies.runner import StudyCell

RANKS = "ranks"
SHORT = {
    "experts": "moe.experts",
    "clusters": "moe.clusters",
    "top_clusters": "moe.top_clusters",
    "top_k": "moe.top_k",
    "rank": "moe.rank",
    "kind": "moe.kind",
    "layers": "model.layers",
    "hidden": "model.hidden_size",
    "sequence": "model.sequence_length",
    "batch": "train.global_batch_size",
    "zero": "world.zero_stage",
    "shard": "world.shard",
}
QUIET = ("tensorboard=false", "train.eval_every=0")


class Mode(StrEnum):
    """Quantity that stays constant as ranks are added."""

    STRONG = "strong"  # the whole batch
    WEAK = "weak"  # the batch of a rank


@dataclass(frozen=True)
class Axis:
    """Axis of a study: its name as given, and its values."""

    name: str
    values: tuple[str, ...]

    @property
    def key(self) -> str:
        """Key of the configuration."""
        return SHORT.get(self.name, self.name)


def parse_axis(word: str) -> Axis:
    """Parse `NAME=VALUE,VALUE,...`.

    Raises:
        ConfigError: the form is another, a value is repeated, or `ranks` are no numbers.
    """
    name, equals, text = word.partition("=")
    values = tuple(value.strip() for value in text.split(","))
    if not (name and equals and all(values)):
        raise ConfigError(f"--axis {word!r}: write NAME=VALUE,VALUE, such as ranks=1,2,4 or moe.experts=16,32")
    if len(set(values)) < len(values):
        raise ConfigError(f"--axis {word!r}: a value is repeated")
    if name == RANKS and not all(value.isdecimal() and int(value) for value in values):
        raise ConfigError(f"--axis {word!r}: ranks are whole numbers from 1")
    return Axis(name, values)


def build_cells(
    config: Path, axes: Sequence[Axis], mode: Mode, repeats: int, ranks: int, overrides: Sequence[str]
) -> list[StudyCell]:
    """Return all cells, one round of repeats after the other, so that an early stop leaves a complete table.

    Cells that cannot run have a refusal.

    Args:
        ranks: ranks of each cell if no axis has them.

    Raises:
        ConfigError: an axis is named twice, or no combination can run.
    """
    if len({axis.key for axis in axes}) < len(axes):
        raise ConfigError(f"--axis: an axis is given twice among {', '.join(axis.name for axis in axes)}")
    smallest = min((int(v) for axis in axes if axis.name == RANKS for v in axis.values), default=ranks)
    grid = [
        tuple(zip((axis.name for axis in axes), values, strict=True)) for values in product(*(a.values for a in axes))
    ]
    cells = [
        _cell(config, values, mode, repeat, int(dict(values).get(RANKS, ranks)), smallest, overrides)
        for repeat in range(repeats)
        for values in grid
    ]
    if all(cell.refusal for cell in cells):
        raise ConfigError(f"no cell of the study can run; the first: {cells[0].refusal}")
    return cells


def _cell(
    config: Path,
    values: tuple[tuple[str, str], ...],
    mode: Mode,
    repeat: int,
    ranks: int,
    smallest: int,
    overrides: Sequence[str],
) -> StudyCell:
    words = [f"{SHORT.get(axis, axis)}={value}" for axis, value in values if axis != RANKS]
    cell = StudyCell(values, ranks, repeat, config, (*QUIET, *overrides, *words))
    try:
        if mode is Mode.WEAK:
            cell = replace(cell, overrides=(*cell.overrides, _weak_batch(cell.load(), ranks, smallest)))
        loaded = cell.load()
        resolve_world(loaded, ranks)
        resolve_batch(loaded, ranks)
    except ConfigError as error:
        return replace(cell, refusal=str(error))
    return cell


def _weak_batch(config: RunConfig, ranks: int, smallest: int) -> str:
    """Return the batch of a number of ranks; the configured batch is that of the fewest ranks."""
    batch = config.train.global_batch_size
    if batch * ranks % smallest:
        raise ConfigError(f"train.global_batch_size={batch} x {ranks} ranks is not divisible by {smallest} ranks")
    return f"train.global_batch_size={batch * ranks // smallest}"
