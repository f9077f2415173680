"""Checks of what a run needs from this machine, before any rank starts: files, folders, free space, devices.

The same code answers for `launch`, `train` and `config --check`. It imports no torch, and opens nothing large.
"""

import json
import os
import shutil
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from moe_dist.config import RunConfig
from moe_dist.config.initial_run import MANIFEST, TOKENIZER_JSON, TOKENIZER_MODEL
from moe_dist.config.machine import has_gpu
from moe_dist.config.sections.checkpoint import RESUME_WORDS
from moe_dist.errors import ConfigError, LaunchError
from moe_dist.launch.environment import SHARED_GPU, visible_gpu_count
from moe_dist.launch.hostfile import THIS_MACHINE
from moe_dist.launch.preflight_text import text_problems

FLOAT32, MOMENTS = 4, 8
"""Bytes of a weight, and of its two moments, in a checkpoint."""
OTHER_FILES = 10_000_000
"""Bytes that a run writes besides checkpoints: metrics, events, tokenizer."""


def require_ready(config: RunConfig, ranks_here: int | None) -> None:
    """Reject a run that would fail on this machine before its first step.

    Args:
        ranks_here: ranks on this machine; None: its devices are not used, or not known.

    Raises:
        ConfigError: names the first problem, and the number of others.
    """
    found = problems(config, ranks_here)
    if found:
        more = f" (and {len(found) - 1} more: `moe-dist config CONFIG --check` lists all)" if len(found) > 1 else ""
        raise ConfigError(found[0] + more)


def problems(config: RunConfig, ranks_here: int | None) -> list[str]:
    """Return a line for everything on this machine that the run cannot start with."""
    return [
        *text_problems(config),
        *_tokenizer_problems(config),
        *_weight_problems(config),
        *_folder_problems(config),
        *_package_problems(config),
        *([] if ranks_here is None else _device_problems(config, ranks_here)),
    ]


def require_free_port(host: str | None, port: int) -> None:
    """Reject a rendezvous port that another program listens on, if the host is this machine.

    Raises:
        LaunchError: it does.
    """
    if host not in (*THIS_MACHINE, socket.gethostname()):
        return
    with socket.socket() as probe:
        probe.settimeout(1)
        if probe.connect_ex((host or "localhost", port)) == 0:
            raise LaunchError(f"--port {port} of {host}: another program listens there: give another one")


def _tokenizer_problems(config: RunConfig) -> Iterator[str]:
    path = config.tokenizer.path
    if path is None:
        return
    hf = config.tokenizer.kind == "hf"
    folder, on_hub = Path(path), hf and path.count("/") == 1 and path[0] not in "/.~"
    if not hf and not (folder / TOKENIZER_MODEL).is_file():
        yield f"tokenizer.path={path} holds no {TOKENIZER_MODEL}: give the folder of a run, or set tokenizer.kind=hf"
    elif not folder.exists() and not on_hub:
        yield f"tokenizer.path={path} does not exist: give a folder with a {TOKENIZER_JSON}"
    elif hf and folder.is_dir() and not (folder / TOKENIZER_JSON).is_file():
        yield f"tokenizer.path={path} holds no {TOKENIZER_JSON}: give the folder of a Hugging Face tokenizer"


def _weight_problems(config: RunConfig) -> Iterator[str]:
    """Yield a line for every path to a run or checkpoint that holds none."""
    resume, given = config.checkpoint.resume, [("checkpoint.init", config.checkpoint.init)]
    if resume not in RESUME_WORDS:
        given.append(("checkpoint.resume", resume))
    for key, path in given:
        if path is None:
            continue
        folder = Path(path)
        if not folder.exists():
            yield f"{key}={path} does not exist: give the folder of a run or a checkpoint, such as runs/NAME"
        elif folder.is_dir() and (folder / "config.json").is_file() and not _holds_checkpoint(folder):
            yield (
                f"{key}={path} is a model of Hugging Face: make a run of it with `moe-dist import {path} -o RUN`, "
                f"then give {key}=RUN"
            )
        elif folder.is_dir() and not _holds_checkpoint(folder):
            yield f"{key}={path} holds no checkpoint: give the folder of a run that has saved one, or of a checkpoint"
        elif key == "checkpoint.resume" and _holds_weights_alone(folder):
            yield f"{key}={path} holds weights only: start a new run from it with checkpoint.init={path}"
    teacher = config.distill.teacher
    if teacher is not None and not Path(teacher).exists():
        yield f"distill.teacher={teacher} does not exist: give the folder of a run, or of stored predictions"


