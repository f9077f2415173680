"""`make resume-pairs`: checkpoints of each layout of four ranks go on in the others, with a straight run's losses."""

import json
import sys
import tempfile
from itertools import permutations
from pathlib import Path

from moe_dist.checkpoint.store import checkpoints_of, step_of
from moe_dist.config import load_config
from moe_dist.training.trainer import train
from tests.distributed.ranks import run_ranks

SMOKE = Path(__file__).parents[2] / "configs" / "test" / "smoke.yaml"
LAYOUTS = {
    "experts": ["world.cluster=2", "world.data=2", "world.zero_stage=2"],
    "tensor": ["world.tensor=2", "world.cluster=4", "world.zero_stage=1"],
    "context": ["world.context=2", "world.tensor=2", "world.cluster=2", "world.zero_stage=0"],
    "pipeline": ["world.pipeline=2", "world.tensor=2", "world.cluster=1", "world.zero_stage=1"],
}
STEPS, MIDDLE, TOLERANCE = 6, 3, 1e-5
COMMON = [
    f"train.steps={STEPS}", f"checkpoint.every={MIDDLE}", "checkpoint.keep_last=2", "tensorboard=false",
    "model.heads=4", "moe.wire_dtype=float32", "moe.top_clusters=2", "train.eval_every=0", "train.micro_batch_size=2",
    "recluster.period=2", "recluster.start=2", "recluster.growth=1", "recluster.similarity=random",
    "recluster.max_loss_increase=1", "recluster.threshold=0",
]  # fmt: skip


def _train(words: list[str]) -> None:
    train(load_config(SMOKE, words))


def _losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train"]["loss"] for line in lines if line.get("train")}


def main() -> int:
    """Prints the largest relative difference of each pair; returns 1 if one is above the limit."""
    largest = 0.0
    with tempfile.TemporaryDirectory(prefix="moe-dist-pairs-") as name:
        folder = Path(name)
        common = [*COMMON, f"runs_dir={folder}", f"corpus.cache_dir={folder}/cache"]
        for layout, words in LAYOUTS.items():
            run_ranks(_train, 4, [*common, *words, f"name={layout}"], timeout=300)
        straight = _losses(folder / "experts")
        for source, target in permutations(LAYOUTS, 2):
            middle = next(one for one in checkpoints_of(folder / source) if step_of(one) == MIDDLE)
            words = [*common, *LAYOUTS[target], f"name={source}-{target}", f"checkpoint.resume={middle}"]
            run_ranks(_train, 4, words, timeout=300)
            found = _losses(folder / f"{source}-{target}")
            difference = max(abs(found[step] / straight[step] - 1) for step in straight if step > MIDDLE)
            largest = max(largest, difference)
            told = f"steps {MIDDLE + 1} to {STEPS}, relative difference at most {difference:.1e}"
            print(f"{source} -> {target}: {told}", flush=True)
    return int(largest > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
