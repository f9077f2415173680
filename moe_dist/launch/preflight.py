"""Checks of what a run needs from this machine, before any rank starts: files, folders, free space, devices.

The same code answers for `launch`, `train` and `config --check`. It imports no torch, and opens nothing large.
"""

import os
import shutil
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from moe_dist.config import RunConfig
from moe_dist.config.byte_sizes import FLOAT32, MOMENTS
from moe_dist.config.machine import has_gpu
from moe_dist.errors import ConfigError, LaunchError
from moe_dist.launch.environment import SHARED_GPU, visible_gpu_count
from moe_dist.launch.hostfile import THIS_MACHINE
from moe_dist.launch.preflight_hub import hub_problems
from moe_dist.launch.preflight_text import text_problems
from moe_dist.launch.preflight_weights import tokenizer_problems, weight_problems

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
        *hub_problems(config),
        *tokenizer_problems(config),
        *weight_problems(config),
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
    if not place.is_dir():
        return
    size, _, free = shutil.disk_usage(place)
    if not size:  # such as /proc
        yield f"runs_dir={config.runs_dir} cannot be written: {place} is no place for files; give another folder"
    elif free < needed:
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
    moments = MOMENTS if config.optimizer.kind == "adamw" else MOMENTS // 2
    return parameters * ((FLOAT32 + moments) if saves_state else FLOAT32 * checkpoint.save_final)


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
    if config.model.attention == "flex" and (backend == "gloo" or not has_gpu()):
        yield "model.attention=flex trains on GPUs only, and these ranks use the CPU: set it to sdpa"
    gpus = visible_gpu_count(os.environ) if backend != "gloo" else 0
    if 0 < gpus < ranks_here and os.environ.get(SHARED_GPU) != "1":
        listed = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "")
        what = f"the {gpus} GPUs of CUDA_VISIBLE_DEVICES={listed}" if listed else f"the {gpus} GPUs of this machine"
        yield f"{ranks_here} ranks are more than {what}: start fewer, or set world.backend=gloo to use the CPU"