def _holds_checkpoint(folder: Path) -> bool:
    saved = folder / "checkpoints"
    return any((place / MANIFEST).is_file() for place in (folder, folder / "final")) or (
        saved.is_dir() and any(saved.glob("step-*"))
    )


def _holds_weights_alone(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["kind"] == "weights")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _folder_problems(config: RunConfig) -> Iterator[str]:
    """Yield a line for every folder that cannot be written, and for too little free space."""
    used = {"runs_dir": config.runs_dir, "corpus.cache_dir": config.corpus.cache_dir}
    if config.memory.offload and config.memory.directory is not None:
        used["memory.directory"] = config.memory.directory
    for key, path in used.items():
        place = existing_parent(Path(path))
        if not place.is_dir():
            yield f"{key}={path}: {place} is a file: give a folder"
        elif not os.access(place, os.W_OK | os.X_OK) or os.statvfs(place).f_flag & os.ST_RDONLY:
            yield f"{key}={path} cannot be written: {place} does not permit it; give another folder"
    place, needed = existing_parent(Path(config.runs_dir)), checkpoint_bytes(config) + OTHER_FILES
    if place.is_dir() and (free := shutil.disk_usage(place).free) < needed:
        yield (
            f"runs_dir={config.runs_dir} has {free / 1e9:.2f} GB free, and the run saves at least {needed / 1e9:.2f} "
            "GB: free space, or choose another runs_dir"
        )


def existing_parent(path: Path) -> Path:
    """Return the path itself, or its nearest parent that exists."""
    path = path.expanduser().absolute()
    return next((place for place in (path, *path.parents) if os.path.lexists(place)), path)


def checkpoint_bytes(config: RunConfig) -> int:
    """Return a lower bound of the bytes of a run's largest checkpoint: embeddings and feed-forward layers."""
    model, moe, checkpoint = config.model, config.moe, config.checkpoint
    layer = moe.layer_kind.parameters(model.hidden_size, moe, 1, 1)
    experts = 0 if config.precision.residuals == "packed" else layer.expert
    embeddings = config.tokenizer.vocab_size * model.hidden_size
    parameters = embeddings + config.moe_layers * (layer.dense + layer.base + experts)
    saves_state = 0 < checkpoint.every <= config.train.steps
    return parameters * ((FLOAT32 + MOMENTS) if saves_state else FLOAT32 * checkpoint.save_final)


def _package_problems(config: RunConfig) -> Iterator[str]:
    for package in ("wandb", "mlflow"):
        project = getattr(config, package)
        if project is not None and find_spec(package) is None:
            yield f"{package}={project} needs the package {package}: pip install 'moe-dist[{package}]'"


def _device_problems(config: RunConfig, ranks_here: int) -> Iterator[str]:
    backend = config.world.backend
    if backend == "nccl" and not has_gpu():
        yield "world.backend=nccl needs a CUDA GPU, and there is none here: use auto or gloo"
    elif backend == "nccl" and os.environ.get("DS_ACCELERATOR") == "cpu":
        yield "world.backend=nccl needs a CUDA GPU, but DS_ACCELERATOR=cpu is set: unset it, or use gloo"
    gpus = visible_gpu_count(os.environ) if backend != "gloo" else 0
    if 0 < gpus < ranks_here and os.environ.get(SHARED_GPU) != "1":
        listed = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "")
        what = f"the {gpus} GPUs of CUDA_VISIBLE_DEVICES={listed}" if listed else f"the {gpus} GPUs of this machine"
        yield f"{ranks_here} ranks are more than {what}: start fewer, or set world.backend=gloo to use the CPU"
