"""Resolution of `checkpoint.resume` to a run and a checkpoint, the same on all ranks."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from moe_dist.checkpoint.compatibility import check_config_compatible, config_of
from moe_dist.checkpoint.find import ValidCheckpoint, agreed, checked, is_checkpoint, latest_valid_checkpoint
from moe_dist.checkpoint.manifest import DataRecord
from moe_dist.checkpoint.store import checkpoints_of, set_aside, step_of
from moe_dist.config import RunConfig
from moe_dist.config.sections.checkpoint import RESUME_WORDS
from moe_dist.data import ORDER, PreparedData, blend_plan, open_sequences
from moe_dist.distributed.collective_errors import raise_on_all_ranks
from moe_dist.errors import CheckpointError
from moe_dist.metrics.recorder import Recorder, RunRecorder
from moe_dist.metrics.run_lock import RunLock

RESTART_COUNTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
"""Environment variables that schedulers set above 0 when they restart a job."""


@dataclass(frozen=True)
class Resumption:
    """Checkpoint to resume from.

    Attributes:
        run: folder of the run that resumes; None: a new run branches off.
        changes: keys that differ from the checkpoint's configuration, as `key: then -> now`.
        skipped: newer runs of the name that have no checkpoint.
        behind: other runs of the name that have not got as far, with their last steps.
        lock: lock of the run's folder, on rank 0.
    """

    found: ValidCheckpoint
    run: Path | None
    changes: list[str]
    skipped: tuple[Path, ...] = ()
    behind: tuple[tuple[Path, int], ...] = ()
    lock: RunLock | None = None

    @property
    def step(self) -> int:
        """Last step that the checkpoint contains."""
        return self.found.manifest.step


@dataclass(frozen=True)
class _RunChoice:
    """Run that `checkpoint.resume` selects.

    Attributes:
        skipped: newer runs of the name that have nothing to resume from.
        behind: other runs of the name that have not got as far, with their last steps.
    """

    run: Path | None = None
    skipped: tuple[Path, ...] = ()
    behind: tuple[tuple[Path, int], ...] = ()


def find_resumption(config: RunConfig, data: PreparedData) -> Resumption | None:
    """Return the verified checkpoint that `checkpoint.resume` selects, or None if the run starts anew; collective.

    Raises:
        CheckpointError: a path holds no checkpoint, all checkpoints are damaged, or it is incompatible.
        ConfigError: another job is writing the run.
    """
    choice = _choose_run(config)
    lock = _lock(choice)
    try:
        found = _checkpoint_of(config, choice.run)
        if found is None:
            _release(lock)
            return None
        changes = check_config_compatible(found.manifest, config.phase_after(found.manifest.step), data_record(data))
        _check_same_draws(config_of(found.manifest), config, data, found.manifest.step)
        if found.manifest.step > config.train.steps:
            raise CheckpointError(
                f"checkpoint {found.path} is of step {found.manifest.step}, beyond train.steps={config.train.steps}"
            )
    except BaseException:
        _release(lock)
        raise
    return Resumption(found, choice.run, changes, choice.skipped, choice.behind, lock)


def _check_same_draws(then: RunConfig, now: RunConfig, data: PreparedData, step: int) -> None:
    """Require that the weights of a blend up to `step` are those of the checkpoint.

    Raises:
        CheckpointError: other sequences would have been drawn, so that some would be repeated and others left out.
    """
    if now.corpus.kind != "blend":
        return
    counts = {name: len(sequences) for name, sequences in open_sequences(now, data, "train").items()}
    position = step * now.train.global_batch_size
    before, after = (dict(zip(counts, blend_plan(run, counts).drawn(position), strict=True)) for run in (then, now))
    if before != after:
        drawn, wanted = (", ".join(f"{name} {count}" for name, count in each.items()) for each in (before, after))
        raise CheckpointError(
            f"the checkpoint of step {step} has drawn sequences of the sources ({drawn}), the configuration would have "
            f"drawn others ({wanted}): keep weights and limits up to there, and change weights from there on with "
            f"corpus.schedule=[{{step: {step}, weights: {{...}}}}]"
        )


def open_recorder(config: RunConfig, rank: int, resumption: Resumption | None) -> Recorder:
    """Open the recorder of a new or resumed run, record the resumption, and rename damaged checkpoints."""
    if rank:
        return Recorder()
    if resumption is None or resumption.run is None:
        earlier = _runs_to_choose_from(config) if resumption is None else []
        recorder = RunRecorder(config)
        recorder.event("started", 0, run=config.name, job=job_id())
        if earlier:
            names = ", ".join(str(path) for path in earlier)
            recorder.note(f"no checkpoint to resume from in {names}: starts anew at step 0")
    else:
        recorder = RunRecorder(config, resumption.run, resumption.step, resumption.lock)
    if resumption is not None:
        _record_resumption(recorder, resumption)
    return recorder


def _record_resumption(recorder: RunRecorder, resumption: Resumption) -> None:
    found, step = resumption.found, resumption.step
    for path, problem in found.damaged.items():
        kept = set_aside(path) if resumption.run is not None else path
        recorder.note(f"warning: {problem}; it is kept as {kept.name}, and the one before is used")
        recorder.event("checkpoint_damaged", step, path=path.name, error=problem)
    if resumption.skipped:
        names = ", ".join(str(path) for path in resumption.skipped)
        recorder.note(f"no checkpoint in {names}: resumes the run before, {resumption.run}")
    if resumption.behind:
        others = ", ".join(f"{path} (step {step})" for path, step in resumption.behind)
        recorder.note(f"resumes {resumption.run}, of this name the furthest with steps left; others: {others}")
    changes = f"; changed: {', '.join(resumption.changes)}" if resumption.changes else ""
    recorder.note(f"resumes after step {step} from {found.path}{changes}")
    skipped = [str(path) for path in resumption.skipped]
    recorder.event("resumed", step, path=str(found.path), changes=resumption.changes, skipped=skipped)


def data_record(data: PreparedData) -> DataRecord:
    """Return the identity of the training tokens."""
    return DataRecord(
        train_checksum=data.checksum("train"),
        validation_checksum=data.checksum("validation"),
        vocab_size=data.vocab_size,
        next_step=0,
        order=ORDER,
    )


def job_id() -> str | None:
    """Return the identity of a job that is the same after a restart by the scheduler, or None without a scheduler."""
    job, array, task = (os.environ.get(f"SLURM_{part}") for part in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID"))
    return f"slurm-{array}_{task}" if array and task else f"slurm-{job}" if job else None


def run_to_go_on(config: RunConfig) -> Path | None:
    """Return the folder of the run that `checkpoint.resume` selects, if any; collective."""
    return _choose_run(config).run


def _choose_run(config: RunConfig) -> _RunChoice:
    resume = config.checkpoint.resume
    if resume not in RESUME_WORDS:
        path = Path(resume)
        return _RunChoice(agreed(path if checkpoints_of(path) and not is_checkpoint(path) else None))
    return agreed(_choose_of_name(config))


def _choose_of_name(config: RunConfig) -> _RunChoice:
    """Choose among the runs of the name: for a restarted job its newest, for `auto` the one that got furthest.

    Of `auto` a run that has steps left is preferred to one that is complete.
    """
    runs = _runs_to_choose_from(config)
    steps = {run: step for run in runs if (step := last_step(run)) is not None}
    if not steps:
        return _RunChoice(None, tuple(runs))
    by_age = config.checkpoint.resume == "requeued"
    left = config.train.steps
    run = next(iter(steps)) if by_age else max(steps, key=lambda run: (steps[run] < left, steps[run]))  # the newest
    newer = runs[: runs.index(run)]
    behind = tuple((other, step) for other, step in steps.items() if other != run)
    return _RunChoice(run, tuple(path for path in newer if path not in steps), () if by_age else behind)


def _lock(choice: _RunChoice) -> RunLock | None:
    """Lock the run on rank 0; reject the job on all ranks if another one is writing it or a newer run of the name."""
    lock = None
    with raise_on_all_ranks():
        if not dist.is_initialized() or dist.get_rank() == 0:
            for path in (*choice.skipped, *(path for path, _ in choice.behind)):
                RunLock(path).release()
            if choice.run is not None:
                lock = RunLock(choice.run)
    return lock


def _release(lock: RunLock | None) -> None:
    if lock is not None:
        lock.release()


def _checkpoint_of(config: RunConfig, run: Path | None) -> ValidCheckpoint | None:
    if run is not None:
        return latest_valid_checkpoint(run)
    resume = config.checkpoint.resume
    if resume in RESUME_WORDS:
        return None
    if not agreed(is_checkpoint(Path(resume))):
        raise CheckpointError(
            f"checkpoint.resume={resume!r} holds no checkpoint: give auto, none, or the folder of a run or a checkpoint"
        )
    return checked(Path(resume))


def _runs_to_choose_from(config: RunConfig) -> list[Path]:
    """Return the runs that `checkpoint.resume=auto` or a restarted job may resume, newest first."""
    resume = config.checkpoint.resume
    if resume not in ("auto", "requeued") or (resume == "requeued" and not _started_again()):
        return []
    job = job_id() if resume == "requeued" else None
    pattern = re.compile(re.escape(config.name) + r"(-[0-9]+)?")
    runs = Path(config.runs_dir)
    found = [path for path in (runs.iterdir() if runs.is_dir() else []) if pattern.fullmatch(path.name)]
    numbered = sorted(found, key=lambda path: int(path.name.removeprefix(config.name)[1:] or 1), reverse=True)
    return [path for path in numbered if _is_run_of(path, config.name, job)]


def last_step(run: Path) -> int | None:
    """Return the last step that a run has saved or finished; None: there is nothing to resume from."""
    steps = [step_of(path) for path in checkpoints_of(run)]
    try:
        steps.append(int(json.loads((run / "summary.json").read_text(encoding="utf-8"))["steps"]))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError):
        steps.append(0)  # it has finished, whenever that was
    return max(steps, default=None)


def _started_again() -> bool:
    return any(os.environ.get(name, "0") not in ("", "0") for name in RESTART_COUNTS)


def _is_run_of(run: Path, name: str, job: str | None) -> bool:
    """Return True if a run's first event has that name, and that job unless it is None."""
    try:
        with (run / "events.jsonl").open(encoding="utf-8") as file:
            started = json.loads(file.readline())
        return bool(started["run"] == name and job in (None, started["job"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False
