"""`make soak`: disturbs and resumes runs until they end, and compares them with an undisturbed one to the last bit."""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from moe_dist.checkpoint.store import check, checkpoints_of, step_of
from moe_dist.errors import CheckpointError
from tests.soak.disturbances import KINDS, Disturbance, SecondJob
from tests.soak.kill_points import PARTS, KillPoint
from tests.soak.lives import RANKS, Life, live, work

STEPS, EVERY = 24, 2
WORDS = [
    f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "checkpoint.resume=auto", "tensorboard=false",
    "train.eval_every=8", "moe.top_clusters=2", "moe.top_k=1", "world.zero_stage=2", "recluster.period=3",
    "recluster.start=3", "recluster.growth=1", "recluster.similarity=random", "recluster.max_loss_increase=1",
    "recluster.threshold=0",
]  # fmt: skip
SIGNALS = {"any time": signal.SIGKILL, "SIGUSR1": signal.SIGUSR1, "SIGTERM": signal.SIGTERM}
"""What is sent to a rank at a random time; the others are kills at random lines."""


@dataclass
class Tally:
    """What the soak has seen so far."""

    events: Counter[str] = field(default_factory=Counter)
    one_line_ends: int = 0
    runs: int = 0
    repeated_steps: int = 0
    problems: list[str] = field(default_factory=list)


