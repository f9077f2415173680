"""The shipped templates under real SLURM: jobs that are pre-empted, cut short, or lose a node end the same."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.bed import ROOT, Bed, wait_until
from tests.cluster.conftest import require
from tests.cluster.services import SLURM_PROGRAMS, start_slurm, start_slurmd

CONFIG = "configs/test/smoke.yaml"
LIMIT = 400.0  # a guard against hangs; the cores may be shared
STEPS = 30
SIZE = ("--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1")  # of the bed's nodes
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VENV": ""}  # ranks take the Python that PATH names

pytestmark = pytest.mark.timeout(2 * LIMIT)


class Job:
    """A job that has been submitted."""

    def __init__(self, bed: Bed, folder: Path, *words: str | Path) -> None:
        self._bed, self._log = bed, folder / "log"
        options = ("--parsable", f"--chdir={ROOT}", f"--output={self._log}", "--time=10", *SIZE)
        self.number = bed.head.run("sbatch", *options, *words, env=ENVIRONMENT).strip()

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def field(self, name: str) -> str:
        """A field of `scontrol show job`."""
        found = re.search(rf"\b{name}=(\S+)", self._bed.head.run("scontrol", "show", "job", self.number))
        assert found is not None, name
        return found[1]

    def await_state(self, *states: str, seconds: float = LIMIT) -> None:
        """Polls until the job is in one of these states."""
        try:
            wait_until(lambda: self.field("JobState") in states, seconds, f"{' or '.join(states)} of a job")
        except AssertionError as error:
            raise AssertionError(f"{error}, it is {self.field('JobState')}\n{self.log}") from None

    def await_step(self, run: Path, step: int) -> None:
        """Polls until the run has logged a step."""

        def done() -> bool:
            if self.field("JobState") in ("COMPLETED", "FAILED"):
                raise AssertionError(f"the job has ended\n{self.log}")
            return step in logged_steps(run)

        wait_until(done, LIMIT, f"step {step}")


def logged_steps(run: Path) -> list[int]:
    """Steps that a run has logged so far, in order."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [line["step"] for line in map(json.loads, lines) if "train" in line]


def events(run: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]


def validation(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())["validation"]
    return found


def words(folder: Path, cache: Path, *more: str) -> list[str]:
    """Smoke's configuration, with more steps, and slow enough for something to happen in between."""
    own = [f"runs_dir={folder}/runs", f"corpus.cache_dir={cache}", "tensorboard=false", "train.eval_every=10"]
    return [CONFIG, *own, f"train.steps={STEPS}", "checkpoint.every=5", "checkpoint.save_final=false", *more]


