"""Training runs on a GPU: precisions, ZeRO stages, offload, several processes on one GPU, and a profile of a step."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Report = Callable[[str, str], None]
SMOKE = Path(__file__).parents[2] / "configs" / "test" / "smoke.yaml"
COMMON = ["tensorboard=false", "train.steps=6", "checkpoint.every=0"]
PROFILED = [
    "model.layers=8", "model.hidden_size=1024", "model.heads=16", "model.sequence_length=1024", "moe.experts=64",
    "moe.clusters=8", "moe.expert_hidden=2048", "moe.rank=16", "train.global_batch_size=16", "train.precision=bfloat16",
]  # fmt: skip


def _train(folder: Path, name: str, words: list[str], ranks: int = 1, **variables: str) -> dict[str, Any]:
    """The summary of a run, with the loss of each step as `losses`; fails with all of its output."""
    command = [sys.executable, "-m", "moe_dist", "launch", "--ranks", str(ranks), str(SMOKE), *COMMON]
    command += [f"name={name}", f"runs_dir={folder}", f"corpus.cache_dir={folder}/cache", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env={**os.environ, **variables})
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    summary: dict[str, Any] = json.loads((folder / name / "summary.json").read_text())
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    summary["losses"] = [entry["loss"] for line in lines if "loss" in (entry := json.loads(line))]
    return summary


def _backend(on_gpu: bool) -> str:
    return "world.backend=auto" if on_gpu else "world.backend=gloo"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of text for all runs."""
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def reference(folder: Path) -> list[float]:
    """Losses on the CPU in float32."""
    losses: list[float] = _train(folder, "cpu", ["world.backend=gloo"])["losses"]
    return losses


def test_flex_attention_trains_like_masks_in_memory(folder: Path, on_gpu: bool, report: Report) -> None:
    if not on_gpu:
        pytest.skip("FlexAttention has no backward pass on a CPU")
    words = [_backend(on_gpu), "train.precision=float32", "corpus.document_mask=true", "model.window=20"]
    plain, flex = (_train(folder, name, [*words, f"model.attention={name}"])["losses"] for name in ("sdpa", "flex"))
    report("flex", f"losses with masks in memory {plain}, by FlexAttention {flex}")
    assert flex == pytest.approx(plain, rel=2e-3)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(("precision", "near"), [("float32", 2e-3), ("bfloat16", 0.05), ("float16", 0.05)])
def test_losses_are_those_of_the_cpu(
    folder: Path, reference: list[float], on_gpu: bool, report: Report, precision: str, near: float, stage: int
) -> None:
    if not on_gpu and (stage, precision) != (1, "float32"):
        pytest.skip("slow on a CPU, and tested elsewhere")
    words = [f"train.precision={precision}", f"world.zero_stage={stage}", _backend(on_gpu)]
    summary = _train(folder, f"{precision}-{stage}", words)
    peak = summary["memory"]["peak_device_bytes"]
    report("training", f"{precision} ZeRO {stage}: losses {summary['losses']} (CPU {reference}), peak {peak:,} bytes")
    assert summary["losses"] == pytest.approx(reference, abs=near)
    assert bool(peak) == on_gpu


def test_offload_changes_no_bit(folder: Path, on_gpu: bool, report: Report) -> None:
    """Three times, since a race between streams need not show at once."""
    words = ["train.precision=float32", _backend(on_gpu), "moe.backend=sorted"]
    without = _train(folder, "kept", words)
    for attempt in range(3 if on_gpu else 1):
        offload = ["memory.offload=true", "memory.device_budget_ratio=0.5"]
        summary = _train(folder, f"offload-{attempt}", [*words, *offload])
        report("offload", f"{attempt}: {summary['losses']} beside {without['losses']}; {summary['memory']['offload']}")
        assert summary["losses"] == without["losses"]


@pytest.mark.parametrize("words", [["world.cluster=2"], ["world.cluster=1"]], ids=["all-to-all", "replicas"])
def test_two_processes_share_a_gpu(
    folder: Path, reference: list[float], on_gpu: bool, report: Report, words: list[str]
) -> None:
    """NCCL refuses two ranks on one GPU, so they talk by gloo over the GPU's tensors."""
    if on_gpu and torch.cuda.device_count() > 1:
        pytest.skip("every rank has a GPU of its own here")
    summary = _train(folder, f"shared-{words[0][-1]}", [*words, "moe.wire_dtype=float32"], 2, MOE_DIST_SHARED_GPU="1")
    report("training", f"two processes, {words}: {summary['losses']}, CPU {reference}")
    assert summary["losses"] == pytest.approx(reference, abs=2e-3)


@pytest.mark.parametrize("words", [["world.cluster=2"], ["world.tensor=2"], ["world.pipeline=2"]], ids=str)
def test_two_gpus_train_by_nccl(folder: Path, reference: list[float], on_gpu: bool, words: list[str]) -> None:
    if not on_gpu or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    summary = _train(folder, f"nccl-{words[0]}", [*words, "moe.wire_dtype=float32"], 2)
    assert summary["losses"] == pytest.approx(reference, abs=2e-3)


def test_a_step_is_profiled(folder: Path, on_gpu: bool, report: Report) -> None:
    """Kernels by time, the device's idle share, and what the host did in the longest gaps."""
    words = [word for word in PROFILED if on_gpu] + [_backend(on_gpu)]
    script = Path(__file__).with_name("profile_step.py")
    command = [
        sys.executable,
        str(script),
        str(SMOKE),
        f"runs_dir={folder}",
        f"corpus.cache_dir={folder}/cache",
        *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    report("profile", done.stdout if done.returncode == 0 else f"{done.stdout}\n{done.stderr}")
    assert done.returncode == 0, done.stderr
