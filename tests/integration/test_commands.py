"""The commands as users type them: real launchers, real ranks, real text; each in a process of its own."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moe_dist.metrics import missing_keys
from moe_dist.metrics.reference import undefined

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "configs" / "test" / "smoke.yaml")
BIN = Path(sys.executable).parent
LIMIT_SECONDS = 150

pytestmark = [pytest.mark.slow, pytest.mark.timeout(170)]


def _words(folder: Path, *more: str) -> list[str]:
    return [SMOKE, f"runs_dir={folder}/runs", f"corpus.cache_dir={folder}/cache", *more]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )


def _summary(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "runs" / "smoke" / "summary.json").read_text())
    assert missing_keys(summary) == []
    assert undefined("summary.json", summary) == []
    for file in ("metrics.jsonl", "load.jsonl"):
        for line in (folder / "runs" / "smoke" / file).read_text().splitlines():
            assert undefined(file, json.loads(line)) == []
    return summary


DEMO_IN_SHORT = [
    "name=smoke", "train.steps=4", "train.warmup_steps=1", "train.eval_sequences=8", "corpus.max_bytes=600000",
    "tokenizer.vocab_size=512", "recluster.start=2", "recluster.period=2",
]  # fmt: skip


@pytest.mark.parametrize(
    ("launcher", "ranks", "config", "more"),
    [("deepspeed", 4, str(ROOT / "configs" / "experiment" / "demo.yaml"), DEMO_IN_SHORT), ("torchrun", 2, SMOKE, [])],
    ids=["demo on deepspeed", "torchrun"],
)
def test_launch_trains_and_shows_its_summary(
    tmp_path: Path, launcher: str, ranks: int, config: str, more: list[str]
) -> None:
    figures = tmp_path / "figures.json"
    launch = [str(BIN / "moe-dist"), "launch", "--launcher", launcher, "--ranks", str(ranks), "--json", str(figures)]
    done = _run([*launch, config, *_words(tmp_path, *more)[1:]])
    assert done.returncode == 0, done.stdout + done.stderr
    summary = _summary(tmp_path)
    assert json.loads(figures.read_text()) == summary
    assert summary["world"].items() >= {"data": 1, "cluster": ranks, "shard": 1, "replicas": 1}.items()
    assert summary["all_to_all"]["bytes"] > 0
    assert "perplexity" in done.stdout
    assert "Warning" not in done.stdout + done.stderr


def test_replicas_start_whatever_order_their_processes_keep_sets_in(tmp_path: Path) -> None:
    """Ranks of a real launcher have hash seeds of their own, and DeepSpeed sorts expert groups by a set of names."""
    launch = [str(BIN / "moe-dist"), "launch", "--ranks", "2", *_words(tmp_path, "world.data=2", "world.cluster=1")]
    for _ in range(2):
        done = _run([*launch, "world.timeout_seconds=60", "train.steps=3", "recluster.period=1", "recluster.start=1"])
        assert done.returncode == 0, done.stdout + done.stderr
    assert _summary(tmp_path)["world"].items() >= {"data": 2, "cluster": 1, "shard": 1, "replicas": 1}.items()


def test_traffic_is_measured_and_reported(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [str(BIN / "moe-dist"), "measure", "traffic", "--launcher", "torchrun", "--ranks", "2", "--steps", "1"]
    done = _run([*command, "--json", str(figures), *_words(tmp_path)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "least possible for its routing" in done.stdout
    found = json.loads(figures.read_text())
    assert found["clustered"]["bytes"] < found["standard"]["bytes"]
    page = tmp_path / "report.html"
    runs = sorted(map(str, (tmp_path / "runs").iterdir()))
    done = _run([str(BIN / "moe-dist"), "report", *runs, "-o", str(page)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traffic from rank to rank" in page.read_text()


def test_deepspeed_starts_the_entry_script_as_its_users_expect(tmp_path: Path) -> None:
    done = _run([str(BIN / "deepspeed"), "--num_gpus", "2", "launcher/train.py", *_words(tmp_path, "train.steps=3")])
    assert done.returncode == 0, done.stdout + done.stderr
    assert _summary(tmp_path)["steps"] == 3


def test_one_process_alone_learns(tmp_path: Path) -> None:
    words = ["train.steps=40", "optimizer.learning_rate=1e-2"]
    done = _run([str(BIN / "moe-dist"), "train", *_words(tmp_path, *words)])
    assert done.returncode == 0, done.stdout + done.stderr
    guessing = math.log(512)  # of the vocabulary, each piece as likely as another
    assert _summary(tmp_path)["validation"]["loss"] < 0.85 * guessing


def test_a_killed_rank_ends_the_job_and_is_named(tmp_path: Path) -> None:
    command = [str(BIN / "moe-dist"), "launch", "--ranks", "2", *_words(tmp_path, "train.steps=100000")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        metrics = tmp_path / "runs" / "smoke" / "metrics.jsonl"
        _wait_for(lambda: metrics.exists() and bool(metrics.read_text()))
        (victim,) = [pid for pid, environment in _descendants(job.pid) if environment.get("RANK") == "1"]
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        output, _ = job.communicate(timeout=30)
    assert time.monotonic() - killed < 30
    assert job.returncode not in (0, None)
    killed_rank = (
        r"moe-dist: rank 1 failed: process \d+ was killed( by signal 9 \(SIGKILL\))?"  # which not all kernels tell
    )
    assert re.fullmatch(killed_rank, output.strip().splitlines()[-1])
    assert [json.loads(line) for line in metrics.read_text().splitlines()], "the folder can be read"


def _wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline, "the job did not start to train"
        time.sleep(0.2)


def _descendants(root: int) -> list[tuple[int, dict[str, str]]]:
    """Processes below `root` that run the entry script, with their environments."""
    parents, found = {}, []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = int(stat.parent.name), stat.read_text().rpartition(")")[2].split()
            parents[pid] = int(rest[1])
        except OSError:
            continue  # it has just ended
    for pid in parents:
        above = pid
        while above in parents and above != root:
            above = parents[above]
        if above == root and pid != root:
            try:
                entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            is_rank = any(word.endswith("launch/rank.py") for word in words)
            if is_rank and "deepspeed.launcher" not in str(words):
                found.append((pid, dict(entry.split("=", 1) for entry in entries if "=" in entry)))
    return found


def _glue(folder: Path) -> Path:
    """Two tasks of a few rows."""
    for task, rows in {
        "cola": [{"sentence": f"sentence {n}", "label": n % 2} for n in range(8)],
        "stsb": [{"sentence1": f"a {n}", "sentence2": f"b {n}", "label": n / 2} for n in range(8)],
    }.items():
        (folder / task).mkdir(parents=True)
        for split in ("train", "validation"):
            (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_reproduction_in_miniature_and_an_evaluation_that_is_refused(tmp_path: Path) -> None:
    text, results = tmp_path / "text.txt", tmp_path / "results"
    text.write_text("A line of words that are held out .\n" * 20)
    command = [str(BIN / "moe-dist"), "reproduce", "--scale", "smoke", "--seeds", "1", "--folder", str(results)]
    command += ["--kind", "standard-aux", "--kind", "clustered-online", "--text", "stdlib", "--test-text", str(text)]
    command += ["--glue", str(_glue(tmp_path / "glue")), f"corpus.cache_dir={tmp_path}/cache"]
    done = _run(command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4/4 evaluation clustered-online seed 0: done; done" in done.stdout
    found = json.loads((results / "results.json").read_text())
    assert [row["kind"] for row in found["rows"]] == ["standard-aux", "clustered-online"]
    assert all({"loss", "word_perplexity", "glue", "active_work"} <= row["figures"].keys() for row in found["rows"])
    assert {path.name for path in results.glob("*.png")} >= {"loss-tokens.png", "membership-clustered-online.png"}
    again = _run(command)
    assert "0 parts to run" in again.stdout
    (tmp_path / "glue" / "cola" / "train.jsonl").write_text('{"sentence": "a"}\n')
    run = next((results / "runs").glob("*clustered-online*"))
    words = [str(run), "--task", "glue:cola", "--glue", str(tmp_path / "glue"), "--ranks", "2"]
    refused = _run([str(BIN / "moe-dist"), "eval", *words])
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "cola/train.jsonl: row 1 has no column 'label'; it has: sentence" in refused.stderr
    assert "Traceback" not in refused.stderr
