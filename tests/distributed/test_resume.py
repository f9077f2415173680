"""Runs that are killed, resumed, branched off or cannot save: nothing is lost, and the end is the same, bit by bit."""

import json
import math
import os
import re
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from moe_dist.checkpoint import save_and_load
from moe_dist.checkpoint.store import check, checkpoints_of
from moe_dist.config import load_config
from moe_dist.data import SequenceLoader
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine, StepOutcome
from moe_dist.errors import MoeDistError, TrainingError
from moe_dist.metrics.run_lock import RunLock
from moe_dist.training.trainer import train
from tests.distributed.ranks import run_ranks
from tests.distributed.test_training import SMOKE
from tests.soak.kill_points import KillPoint
from tests.soak.lives import live

pytestmark = pytest.mark.timeout(300)
STEPS, EVERY = 8, 3
REGROUPING = [
    "recluster.period=2", "recluster.start=2", "recluster.growth=1", "recluster.similarity=random",
    "recluster.max_loss_increase=1", "recluster.threshold=0", "moe.top_clusters=2", "moe.top_k=1",
]  # fmt: skip
"""Experts change their clusters and clusters their ranks after steps 2, 4 and 6."""


def _words(folder: Path, name: str, *more: str) -> list[str]:
    own = [f"runs_dir={folder}/runs", f"corpus.cache_dir={folder}/cache", f"name={name}", "tensorboard=false"]
    return [*own, f"train.steps={STEPS}", f"checkpoint.every={EVERY}", *REGROUPING, *more]


def _train(words: list[str]) -> None:
    train(load_config(SMOKE, words))


def _lines(run: Path, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / file).read_text().splitlines()]


def _figures(run: Path, after: int = 0) -> list[tuple[Any, ...]]:
    """What training computed at each step, without times."""
    lines = [line for line in _lines(run, "metrics.jsonl") if line["step"] > after]
    return [(line["step"], line.get("train"), line.get("load"), line.get("validation")) for line in lines]


