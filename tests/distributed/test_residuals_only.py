"""Training of residuals alone: they learn, everything else keeps its bits, through checkpoints and on any ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.checkpoint.export import export_weights
from moe_dist.checkpoint.trained_weights import find_weights
from moe_dist.config import load_config
from moe_dist.errors import ConfigError
from moe_dist.training.trainer import train
from tests.distributed.ranks import run_ranks
from tests.distributed.test_training import SMOKE

pytestmark = pytest.mark.timeout(300)
PRESET = Path(__file__).parents[2] / "configs" / "fine-tune" / "residuals.yaml"


def _train(words: list[str], folder: Path) -> None:
    own = [f"runs_dir={folder}/runs", f"corpus.cache_dir={folder}/cache", "tensorboard=false", "train.eval_every=0"]
    train(load_config(folder / "config.yaml", [*own, "train.warmup_steps=0", "recluster.period=null", *words]))


def _weights(folder: Path, name: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    file = folder / f"{name}.safetensors"
    export_weights(find_weights(folder / "runs" / name), file)
    return load_file(file)


def test_nothing_else_changes_a_bit(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"include: [{SMOKE}]\n")
    run_ranks(_train, 1, ["name=first", "train.steps=2"], tmp_path)
    (tmp_path / "config.yaml").write_text(f"include: [{SMOKE}, {PRESET}]\n")
    init = f"checkpoint.init={tmp_path}/runs/first"
    run_ranks(_train, 2, ["name=at-once", init, "train.steps=2", "world.zero_stage=0"], tmp_path)
    in_parts = ["name=in-parts", init, "world.zero_stage=2"]
    run_ranks(_train, 2, [*in_parts, "train.steps=2"], tmp_path)
    run_ranks(_train, 2, [*in_parts, "train.steps=4", "checkpoint.resume=auto"], tmp_path)
    before = _weights(tmp_path, "first")
    for name in ("at-once", "in-parts"):
        after = _weights(tmp_path, name)
        assert before.keys() == after.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        residuals = {name for name in before if ".expert." in name}
        assert len(changed) > len(residuals) / 2, "residuals learn"
        assert changed <= residuals, changed - residuals


def test_what_needs_full_weights_is_refused() -> None:
    for word, shown in [
        ("moe.kind=standard", "moe.kind=standard"),
        ("recluster.period=5", "recluster.period=5"),
        ("memory.offload=true", "memory.offload=true"),
        ("moe.warmup_standard=0.5", "moe.warmup_standard=0.5"),
        ("precision.residuals=packed", "precision.residuals=packed"),
    ]:
        with pytest.raises(ConfigError, match=f"optimizer.trainable=residuals does not work with {shown}: set it to"):
            load_config(None, ["optimizer.trainable=residuals", word])
