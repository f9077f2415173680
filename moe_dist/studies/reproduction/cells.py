"""Runs of a reproduction as cells of a study; one command repeats any cell alone."""

import json
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from moe_dist.config import RunConfig, load_config
from moe_dist.errors import ConfigError
from moe_dist.studies.reproduction.scales import KINDS, RecipeKind, Scale
from moe_dist.studies.runner import StudyCell

GRID_SEED = 1000
"""Seed of the grid's runs; differs from those of the reported runs."""
UNAVAILABLE = "not available in this version"
COMMON = ("world.threads=1", "tensorboard=false", "checkpoint.resume=auto")


@dataclass(frozen=True)
class Setting:
    """Setting that all runs share.

    Attributes:
        configs: the folder `configs` of a checkout.
        folder: folder of all results.
        overrides: settings that win over the scale's.
    """

    scale: Scale
    configs: Path
    folder: Path
    overrides: tuple[str, ...] = ()

    @property
    def base(self) -> Path:
        """Load the scale's configuration, which every kind extends."""
        return self.configs / "reproduce" / f"{self.scale.name}.yaml"

    def load(self) -> RunConfig:
        """Overrides that the runs of all kinds share."""
        return load_config(self.base, self.overrides)


def grid_cells(setting: Setting, kinds: Sequence[RecipeKind]) -> list[StudyCell]:
    """Return short runs of the first kind of each family at each learning rate."""
    families = dict.fromkeys(kind.family for kind in kinds if kind.is_available)
    highest = setting.load().optimizer.learning_rate
    steps = setting.scale.grid_steps
    return [
        _cell(
            setting,
            KINDS[family],
            GRID_SEED,
            (
                f"optimizer.learning_rate={factor * highest:g}",
                f"train.steps={steps}",
                f"train.warmup_steps={max(1, steps // 10)}",
                "train.eval_every=0",
                "checkpoint.save_final=false",
            ),
            (("rate", f"{factor * highest:g}"),),
        )
        for family in families
        for factor in setting.scale.grid
    ]


def main_cells(
    setting: Setting, kinds: Sequence[RecipeKind], seeds: int, rates: Mapping[str, float]
) -> list[StudyCell]:
    """Return the reported trainings, seed by seed, so that an early stop leaves a complete table.

    Args:
        rates: learning rate of each family; default: the configuration's.
    """
    return [
        _cell(setting, kind, seed, (f"optimizer.learning_rate={rate:g}",) if (rate := rates.get(kind.family)) else ())
        for seed in range(seeds)
        for kind in kinds
    ]


def kind_of(cell: StudyCell) -> str:
    """Return the name of a cell's kind."""
    return dict(cell.values)["kind"]


def _cell(
    setting: Setting, kind: RecipeKind, seed: int, words: tuple[str, ...], further: tuple[tuple[str, str], ...] = ()
) -> StudyCell:
    values = (("kind", kind.name), *further)
    if not kind.is_available:
        return StudyCell(values, setting.scale.ranks, seed, setting.base, (), UNAVAILABLE)
    online = setting.scale.recluster if kind.online else ()
    shared = () if kind.shared is None else (_shared_expert(setting, kind.shared),)
    overrides = (*COMMON, *online, *shared, *kind.words, *setting.overrides, *words, f"seed={seed}")
    cell = StudyCell(values, setting.scale.ranks, seed, _config_of(setting, kind), overrides)
    try:
        cell.load()
    except ConfigError as error:
        return StudyCell(values, setting.scale.ranks, seed, cell.config, overrides, str(error))
    return cell


def _shared_expert(setting: Setting, ratio: float) -> str:
    return f"moe.shared_expert_hidden={int(ratio * setting.load().moe.expert_hidden)}"


def _config_of(setting: Setting, kind: RecipeKind) -> Path:
    """Write a file that joins the configurations of the scale and the kind; return its path."""
    target = setting.folder / "configs" / f"{kind.name}.yaml"
    includes = [str(path.resolve()) for path in (setting.base, setting.configs / "model" / f"{kind.model}.yaml")]
    text = yaml.safe_dump({"include": includes})
    if not target.is_file() or target.read_text(encoding="utf-8") != text:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    return target


def text_words(text: str) -> tuple[str, ...]:
    """Return overrides that select a text: `stdlib`, `packages`, `hub` (the scale's own), or files TRAIN,VALIDATION.

    `packages` is the source of the Python packages that are installed here, in the order of their names.

    Raises:
        ConfigError: the text is none of these.
    """
    if text == "hub":
        return ()
    if text == "stdlib":
        return ("corpus.kind=stdlib", "corpus.name=null")
    if text == "packages":
        source = Path(sysconfig.get_path("purelib")) / "**" / "*.py"
        return ("corpus.kind=text", f"corpus.paths={json.dumps(str(source))}", "corpus.name=null")
    train, comma, validation = text.partition(",")
    if not (train and comma and validation):
        known = "stdlib, packages, hub, or TRAIN,VALIDATION such as train.txt,validation.txt"
        raise ConfigError(f"--text {text!r}: write {known}")
    paths = [json.dumps([str(Path(file).absolute())]) for file in (train, validation)]
    return ("corpus.kind=text", f"corpus.paths={paths[0]}", f"corpus.validation_paths={paths[1]}")
