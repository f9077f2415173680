"""What goes wrong with the files of one rank's tier stops all ranks in one line, and costs nothing that was saved."""

import json
import os
import re
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from moe_dist.checkpoint.store import check, checkpoints_of
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.launch.environment import INIT_METHOD
from moe_dist.launch.rank import run_rank
from moe_dist.memory.owned_folder import OwnedFolder
from moe_dist.training.checkpointing import RunCheckpoints
from tests.distributed.ranks import run_ranks, start_ranks
from tests.distributed.test_offload import _final
from tests.distributed.test_training import SMOKE

pytestmark = pytest.mark.timeout(400)
SECONDS = 150.0
"""Far more than a rank needs to end; one that hangs in a collective would take `world.timeout_seconds` longer."""
VICTIM = 1
TIER = f"rank-{VICTIM:05}"


def _damage(tier: Path) -> None:
    """Other bytes all over the files, as a bad disk would leave them."""
    for file in tier.glob("layer-*.bin"):
        with file.open("r+b") as content:
            content.write(b"\xa5" * file.stat().st_size)


def _cut(tier: Path) -> None:
    for file in tier.glob("layer-*.bin"):
        os.truncate(file, 5000)


def _fill(tier: Path) -> None:
    """No file can be written beyond 1 KiB from now on, so that the tier's cannot."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))


@dataclass(frozen=True)
class Fault:
    """What befalls the tier of rank 1 when a method of `owner` is called for the `call`-th time."""

    befalls: Callable[[Path], None]
    owner: type
    method: str
    call: int


def _as_launched(words: list[str], tier: Path, log: Path, fault: Fault | None) -> int:
    """A rank as a launcher starts it, up to its exit code; what it says goes to `log`."""
    with (log / f"rank-{dist.get_rank()}.txt").open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    os.environ[INIT_METHOD] = "the group that the test has formed"
    if fault is not None and dist.get_rank() == VICTIM:
        _arm(fault, tier)
    return run_rank(str(SMOKE), words)


def _arm(fault: Fault, tier: Path) -> None:
    before, calls = getattr(fault.owner, fault.method), iter(range(1, 100))

    def call(*args: Any) -> Any:
        if next(calls) == fault.call:
            fault.befalls(tier)
        return before(*args)

    setattr(fault.owner, fault.method, call)


class Run:
    """One run under `folder`, which is started again and again."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.path = folder, folder / "runs" / name
        self.directory = folder / "tier"
        self._words = [
            f"runs_dir={folder}/runs", f"corpus.cache_dir={folder}/cache", "tensorboard=false", f"name={name}",
            "checkpoint.resume=auto", "checkpoint.every=2", "memory.offload=true", f"memory.directory={self.directory}",
            "memory.device_budget_bytes=120000", "world.timeout_seconds=200",
        ]  # fmt: skip

    def live(self, fault: Fault | None = None) -> None:
        """Starts both ranks, which reach the end."""
        assert run_ranks(_as_launched, 2, self._words, self.directory / TIER, self._log(), fault) == [0, 0]

    def fail(self, fault: Fault | None = None) -> str:
        """Starts both ranks, which end by themselves as other runs that fail do; returns the one line they say."""
        log, started = self._log(), time.monotonic()
        words = (self._words, self.directory / TIER, log, fault)
        processes, _ = start_ranks(_as_launched, 2, log / "store", SECONDS, *words)
        try:
            for process in processes:
                process.join(started + SECONDS - time.monotonic())
            told = [(log / f"rank-{rank}.txt").read_text() for rank in range(2)]
            assert [process.exitcode for process in processes] == [1, 1], "\n".join(told)
        finally:
            for process in processes:
                process.kill()
                process.join()
        assert not [text for text in told if "Traceback" in text], "\n".join(told)
        lines = [line for text in told for line in text.splitlines() if line.startswith("moe-dist: ")]
        assert len(lines) == 2, lines  # one a rank: the other has lost its peer, or is told, and names it
        errors = {re.sub(r"^moe-dist: rank [01] failed: (rank 1: )?", "rank 1: ", line) for line in lines}
        assert lines[VICTIM].startswith(f"moe-dist: rank {VICTIM} failed: ")
        (error,) = errors
        return error

    def _log(self) -> Path:
        log = self.folder / f"log-{len(list(self.folder.iterdir()))}"
        log.mkdir()
        return log

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "events.jsonl").read_text().splitlines()]

    def losses(self) -> list[Any]:
        lines = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line.get("train"), line.get("validation")) for line in lines]


def test_a_run_that_meets_every_fault_of_its_tier_ends_like_one_that_meets_none(tmp_path: Path) -> None:
    straight, run = Run(tmp_path, "straight"), Run(tmp_path, "run")
    straight.live()
    named = rf"rank 1: {run.directory}/{TIER}/layer-00\d.bin: [a-z_]+ of layer \d, cluster [23]"
    story = [
        (Fault(_damage, DeepSpeedEngine, "forward_backward", 3), 2, rf"{named} is damaged: its checksum is wrong"),
        (
            Fault(_cut, DeepSpeedEngine, "update", 3),
            4,
            rf"{named}: only [\d,]+ of [\d,]+ bytes are left: the file was cut short",
        ),
        (
            Fault(_fill, DeepSpeedEngine, "forward_backward", 3),
            6,
            rf"{named} cannot be written \(.*\): File too large; give",
        ),
        (Fault(_fill, RunCheckpoints, "restore", 1), 6, rf"{named} cannot be written \(.*\): File too large; give"),
    ]
    for fault, saved, said in story:
        assert re.match(said, run.fail(fault))
        assert run.events()[-1]["event"] == "failed"
        newest = checkpoints_of(run.path)[0]
        assert newest.name == f"step-{saved:08}"
        check(newest)
    other = OwnedFolder(run.directory / TIER)
    used = rf"rank 1: memory.directory: {run.directory}/{TIER} is used by another run \(process {os.getpid()}"
    assert re.match(used, run.fail())
    other.close()
    run.live()
    assert [event["step"] for event in run.events() if event["event"] == "resumed"] == [2, 4, 6, 6, 6]
    assert run.losses() == straight.losses()
    found, wanted = _final(run.path), _final(straight.path)
    assert found.keys() == wanted.keys()
    assert all((found[name] == value).all() for name, value in wanted.items())
    assert not list(run.directory.iterdir())
