"""The command line: what it says, where, and with which exit code."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from moe_dist import __version__, cli
from moe_dist.benchmarks.layer.spec import LayerBenchSpec
from moe_dist.cli import training
from moe_dist.config import RunConfig, load_config
from moe_dist.errors import TrainingError
from moe_dist.launch import runners
from moe_dist.launch.job import Job, Launcher

Run = tuple[int, str, str]


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 3\n")
    return str(path)


@pytest.fixture
def moe_dist(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: str) -> Run:
        with pytest.raises(SystemExit) as left:
            cli.main(list(words))
        shown = capsys.readouterr()
        return int(left.value.code or 0), shown.out, shown.err

    return run


@pytest.mark.parametrize("group", [(), ("bench",), ("data",), ("measure",)])
def test_no_sentence_of_the_list_of_commands_is_cut(moe_dist: Any, group: tuple[str, ...]) -> None:
    code, out, _ = moe_dist(*group, "--help")
    listed = out.split("Commands:")[1]
    assert code == 0
    assert listed.strip()
    assert "..." not in listed


def test_help_and_version(moe_dist: Any) -> None:
    code, out, err = moe_dist("--help")
    assert (code, err) == (0, "")
    commands = (
        "train",
        "launch",
        "config",
        "bench",
        "topology",
        "doctor",
        "measure",
        "study",
        "plan",
        "simulate",
        "report",
        "eval",
        "reproduce",
    )
    for command in commands:
        assert command in out
    assert moe_dist("--version") == (0, f"moe-dist {__version__}\n", "")


def test_it_runs_as_a_module_too() -> None:
    words = [sys.executable, "-m", "moe_dist", "--version"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == f"moe-dist {__version__}\n"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "Missing command"),
        (["frob"], "'frob'"),
        (["train"], "CONFIG"),
        (["bench"], "Missing command"),
        (["bench", "layer", "--peers", "deepspeed"], "--peers needs --ranks"),
        (["bench", "layer", "--ranks", "2", "--peers", "tutel"], "peer 'tutel' is unknown: use deepspeed or megatron"),
        (["bench", "layer", "--ranks", "3"], "experts=32 cannot be divided over 3 ranks"),
        (["bench", "layer", "--ranks", "2", "--also-backend", "masked"], "--also-backend does not go with --ranks"),
        (["bench", "growth", "--experts", "32", "--experts", "16"], "experts=32,16 must grow"),
        (["bench", "step", "CONFIG", "--kind", "sparse"], "--kind sparse: use clustered, standard, dense"),
        (["launch", "--ranks", "x", "CONFIG"], "--ranks must be a whole number (see moe-dist launch --help)"),
        (["launch", "--ranks", "0", "CONFIG"], "--ranks 0"),
        (
            ["launch", "--ranks", "3", "CONFIG"],
            "global_batch_size=32 is not divisible by 3 ranks: 30 or 33 would be",
        ),
        (["launch", "--launcher", "pbs", "CONFIG"], "'pbs'"),
        (["eval"], "RUN"),
        (
            ["eval", "RUN", "--task", "squad"],
            "--task squad: give held-out, wikitext, glue, glue:TASK,TASK of cola",
        ),
        (["eval", "RUN", "seed=4"], "'seed=4': an evaluation takes the model as it was trained"),
        (["eval", "RUN", "--ranks", "2", "--launcher", "slurm"], "submit `sbatch slurm/eval.sbatch RUN ...`"),
        (["reproduce", "--kind", "magic"], "--kind magic: use dense, standard-aux"),
        (["reproduce", "--text", "one.txt"], "--text 'one.txt': write stdlib, packages, hub, or TRAIN,VALIDATION"),
        (["launch", "--frob", "CONFIG"], "--frob"),
        (["launch", "--launcher-args", '"x', "CONFIG"], "--launcher-args '\"x': No closing quotation"),
        (["launch", "--port", "65536", "CONFIG"], "--port"),
        (["doctor", "--port", "0"], "--port"),
        (["launch", "--nodes", "2", "CONFIG"], "--nodes 2 needs --hostfile"),
        (["launch", "--hostfile", "/nowhere", "CONFIG"], "--hostfile /nowhere: cannot be read"),
        (["topology", "CONFIG", "--nodes", "3", "--ranks", "4"], "4 ranks cannot be divided over --nodes 3"),
        (["doctor", "--ranks", "0"], "--ranks 0"),
        (["doctor", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["launch", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["config", "CONFIG", "moe.expert=3"], "did you mean 'moe.experts'?"),
        (["config", "CONFIG", "train.lr=3"], "did you mean 'optimizer.learning_rate'?"),
        (["config", "CONFIG", "--ranks", "5"], "divisible by 5 ranks: 30 or 35 would be"),
        (["train", "CONFIG", "moe.top_k=99"], "moe.top_k=99"),
        (["train", "CONFIG", "--json", "/nowhere/at/all.json"], "--json /nowhere/at/all.json"),
        (["launch", "CONFIG", "--json", "/"], "--json /"),
        (["report"], "RUN"),
        (["report", "RUN", "-o", "/nowhere/at/all.html"], "--output /nowhere/at/all.html: cannot be written"),
        (["generate", "/", "--prompt", ""], "--prompt '' holds no text to continue"),
        (["generate", "/", "--prompt", "a", "--max-tokens", "0"], "--max-tokens must be >= 1 (see moe-dist generate"),
        (["import", "/", "-o", "imported"], "/ holds no config.json: give the folder of a Hugging Face model"),
        (["measure", "traffic", "--kind", "sparse", "CONFIG"], "--kind sparse: use clustered"),
        (["measure", "traffic", "--ranks", "3", "CONFIG"], "divisible by 3 ranks"),
        (["plan", "CONFIG", "--gpu", "h1000"], "'h1000'"),
        (["plan", "CONFIG", "--nodes", "3"], "train.global_batch_size=32 is not divisible by 24 GPUs"),
        (["simulate", "CONFIG", "--trace", "/nowhere"], "--trace /nowhere"),
        (["study", "CONFIG", "--axis", "ranks"], "write NAME=VALUE"),
        (["study", "CONFIG", "--mode", "odd"], "'odd'"),
        (["report", "/nowhere"], "/nowhere: is no run folder"),
        (["bench", "layer", "--json", "/nowhere/at/all.json"], "--json /nowhere/at/all.json"),
    ],
)
def test_refusals_are_one_line_and_exit_2(moe_dist: Any, config: str, words: list[str], part: str) -> None:
    code, out, err = moe_dist(*[config if word == "CONFIG" else word for word in words])
    assert (code, out) == (2, "")
    assert err.startswith("moe-dist: error: ")
    assert err.count("\n") == 1
    assert part in err


@pytest.mark.parametrize(
    "words",
    [
        ["doctor"],
        ["doctor", "CONFIG", "--nodes", "2", "--ranks", "2"],
        ["measure", "traffic", "CONFIG", "--ranks", "2"],
        ["bench", "layer", "--ranks", "2"],
        ["bench", "step", "CONFIG", "--ranks", "2"],
    ],
)
def test_slurm_is_given_no_training_in_place_of_what_was_asked(
    moe_dist: Any, config: str, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    def run(command: list[str], **_: object) -> SimpleNamespace:
        started.append(command)
        return SimpleNamespace(returncode=0)

    started: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(runners, "_installed", list)  # SLURM itself may be missing here
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    given = [*[config if word == "CONFIG" else word for word in words], "--launcher", "slurm"]
    code, out, err = moe_dist(*given)
    assert (code, out, started) == (2, "", [])
    assert err.startswith("moe-dist: error: --launcher slurm submits training alone: run this command inside")
    assert err.count("\n") == 1
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert moe_dist(*given)[0] == 0
    assert started[0][0] == "srun"
    assert started[0][started[0].index("--task") + 1] != "train"


def test_config_prints_yaml_that_loads_again(moe_dist: Any, config: str, tmp_path: Path) -> None:
    code, out, _ = moe_dist("config", config, "train.steps=50", "--ranks", "4")
    (tmp_path / "resolved.yaml").write_text(out)
    assert code == 0
    sizes = ["world.data=1", "world.cluster=4"]
    assert load_config(tmp_path / "resolved.yaml") == load_config(config, ["train.steps=50", *sizes])


def test_config_lists_what_a_run_lacks(moe_dist: Any, config: str, tmp_path: Path) -> None:
    words = [f"runs_dir={tmp_path}", f"corpus.cache_dir={tmp_path}"]
    assert moe_dist("config", config, *words, "--check") == (0, f"{config}: ready to start\n", "")
    code, out, _ = moe_dist("config", config, *words, "corpus.paths=none.txt", "checkpoint.init=/nowhere", "--check")
    assert (code, len(out.splitlines())) == (2, 2)


def test_launch_shows_its_command(moe_dist: Any, config: str) -> None:
    code, out, err = moe_dist("launch", "--ranks", "2", "--dry-run", config, "seed=4")
    assert (code, err) == (0, "")
    assert "deepspeed.launcher.runner" in out
    assert out.endswith(f"launch/rank.py {config} seed=4\n")


TWO_SHARDS = ["world.shard=2", "world.shard_mode=experts", "moe.clusters=2", "moe.experts=8"]


def test_topology_says_what_stays_inside_nodes(moe_dist: Any, config: str, tmp_path: Path) -> None:
    code, out, _ = moe_dist("topology", config, "--nodes", "2", "--ranks", "4", *TWO_SHARDS)
    assert code == 0
    assert "4 ranks = data 1 x cluster 2 x shard 2, on 2 node(s)" in out
    assert "1 2 0 1 0 cluster 1: experts 4-5" in [" ".join(line.split()) for line in out.splitlines()]
    assert re.search(r"stage two: .* 2 of 2 +none +0 of 2", out)
    assert "stage two never leaves one" in out
    (tmp_path / "hosts").write_text("a slots=3\nb slots=1\n")
    code, out, _ = moe_dist("topology", config, "--hostfile", str(tmp_path / "hosts"), *TWO_SHARDS)
    assert "warning: 1 cluster group(s) lie across nodes" in out
    assert "make the ranks of a node (1, 3) a multiple of world.shard=2" in out


@pytest.mark.parametrize(("kind", "part"), [("standard", "experts 8-15"), ("dense", "the whole layer")])
def test_topology_of_the_baselines(moe_dist: Any, config: str, kind: str, part: str) -> None:
    words = [f"moe.kind={kind}", "moe.experts=16", "moe.balance=none", "world.cluster=2" if kind == "standard" else ""]
    code, out, err = moe_dist("topology", config, "--ranks", "2", *filter(None, words))
    assert (code, err) == (0, "")
    assert part in out
    assert "stage" not in out


def test_doctor_asks_its_launcher_for_ranks(moe_dist: Any, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Job] = []

    def launch(job: Job) -> int:
        jobs.append(job)
        return 5

    monkeypatch.setattr(runners, "launch", launch)
    assert moe_dist("doctor")[0] == 5
    assert moe_dist("doctor", config, "seed=1", "--ranks", "4", "--launcher", "torchrun")[0] == 5
    assert [(job.launcher, job.ranks, job.words) for job in jobs] == [
        (Launcher.LOCAL, 2, ()),
        (Launcher.TORCHRUN, 4, (config, "seed=1")),
    ]
    assert {job.task for job in jobs} == {"doctor"}


def test_launch_passes_on_the_exit_code_and_the_json_file(
    moe_dist: Any, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Job] = []

    def launch(job: Job) -> int:
        jobs.append(job)
        return 137

    monkeypatch.setattr(runners, "launch", launch)
    target = tmp_path / "a file: with odd name.json"
    code, _, _ = moe_dist("launch", "--launcher", "torchrun", "--json", str(target), config)
    assert code == 137
    assert jobs[0].launcher is Launcher.TORCHRUN
    assert load_config(jobs[0].words[0], jobs[0].words[1:]).summary_copy == str(target)


def test_train_runs_the_entry_script(moe_dist: Any, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[str]]] = []

    def run_rank(path: str, words: list[str]) -> int:
        calls.append((path, list(words)))
        return 7

    monkeypatch.setattr(training, "run_rank", run_rank)
    assert moe_dist("train", config, "seed=1", "seed=2")[0] == 7
    assert calls == [(config, ["seed=1", "seed=2"])]


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        (TrainingError("step 3: loss is nan"), 1, "moe-dist: error: step 3: loss is nan"),
        (KeyboardInterrupt(), 130, ""),
        (ValueError("ours"), 1, "moe-dist: error: ValueError: ours"),
    ],
)
def test_errors_end_in_one_line(
    moe_dist: Any, config: str, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, last: str
) -> None:
    def fail(*_: object) -> RunConfig:
        raise error

    monkeypatch.setattr(training, "load_config", fail)
    found, _, err = moe_dist("config", config)
    assert found == code
    assert (err.splitlines() or [""])[-1] == last
    assert ("Traceback" in err) == isinstance(error, ValueError)


def test_bench_layer_takes_what_is_given_and_writes_json(
    moe_dist: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs: list[LayerBenchSpec] = []

    def run(spec: LayerBenchSpec) -> SimpleNamespace:
        specs.append(spec)
        return SimpleNamespace(to_dict=lambda: {"ratio": float("nan")})

    bench = ModuleType("moe_dist.benchmarks.layer.local")
    vars(bench).update(
        run_layer_bench=run,
        render=lambda result, console: console.print("a table"),
    )
    monkeypatch.setitem(sys.modules, bench.__name__, bench)
    monkeypatch.setattr("moe_dist.benchmarks.layer.local", bench, raising=False)
    target = tmp_path / "bench.json"
    words = [
        "--tokens",
        "64",
        "--top-k",
        "2",
        "--top-k",
        "4",
        "--dtype",
        "float32",
        "--no-vectors",
        "--backend",
        "masked",
    ]
    code, out, _ = moe_dist("bench", "layer", *words, "--json", str(target))
    assert (code, out) == (0, "a table\n")
    assert specs == [LayerBenchSpec(tokens=64, top_k=(2, 4), dtypes=("float32",), vectors=False, backend="masked")]
    assert json.loads(target.read_text()) == {"ratio": None}


@pytest.mark.parametrize(
    "words", [["plan", "--skew", "inf"], ["simulate", "--oversubscription", "inf"], ["simulate", "--resident", "nan"]]
)
def test_infinite_options_are_refused(moe_dist: Any, config: str, words: list[str]) -> None:
    command, *options = words
    code, _, error = moe_dist(command, config, *options)
    assert code == 2
    assert options[0] in error
    assert error.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no Linux")
def test_a_full_standard_output_is_one_line(config: str) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "moe_dist", "config", config]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "moe-dist: error: standard output cannot be written: No space left on device\n"