def _final(run: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted((run / "final").glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def _assert_same_end(run: Path, expected: Path) -> None:
    found, wanted = _final(run), _final(expected)
    assert found.keys() == wanted.keys()
    assert not [name for name, value in wanted.items() if not torch.equal(found[name], value)]
    summary, other = (json.loads((path / "summary.json").read_text()) for path in (run, expected))
    for key in ("steps", "tokens", "validation", "load", "all_to_all"):
        assert summary[key] == other[key], key
    moved = {key: value for key, value in other["recluster"].items() if key != "seconds"}
    assert {key: summary["recluster"][key] for key in moved} == moved


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `runs/straight`, a run on two ranks that nothing disturbed, and its checkpoints after steps 3 and 6."""
    folder = tmp_path_factory.mktemp("resume")
    run_ranks(_train, 2, _words(folder, "straight", "world.zero_stage=2"))
    moved = [line["moved_experts"] for line in _lines(folder / "runs" / "straight", "events.jsonl") if "bytes" in line]
    assert len(moved) == 3
    assert any(moved[:1])
    assert any(moved[1:])
    return folder


def _straight(folder: Path) -> Path:
    return folder / "runs" / "straight"


def test_a_branch_from_a_checkpoint_ends_as_the_run_itself(folder: Path) -> None:
    start = _straight(folder) / "checkpoints" / "step-00000003"
    run_ranks(_train, 2, _words(folder, "branch", "world.zero_stage=2", f"checkpoint.resume={start}"))
    branch = folder / "runs" / "branch"
    assert _figures(branch) == _figures(_straight(folder), after=3)
    _assert_same_end(branch, _straight(folder))
    first, resumed, placement = _lines(branch, "events.jsonl")[:3]
    assert (first["event"], resumed["event"], resumed["step"]) == ("started", "resumed", 3)
    assert placement["members"] != [[list(range(4 * c, 4 * c + 4)) for c in range(4)]] * 2


def _other_shape_words(folder: Path, name: str, start: Path, *more: str) -> list[str]:
    steady = ["moe.wire_dtype=float32", "recluster.period=null", "checkpoint.every=1", "checkpoint.keep_last=9"]
    return _words(folder, name, *steady, f"checkpoint.resume={start}", *more)


@pytest.mark.slow
def test_other_numbers_of_ranks_go_on_with_the_same_losses(folder: Path) -> None:
    """2 -> 4 -> 2 -> 4 -> 4 ranks in other layouts, from a checkpoint whose experts are scattered over the clusters."""
    start = _straight(folder) / "checkpoints" / "step-00000003"
    run_ranks(_train, 2, _other_shape_words(folder, "same", start))
    expected = [figures["loss"] for _, figures, _, _ in _figures(folder / "runs" / "same") if figures]
    plan = [
        (4, ["world.shard=2", "world.shard_mode=experts", "world.zero_stage=1"]),
        (4, ["world.shard=2", "world.zero_stage=2", "world.tensor=2"]),
        (2, ["world.data=2", "world.zero_stage=0", "world.tensor=2"]),
        (4, ["world.pipeline=2", "world.zero_stage=1", "train.micro_batch_size=4"]),
        (4, ["world.data=2", "world.zero_stage=1", "world.context=2"]),
    ]
    for done, (ranks, words) in enumerate(plan):
        run_ranks(_train, ranks, _other_shape_words(folder, f"leg-{done}", start, *words))
        run = folder / "runs" / f"leg-{done}"
        losses = [figures["loss"] for _, figures, _, _ in _figures(run) if figures]
        assert losses == pytest.approx(expected[done:], rel=1e-5), f"leg {done}"
        start = run / "checkpoints" / f"step-{4 + done:08}"


def _train_and_fall(words: list[str], fall: Callable[[], None], step: int, rank: int) -> None:
    """Trains, and calls `fall` on one rank in the backward passes of `step`."""
    before, steps = DeepSpeedEngine.forward_backward, iter(range(1, 100))

    def forward_backward(self: DeepSpeedEngine, sequences_BS: Tensor, *args: Any) -> StepOutcome:
        if next(steps) == step and dist.get_rank() == rank:
            fall()
        return before(self, sequences_BS, *args)

    DeepSpeedEngine.forward_backward = forward_backward  # type: ignore[method-assign, assignment]
    _train(words)


def _broken_gradient() -> None:
    DeepSpeedEngine.update = _update_with_nan  # type: ignore[method-assign]


_update = DeepSpeedEngine.update


def _update_with_nan(self: DeepSpeedEngine, outcome: StepOutcome, learning_rate: float) -> float:
    for values in self._engine.optimizer.averaged_gradients.values():
        values[0].fill_(math.nan)
    return _update(self, outcome, learning_rate)


@pytest.mark.parametrize(
    "point",
    [
        KillPoint("step", 0, 15_000),
        KillPoint("save", 0, 10_000),
        KillPoint("save", 1, 30_000),
        KillPoint("recluster", 1, 50_000),
    ],
    ids=lambda point: f"{point.part}-{point.rank}",
)
def test_a_killed_rank_loses_nothing(folder: Path, point: KillPoint) -> None:
    """Killed by SIGKILL at a line about in the middle; `make soak` does so at 200 random ones."""
    name = f"killed-{point.part}-{point.rank}"
    words = _words(folder, name, "world.zero_stage=2", "checkpoint.resume=auto", "checkpoint.every=2")
    assert live(words, point).killed
    life = live(words, KillPoint("nowhere", 0, 0))
    assert life.finished, life.error
    run = max((folder / "runs").glob(f"{name}*"))  # killed before its first checkpoint it starts anew
    assert _figures(run) == _figures(_straight(folder))
    _assert_same_end(run, _straight(folder))


def _fails(words: list[str]) -> str:
    with pytest.raises(TrainingError) as caught:
        _train_and_fall(words, _broken_gradient, 5, 1)
    return str(caught.value)


def test_a_gradient_that_is_not_a_number_spoils_no_checkpoint(folder: Path) -> None:
    words = _words(folder, "nan", "world.zero_stage=2", "checkpoint.resume=auto", "checkpoint.every=1")
    for message in run_ranks(_fails, 2, words):
        assert re.match("step 5: the global gradient norm is (nan|inf)", message)
    run = folder / "runs" / "nan"
    assert checkpoints_of(run)[0].name == "step-00000004"
    run_ranks(_train, 2, words)
    _assert_same_end(run, _straight(folder))


def _copy(folder: Path, name: str) -> Path:
    return Path(shutil.copytree(_straight(folder), folder / "runs" / name))


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(folder: Path) -> None:
    run = _copy(folder, "damaged")
    (run / "summary.json").unlink()
    shard = run / "checkpoints" / "step-00000006" / "rank-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    run_ranks(_train, 2, _words(folder, "damaged", "world.zero_stage=2", f"checkpoint.resume={run}"))
    _assert_same_end(run, _straight(folder))
    assert (run / "checkpoints" / "damaged-step-00000006" / shard.name).read_bytes() == content
    damaged, resumed = [
        line for line in _lines(run, "events.jsonl") if line["event"] in ("checkpoint_damaged", "resumed")
    ]
    assert "the checksum of rank-00001.safetensors is wrong" in damaged["error"]
    assert resumed["step"] == 3
    check(run / "checkpoints" / "step-00000006")


def _train_with_a_full_disk(words: list[str]) -> None:
    """From the fourth step on rank 1 can write no file beyond 64 KiB."""

    def fill() -> None:
        for thread in threading.enumerate():
            if thread.name == "checkpoint-writer":
                thread.join()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))

    _train_and_fall(words, fill, 4, 1)


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(folder: Path) -> None:
    words = _words(folder, "full", "world.zero_stage=2", "checkpoint.save_final=false")
    run_ranks(_train_with_a_full_disk, 2, words)
    run = folder / "runs" / "full"
    assert _figures(run) == _figures(_straight(folder))
    (failed,) = [line for line in _lines(run, "events.jsonl") if line["event"] == "checkpoint_failed"]
    assert failed["step"] == 6
    assert "rank 1: " in failed["error"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]
    check(run / "checkpoints" / "step-00000003")


def _write_late(words: list[str]) -> None:
    """The checkpoint of step 3 is written only when step 5 has begun: training that waited for it would never end."""
    reached, write, steps = threading.Event(), save_and_load.write_checkpoint, iter(range(1, 100))
    before = DeepSpeedEngine.forward_backward

    def forward_backward(self: DeepSpeedEngine, sequences_BS: Tensor, *args: Any) -> StepOutcome:
        if next(steps) == 5:
            reached.set()
        return before(self, sequences_BS, *args)

    def late(*args: Any) -> None:
        assert reached.wait(60)
        write(*args)

    DeepSpeedEngine.forward_backward = forward_backward  # type: ignore[method-assign, assignment]
    with mock.patch("moe_dist.checkpoint.async_saver.write_checkpoint", late):
        _train(words)


def test_training_goes_on_while_a_checkpoint_is_written(folder: Path) -> None:
    words = ["checkpoint.keep_last=9", "checkpoint.save_final=false"]
    run_ranks(_write_late, 1, _words(folder, "late", *words))
    run_ranks(_train, 1, _words(folder, "waits", *words, "checkpoint.asynchronous=false"))
    late, waits = (checkpoints_of(folder / "runs" / name) for name in ("late", "waits"))
    assert [path.name for path in late] == [path.name for path in waits] == ["step-00000006", "step-00000003"]
    for one, other in zip(late, waits, strict=True):
        found, wanted = (load_file(path / "rank-00000.safetensors") for path in (one, other))
        different = [name for name, value in wanted.items() if not torch.equal(found[name], value)]
        assert set(different) <= {"part/history/step_seconds@0", "part/random/python@0"}  # torch's logging draws


def _train_until_it_hangs(words: list[str]) -> None:
    """Rank 1 waits for ever in its fourth step; a rank that gives up says why, and ends."""
    config = load_config(SMOKE, words)

    def give_up(error: Exception) -> None:
        (Path(config.runs_dir) / f"rank-{dist.get_rank()}.error").write_text(str(error))
        os._exit(7)

    before = SequenceLoader.batch

    def batch(self: SequenceLoader, step: int) -> Tensor:
        if step == 3 and dist.get_rank() == 1:  # counted from 0; rounds of re-clustering read batches of other steps
            threading.Event().wait()
        return before(self, step)

    SequenceLoader.batch = batch  # type: ignore[method-assign]
    train(config, give_up)


def test_a_rank_that_hangs_ends_the_run_with_the_stacks_of_all(folder: Path) -> None:
    words = _words(folder, "hangs", "world.zero_stage=2", "watchdog.seconds=20", "checkpoint.resume=auto")
    with pytest.raises(AssertionError, match="ended with exit code 7"):
        run_ranks(_train_until_it_hangs, 2, words, timeout=120)
    run = folder / "runs" / "hangs"
    assert "since step 4: this rank hangs in " in (folder / "runs" / "rank-1.error").read_text()
    waits, hangs = ((run / "stacks" / f"rank-0000{rank}.txt").read_text() for rank in (0, 1))
    assert "torch/distributed" in waits or "moe_dist/dispatch/all_to_all.py" in waits  # in a collective, or for its end
    assert "_train_until_it_hangs" in hangs
    assert _lines(run, "events.jsonl")[-1]["event"] == "failed"
    run_ranks(_train, 2, words)
    _assert_same_end(run, _straight(folder))


def _refused(words: list[str]) -> tuple[str, int]:
    with pytest.raises(MoeDistError) as caught:
        _train(words)
    return str(caught.value), caught.value.exit_code


def test_what_does_not_fit_is_refused_on_all_ranks_with_its_keys(folder: Path) -> None:
    words = _words(folder, "straight", "checkpoint.resume=auto", "moe.rank=3", "seed=1", "train.steps=9")
    for message, code in run_ranks(_refused, 2, words):
        assert "moe.rank: 2 -> 3, seed: 0 -> 1;" in message
        assert code == 2


def test_a_run_that_is_complete_is_left_as_it_is(folder: Path) -> None:
    before = (_straight(folder) / "events.jsonl").read_text()
    run_ranks(_train, 2, _words(folder, "straight", "checkpoint.resume=auto"))
    assert (_straight(folder) / "events.jsonl").read_text() == before


def test_only_damaged_checkpoints_are_an_error(folder: Path) -> None:
    run = _copy(folder, "ruined")
    (run / "summary.json").unlink()
    for checkpoint in checkpoints_of(run):
        (checkpoint / "manifest.json").unlink()
    for message, _ in run_ranks(_refused, 2, _words(folder, "ruined", f"checkpoint.resume={run}")):
        assert "every checkpoint is damaged" in message


def _rename(run: Path) -> None:
    """Give a copied run its folder's name, by which `checkpoint.resume=auto` finds it."""
    started = _lines(run, "events.jsonl")[0]
    (run / "events.jsonl").write_text(json.dumps({**started, "run": run.name}) + "\n")


def _in_use(words: list[str]) -> str:
    with pytest.raises((MoeDistError, ConnectionError)) as caught:
        _train(words)
    return str(caught.value)


def test_a_second_job_of_the_name_is_refused_on_all_ranks_and_harms_nothing(folder: Path) -> None:
    run = _copy(folder, "shared")
    (run / "summary.json").unlink()
    _rename(run)
    first_job = RunLock(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    own, followed = run_ranks(_in_use, 2, _words(folder, "shared", "checkpoint.resume=auto"))
    first_job.release()
    assert own.startswith(f"{run} is in use by another job (process {os.getpid()} on ")
    assert followed == f"rank 0 failed: {own}"
    assert {path: path.read_bytes() for path in before} == before


def test_auto_resumes_the_run_before_one_that_died_before_its_first_checkpoint(folder: Path) -> None:
    run = _copy(folder, "early")
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    _rename(run)
    died = folder / "runs" / "early-2"
    died.mkdir()
    shutil.copy(run / "events.jsonl", died)
    run_ranks(_train, 2, _words(folder, "early", "world.zero_stage=2", "checkpoint.resume=auto"))
    _assert_same_end(run, _straight(folder))
    resumed = next(line for line in _lines(run, "events.jsonl") if line["event"] == "resumed")
    assert (resumed["step"], resumed["skipped"]) == (3, [str(died)])
