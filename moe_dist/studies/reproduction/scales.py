"""Kinds of layer that a reproduction compares, and the scales at which it does."""

from collections.abc import Sequence
from dataclasses import dataclass

from moe_dist.config import RunConfig
from moe_dist.errors import ConfigError


@dataclass(frozen=True)
class RecipeKind:
    """One kind of layer in the comparison.

    Attributes:
        model: file in configs/model.
        family: kinds of one family share the learning rate that the grid finds for the first of them.
        online: clusters are regrouped during training.
        words: additional overrides.
        needs: sections of the configuration that a version without the capability lacks.
        beside: kinds that are run whenever this one is asked for.
        shared: width of the shared expert over that of an expert; None: the model's own.
    """

    name: str
    model: str
    family: str
    online: bool = False
    words: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    shared: float | None = None

    @property
    def is_available(self) -> bool:
        """True if this version supports the kind."""
        return all(section in RunConfig.model_fields for section in self.needs)


DENSE, CLASSIC, STRONG, OURS = "dense", "standard-aux", "standard-bias", "clustered-online"
FEW = "standard-few"
"""Standard experts with about as many parameters as the clustered presets."""
PAPER = "paper"
BASELINES = (CLASSIC, STRONG)
_SLOWER = ("optimizer.feed_forward_lr_scale=0.6",)  # the best one: see quality-*.yaml
_INT4 = ("precision.residuals=qat",)
KINDS = {
    kind.name: kind
    for kind in (
        RecipeKind(DENSE, "dense", DENSE, words=_SLOWER),
        RecipeKind(CLASSIC, "standard-aux", CLASSIC),
        RecipeKind(STRONG, "standard-bias", STRONG, words=_SLOWER),
        RecipeKind(FEW, "standard-bias", FEW, words=(*_SLOWER, "moe.experts=6")),
        RecipeKind(PAPER, "paper", PAPER, online=True, beside=(DENSE, *BASELINES), shared=1.5),
        RecipeKind("clustered-cheap", "cheap", "clustered-cheap"),
        RecipeKind("clustered-fixed", "good", "clustered-fixed"),
        RecipeKind(OURS, "good", "clustered-fixed", online=True),
        RecipeKind("clustered-int4", "good", "clustered-fixed", online=True, words=_INT4, needs=("precision",)),
        RecipeKind(
            "clustered-int4-offload",
            "good",
            "clustered-fixed",
            online=True,
            words=(*_INT4, "memory.offload=true"),
            needs=("precision", "memory"),
        ),
    )
}


def chosen_kinds(names: Sequence[str]) -> list[RecipeKind]:
    """Return the kinds of these names with those that belong beside them, each once; without names: all.

    Raises:
        ConfigError: there is no such kind.
    """
    if unknown := [name for name in names if name not in KINDS]:
        raise ConfigError(f"--kind {unknown[0]}: use {', '.join(KINDS)}")
    wanted = {other for name in names for other in (name, *KINDS[name].beside)}
    return [kind for name, kind in KINDS.items() if not names or name in wanted]


@dataclass(frozen=True)
class Scale:
    """Sizes of all runs; the configuration of a run is `configs/reproduce/<name>.yaml` and that of its kind.

    Attributes:
        text: `stdlib`, or `hub` for the configured corpus.
        ranks: ranks of every run.
        grid: factors on the configured learning rate, of which each family takes its best; empty: no grid.
        grid_steps: steps of the grid's runs.
        recluster: settings of online kinds, which depend on the length of a run.
        stride: stride of the perplexity windows; None: half a window.
        glue: options of `moe-dist eval`; each trained model, one per seed, is fine-tuned once on each task.
        glue_by_default: GLUE is evaluated without `--glue` too.
        seconds: duration of a grid run, a training and an evaluation on two cores, until measured.
    """

    name: str
    text: str
    ranks: int
    grid: tuple[float, ...]
    grid_steps: int
    recluster: tuple[str, ...]
    stride: int | None
    glue: tuple[str, ...]
    glue_by_default: bool
    seconds: tuple[float, float, float]


def _recluster(period: int, stop: int) -> tuple[str, ...]:
    return (f"recluster.period={period}", f"recluster.start={period}", f"recluster.stop={stop}")


GRID = (0.7, 1.0, 1.4)
SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            "smoke",
            "stdlib",
            1,
            (),
            0,
            _recluster(2, 8),
            None,
            ("--max-train=32", "--max-eval=32", "--max-steps=2"),
            False,
            (0, 15, 15),
        ),
        Scale(
            "tiny",
            "hub",
            2,
            GRID,
            100,
            _recluster(20, 100),
            None,
            ("--max-train=512", "--max-eval=256", "--epochs=1"),
            True,
            (45, 85, 90),
        ),
        Scale(
            "small", "hub", 4, GRID, 500, _recluster(100, 1000), None, ("--max-train=10000",), True, (1200, 4800, 3600)
        ),
        Scale("parity", "packages", 1, GRID, 500, _recluster(200, 1000), None, (), False, (170, 680, 60)),
        Scale("paper", "hub", 16, (), 0, _recluster(500, 10000), None, (), True, (0, 3600, 3600)),
    )
}
