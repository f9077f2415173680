"""Start of a run in a few lines: model, ranks, devices, text, folder; and a warning where GPUs are not used."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from moe_dist.config.machine import processor_name, unused_gpus
from moe_dist.launch.environment import COMMAND

if TYPE_CHECKING:
    from moe_dist.training.trainer import Trainer


def banner(trainer: "Trainer") -> str:
    """Return the lines about model, ranks, devices, text and folder."""
    config, moe, data = trainer.config, trainer.config.moe, trainer.data
    warmup = f", after {config.standard_steps} steps of standard experts" if config.standard_steps else ""
    nodes = len(set(trainer.ledger.links.node_of_rank))
    rows = {
        "model": f"{config.model.layers} layers of {config.model.hidden_size}, {moe.layer_kind.describe(moe)}{warmup}",
        "ranks": f"{trainer.process.ranks} on {nodes} node(s): {trainer.shape}",
        "devices": f"{device_words(trainer.process.device)}; {config.train.precision}, {dist.get_backend()}, "
        f"ZeRO {config.world.zero_stage}",
        "text": f"{data.tokens:,} tokens (corpus.kind={config.corpus.kind}), {data.vocab_size} pieces",
        "folder": _folder(trainer),
    }
    return "\n".join([config.name, *(f"  {name:<8} {words}" for name, words in rows.items())])


def device_words(device: torch.device) -> str:
    """Return the name of a rank's device, and on a CPU its threads."""
    if device.type == "cuda":
        return f"a GPU for each rank, {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"CPU, {processor_name()}, {threads} thread{'s' if threads > 1 else ''} for each rank"


def _folder(trainer: "Trainer") -> str:
    """Return the run's folder, with a hint where an earlier run has the name and has not finished."""
    folder, name = trainer.recorder.folder, trainer.config.name
    if folder is None:
        return "none"
    if folder.name == name or trainer.steps_done:
        return f"{folder}/"
    taken = f"{folder}/, since {name} is taken by an earlier run"
    if (folder.with_name(name) / "summary.json").is_file():
        return taken
    return f"{taken}; checkpoint.resume=auto would continue that one"


def device_warning(trainer: "Trainer") -> str | None:
    """Return a warning if this rank uses the CPU though it has GPUs and the user has not asked for the CPU."""
    if trainer.process.device.type != "cpu" or trainer.config.world.backend == "gloo":
        return None
    why = unused_gpus()
    if why is None:
        return None
    return f"THE RANKS USE THE CPU, though there are GPUs: {why}. Set world.backend=gloo if the CPU is meant"


def continuing_command(run: Path) -> str:
    """Return the command that resumes a run; without `moe-dist train` or `launch`, the words to add to one's own."""
    word = f"checkpoint.resume={shlex.quote(os.path.relpath(run))}"
    given = os.environ.get(COMMAND)
    if given is None:
        return f"the same command with {word}"
    kept = [one for one in shlex.split(given) if not one.startswith("checkpoint.resume=")]
    return f"{shlex.join(kept)} {word}"