class Soak:
    """Runs in `folder` that are disturbed until `events` of them have been, or the time is over."""

    def __init__(self, folder: Path, events: int, minutes: float, seed: int, settings: list[str]) -> None:
        self._folder, self._events, self._random = folder, events, random.Random(seed)
        self._settings = settings
        self._deadline = time.monotonic() + 60 * minutes
        self.tally = Tally()
        self._lines: dict[str, int] = {}
        self._seconds = 0.0

    def run(self) -> None:
        """All of it; a problem found is noted, and the next run starts."""
        for part in PARTS:
            started = time.monotonic()
            life = live(self._words(f"straight-{part}"), KillPoint(part, 0, 0))
            assert life.finished, life.error
            self._lines[part], self._seconds = min(life.lines), time.monotonic() - started
        while not self._enough() and len(self.tally.problems) < 5:
            self._one_run(f"run-{self.tally.runs}")
            self.tally.runs += 1
            print(json.dumps(self.summary()), flush=True)

    def summary(self) -> dict[str, Any]:
        return {**vars(self.tally), "events": dict(self.tally.events), "event_count": self.tally.events.total()}

    def _enough(self) -> bool:
        return self.tally.events.total() >= self._events or time.monotonic() > self._deadline

    def _one_run(self, name: str) -> None:
        done, whole = 0, True
        while True:
            if self._random.random() < 0.5:
                life, disturbance = self._disturbed(name)
                if disturbance.begun:
                    self.tally.events[disturbance.name] += 1
                if disturbance.begun and disturbance.loses_checkpoints:
                    done, whole = 0, False
                if disturbance.problem:
                    self.tally.problems.append(f"{name}: {disturbance.problem}")
                    return
                if life.error and disturbance.may_stop and _is_one_line(life.error):
                    self.tally.one_line_ends += 1
                    continue
            else:
                point, after = self._choose()
                grace, signum = self._random.choice([0.0, 0.3, 1.0]), SIGNALS.get(point.part, signal.SIGKILL)
                life = live(self._words(name), point, after, grace, signum)
                if not life.finished:
                    self.tally.events[point.part] += 1
            if life.error:
                self.tally.problems.append(f"{name}: {life.error.strip()}")
                return
            if life.finished:
                break
            done = self._look(self._newest(name), done)
        self._compare(self._newest(name), whole)

    def _disturbed(self, name: str) -> tuple[Life, Disturbance]:
        """Train with one disturbance, from a random time on."""
        kind = self._random.choice(KINDS)
        after, seconds = self._random.uniform(0.0, 0.9 * self._seconds), self._random.choice([0.2, 1.0, 3.0])
        words = [*self._words(name), *kind.words]
        if kind is SecondJob:
            disturbance: Disturbance = SecondJob(work, words, after, seconds, lambda: self._newest(name))
        else:
            disturbance = kind(after, seconds, lambda: self._newest(name))
        life = live(words, KillPoint("none", 0, 0), disturbance=disturbance)
        disturbance.settle()
        return life, disturbance

    def _choose(self) -> tuple[KillPoint, float | None]:
        """A point within the next quarter of a run: it dies several times, and lives when less than that is left."""
        part, rank = self._random.choice([*PARTS, *SIGNALS]), self._random.randrange(RANKS)
        if part in SIGNALS:
            return KillPoint(part, rank, 0), self._random.uniform(0.0, self._seconds)
        return KillPoint(part, rank, self._random.randint(1, self._lines[part] // 4)), None

    def _look(self, run: Path | None, done: int) -> int:
        """After a kill: every committed checkpoint is whole, and none that was there is gone; returns the newest."""
        found = checkpoints_of(run) if run is not None else []
        for checkpoint in found:
            try:
                check(checkpoint)
            except CheckpointError as error:
                self.tally.problems.append(str(error))
        newest = step_of(found[0]) if found else 0
        if newest < done:
            self.tally.problems.append(f"{run}: the newest checkpoint was of step {done}, is of step {newest}")
        if run is not None:
            self.tally.repeated_steps += max(0, _last_step(run) - newest)
        return newest

    def _compare(self, run: Path | None, whole: bool) -> None:
        """Compare figures and weights with an undisturbed run; a removed folder has lost its first figures."""
        assert run is not None
        straight = self._folder / "runs" / "straight-step"
        found, wanted = _figures(run), _figures(straight)
        if found != wanted[0 if whole else len(wanted) - len(found) :]:
            self.tally.problems.append(f"{run}: other figures than {straight}")
        weights = _weights(run)
        different = [name for name, value in _weights(straight).items() if not torch.equal(weights[name], value)]
        if different:
            self.tally.problems.append(f"{run}: other weights than {straight}: {different[:3]}")

    def _newest(self, name: str) -> Path | None:
        """A run killed before its first checkpoint starts again in a folder of its own: name-2 and so on."""
        runs = self._folder / "runs"
        found = [path for path in runs.iterdir() if path.name == name or path.name.startswith(f"{name}-")]
        return max(found, key=lambda path: int(path.name.removeprefix(name)[1:] or 1), default=None)

    def _words(self, name: str) -> list[str]:
        return [
            *WORDS,
            *self._settings,
            f"runs_dir={self._folder}/runs",
            f"corpus.cache_dir={self._folder}/cache",
            f"name={name}",
        ]


def _is_one_line(error: str) -> bool:
    """Return True if a rank ended by an error meant for the user, or by the end of a peer."""
    last = error.strip().splitlines()[-1]
    return last.startswith("moe_dist.errors.") or "ConnectionError" in last or "Connection" in last


def _figures(run: Path) -> list[Any]:
    """What training computed at each step, without times; every step once. None if the folder was removed after all."""
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for line in lines:
        (line.get("train") or {}).pop("pipeline_idle", None)  # a share of time
    return [[line["step"], line.get("train"), line.get("load"), line.get("validation")] for line in lines]


def _last_step(run: Path) -> int:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def _weights(run: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted((run / "final").glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description="Disturb and resume training, many times."
    )
    parser.add_argument("--events", type=int, default=300, help="kills, signals, suspensions, full disks, ...")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="limit of the time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="other layouts, such as world.pipeline=2")
    words = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="moe-dist-soak-") as folder:
        soak = Soak(Path(folder), words.events, words.minutes, words.seed, words.settings)
        soak.run()
    result = {**soak.summary(), "minutes": round((time.monotonic() - started) / 60, 1), "seed": words.seed}
    result["settings"] = words.settings
    print(json.dumps(result, indent=1))
    if words.json:
        words.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if soak.tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