@pytest.fixture(scope="module")
def finished(slurm: Bed, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 2 nodes x 2 ranks that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = Job(slurm, folder, "slurm/train.sbatch", *words(folder, cache))
    job.await_state("COMPLETED", "FAILED")
    assert job.field("JobState") == "COMPLETED", job.log
    assert "started by srun: 4 ranks, 2 on this node; rendezvous at n1:" in job.log
    assert "exit code 0" in job.log
    run = folder / "runs" / "smoke"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["world"].items() >= {"data": 1, "cluster": 4, "shard": 1, "replicas": 1}.items()
    assert summary["all_to_all"]["bytes_inter_node"] > 0
    return run


@pytest.fixture(scope="module")
def undisturbed(finished: Path) -> dict[str, Any]:
    """The validation losses of a run that nothing happened to."""
    return validation(finished)


def assert_went_on(job: Job, run: Path, undisturbed: dict[str, Any], restarts: int = 1) -> None:
    """The job was put back, resumed from a checkpoint, and ended as if nothing had happened."""
    job.await_state("COMPLETED", "FAILED")
    assert job.field("JobState") == "COMPLETED", job.log
    assert job.field("Restarts") == str(restarts), job.log
    assert events(run).count("resumed") == restarts
    assert events(run)[-1] == "finished"
    assert logged_steps(run) == list(range(1, STEPS + 1))
    assert validation(run) == undisturbed


def test_a_job_before_its_time_limit_saves_and_goes_on(
    slurm: Bed, cache: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    run = tmp_path / "runs" / "smoke"
    job = Job(slurm, tmp_path, "slurm/train.sbatch", *words(tmp_path, cache))
    job.await_step(run, 7)
    slurm.head.run("scancel", "--batch", "--signal=USR1", job.number)  # what --signal=B:USR1@120 does
    wait_until(lambda: "stopped" in events(run), LIMIT, "the end of the first run")
    assert_went_on(job, run, undisturbed)
    assert "asked to stop" in job.log


def test_a_job_that_is_pre_empted_saves_and_goes_on(
    slurm: Bed, cache: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    run = tmp_path / "runs" / "smoke"
    job = Job(slurm, tmp_path, "--exclusive", "slurm/train.sbatch", *words(tmp_path, cache))
    job.await_step(run, 7)
    urgent = Job(slurm, tmp_path, "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    urgent.await_state("COMPLETED", seconds=LIMIT)
    assert_went_on(job, run, undisturbed)
    assert "stopped" in events(run)


def test_a_refused_configuration_is_not_tried_again(slurm: Bed, cache: Path, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "slurm/train.sbatch", *words(tmp_path, cache, "moe.top_k=99"))
    job.await_state("FAILED", "COMPLETED")
    assert (job.field("JobState"), job.field("ExitCode"), job.field("Restarts")) == ("FAILED", "2:0", "0"), job.log
    assert job.log.count("moe.top_k=99 is larger than a cluster") == 1


def test_data_that_ranks_refuse_are_not_tried_again_in_any_folder(slurm: Bed, cache: Path, tmp_path: Path) -> None:
    given = words(tmp_path, cache, "corpus.kind=text", "corpus.paths=[/nowhere]")
    job = Job(slurm, tmp_path, f"--chdir={tmp_path}", "slurm/train.sbatch", str(ROOT / given[0]), *given[1:])
    job.await_state("FAILED", "COMPLETED")
    assert (job.field("JobState"), job.field("ExitCode"), job.field("Restarts")) == ("FAILED", "2:0", "0"), job.log
    assert "'/nowhere' matches no file" in job.log
    assert not list(tmp_path.glob(".refused*"))


def test_a_study_runs_each_variant(slurm: Bed, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "variants").write_text("# none\n\n1 1 train.global_batch_size=4\n2 1 train.global_batch_size=8\n")
    options = ("--array=1-2", f"--output={tmp_path}/log-%a", "--exclusive=user")
    study = Job(
        slurm,
        tmp_path,
        *options,
        "slurm/study.sbatch",
        tmp_path / "variants",
        *words(tmp_path, cache, "train.steps=3", "checkpoint.every=0"),
    )
    runs = [tmp_path / "runs" / f"study-{study.number}-{task}" for task in (1, 2)]

    def logs() -> str:
        return "\n".join(path.read_text() for path in sorted(tmp_path.glob("log-*")))

    def ended() -> bool:
        return not slurm.head.run("squeue", "-h", "-j", study.number, code=None).strip()

    wait_until(ended, LIMIT, "the end of the array")
    assert all((run / "summary.json").exists() for run in runs), logs()
    worlds = [json.loads((run / "summary.json").read_text())["world"] for run in runs]
    assert [world["data"] * world["cluster"] * world["shard"] for world in worlds] == [1, 2]


def test_an_evaluation_on_two_ranks_tells_what_one_process_tells(slurm: Bed, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text((ROOT / "README.md").read_text())
    command: list[str | Path] = [finished, "--task", "wikitext", "--text", tmp_path / "text.txt", "--json"]
    job = Job(slurm, tmp_path, "slurm/eval.sbatch", *command, tmp_path / "two.json")
    job.await_state("COMPLETED", "FAILED")
    assert job.field("JobState") == "COMPLETED", job.log
    slurm.head.run("moe-dist", "eval", *command, tmp_path / "one.json", timeout=LIMIT, env=ENVIRONMENT)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["wikitext"] == two["wikitext"]
    assert (one["ranks"], two["ranks"]) == (1, 2)


@pytest.fixture
def fragile(possible: None, tmp_path: Path) -> Iterator[Bed]:
    """A bed of the test's own, which it may break."""
    require(*SLURM_PROGRAMS)
    with Bed(tmp_path / "bed") as standing:
        start_slurm(standing)
        yield standing


@pytest.mark.slow
def test_a_node_that_is_lost_in_mid_step_costs_no_more_than_the_steps_since_the_checkpoint(
    fragile: Bed, cache: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    run = tmp_path / "runs" / "smoke"
    job = Job(fragile, tmp_path, "slurm/train.sbatch", *words(tmp_path, cache))
    job.await_step(run, 12)
    fragile.crash("n2")
    wait_until(lambda: fragile.head.run("sinfo", "-h", "-n", "n2", "-o", "%t").strip() == "down*", 60, "n2 is down")
    fragile.boot("n2")
    start_slurmd(fragile, "n2")
    assert_went_on(job, run, undisturbed)
