"""Resumption of a run: resolves `checkpoint.resume` to a checkpoint, the same on all ranks."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from moe_dist.checkpoint.compatibility import check_config_compatible
from moe_dist.checkpoint.find import Found, agreed, checked, is_checkpoint, latest_valid_checkpoint
from moe_dist.checkpoint.manifest import DataRecord
from moe_dist.checkpoint.store import checkpoints_of, set_aside
from moe_dist.config import RunConfig
from moe_dist.data import PreparedData
from moe_dist.errors import CheckpointError
from moe_dist.metrics.recorder import Recorder, RunRecorder

WORDS = ("none", "auto", "requeued")
RESTART_COUNTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
"""Environment variables that launchers set above 0 when they restart a job."""


@dataclass(frozen=True)
class Resumption:
    """Checkpoint from which a run resumes.

    Attributes:
        run: folder of the run to continue; None: a new run starts from the checkpoint.
        changes: keys that differ from the checkpoint's configuration, as `key: then -> now`.
    """

    found: Found
    run: Path | None
    changes: list[str]

    @property
    def step(self) -> int:
        """Last step before the checkpoint."""
        return self.found.manifest.step


def find_resumption(config: RunConfig, data: PreparedData) -> Resumption | None:
    """Find and verify the checkpoint of `checkpoint.resume`; None: start a new run. Collective.

    Raises:
        CheckpointError: a given path has no checkpoint, all checkpoints are damaged, or the configuration is
            incompatible.
    """
    run, found = _wanted(config)
    if found is None:
        return None
    changes = check_config_compatible(found.manifest, config.phase_after(found.manifest.step), data_record(data))
    if found.manifest.step > config.train.steps:
        raise CheckpointError(
            f"checkpoint {found.path} is of step {found.manifest.step}, beyond train.steps={config.train.steps}"
        )
    return Resumption(found, run, changes)


def open_recorder(config: RunConfig, rank: int, resumption: Resumption | None) -> Recorder:
    """Open the recorder of a new or resumed run, and record its start; damaged checkpoints are set aside."""
    if rank:
        return Recorder()
    if resumption is None or resumption.run is None:
        recorder = RunRecorder(config)
        recorder.event("started", 0, run=config.name, job=job_id())
    else:
        recorder = RunRecorder(config, resumption.run, resumption.step)
    if resumption is not None:
        _record_resumption(recorder, resumption)
    return recorder


def _record_resumption(recorder: RunRecorder, resumption: Resumption) -> None:
    found, step = resumption.found, resumption.step
    for path, problem in found.damaged.items():
        kept = set_aside(path) if resumption.run is not None else path
        recorder.note(f"warning: {problem}; it is kept as {kept.name}, and the previous checkpoint is used")
        recorder.event("checkpoint_damaged", step, path=path.name, error=problem)
    changes = f"; changed: {', '.join(resumption.changes)}" if resumption.changes else ""
    recorder.note(f"resumes after step {step} from {found.path}{changes}")
    recorder.event("resumed", step, path=str(found.path), changes=resumption.changes)


def data_record(data: PreparedData) -> DataRecord:
    """Return the identity of the token files, for checkpoints."""
    return DataRecord(
        train_checksum=data.train.checksum,
        validation_checksum=data.validation.checksum,
        vocab_size=data.vocab_size,
        next_step=0,
    )


def job_id() -> str | None:
    """Return an identifier of the scheduler's job that does not change when it is requeued; None: no Slurm job."""
    job, array, task = (os.environ.get(f"SLURM_{part}") for part in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID"))
    return f"slurm-{array}_{task}" if array and task else f"slurm-{job}" if job else None


def _wanted(config: RunConfig) -> tuple[Path | None, Found | None]:
    resume = config.checkpoint.resume
    run = run_to_go_on(config)
    if run is not None:
        return run, latest_valid_checkpoint(run)
    if resume in WORDS:
        return None, None
    path = Path(resume)
    if not agreed(is_checkpoint(path)):
        raise CheckpointError(
            f"checkpoint.resume={resume!r} holds no checkpoint: give auto, none, or the folder of a run or a checkpoint"
        )
    return None, checked(path)


def run_to_go_on(config: RunConfig) -> Path | None:
    """Return the folder of the run that `checkpoint.resume` continues, or None; collective."""
    resume = config.checkpoint.resume
    if resume == "none" or (resume == "requeued" and not _started_again()):
        return None
    if resume in WORDS:
        return agreed(_newest_run(config, job_id() if resume == "requeued" else None))
    path = Path(resume)
    return agreed(path if bool(checkpoints_of(path)) and not is_checkpoint(path) else None)


def _started_again() -> bool:
    return any(os.environ.get(name, "0") not in ("", "0") for name in RESTART_COUNTS)


def _newest_run(config: RunConfig, job: str | None) -> Path | None:
    """Return the newest folder of a run of this name (`name` or `name-2`, ...), and of `job` if it is given."""
    pattern = re.compile(re.escape(config.name) + r"(-[0-9]+)?")
    runs = Path(config.runs_dir)
    found = [path for path in (runs.iterdir() if runs.is_dir() else []) if pattern.fullmatch(path.name)]
    numbered = sorted(found, key=lambda path: int(path.name.removeprefix(config.name)[1:] or 1), reverse=True)
    return next((path for path in numbered if _is_run_of(path, config.name, job)), None)


def _is_run_of(run: Path, name: str, job: str | None) -> bool:
    """Return True if the first event of a run has this name, and this job unless `job` is None."""
    try:
        with (run / "events.jsonl").open(encoding="utf-8") as file:
            started = json.loads(file.readline())
        return bool(started["run"] == name and job in (None, started["job"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False
