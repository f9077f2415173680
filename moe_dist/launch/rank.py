"""The entry script of every rank: `deepspeed --num_gpus 4 launcher/train.py CONFIG [key=value ...]`, or torchrun's.

A configuration that cannot work is refused before torch is imported and before any process group forms.
"""

import json
import os
import signal
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":  # started by path: import from the repository, not from this folder's `train`, `faults`, ...
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from moe_dist.config import RunConfig, load_config, resolve_batch, resolve_world
from moe_dist.errors import EXIT_STOPPED, ConfigError, LaunchError
from moe_dist.launch import environment, faults
from moe_dist.launch import rendezvous as meeting

SPEAK_LATER_SECONDS = 3.0


def run_rank(config_path: str | None, overrides: Sequence[str], work: Callable[[RunConfig], bool] | None = None) -> int:
    """Does one rank's whole work: finds its place, checks the configuration, trains.

    Args:
        work: what to do instead of training; true: stopped before its end because it was asked to.

    Returns:
        The exit code; whatever went wrong has been printed and recorded by then.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # kept until training can hear it
    try:
        place = environment.discover(os.environ)
    except LaunchError as error:
        return faults.report(0, 1, error)
    if place.kind != "alone":
        faults.register(place.rank, leave_with_parent=place.kind != "environment")
    try:
        config = _accepted_config(place, config_path, overrides)
        environment.hush_libraries()
        if (work or _train)(config):
            return _stopped(place)
    except KeyboardInterrupt:
        return _leave(place, _interrupted(place))
    except ConfigError as error:
        _speak_later(place)
        return faults.report(place.rank, place.world_size, error)
    except Exception as error:
        return _leave(place, faults.report(place.rank, place.world_size, error))
    faults.mark_done(place.rank)
    return 0


def fitting_any_ranks(overrides: Sequence[str]) -> list[str]:
    """The overrides, after what makes the defaults fit however many ranks there are: for work without a CONFIG."""
    try:
        ranks = environment.discover(os.environ).world_size
    except LaunchError:
        ranks = 1  # run_rank says it
    return ["moe.kind=dense", f"train.global_batch_size={ranks}", *overrides]


def with_json(overrides: Sequence[str], file: Path | None) -> list[str]:
    """The overrides, and one more for `--json FILE`: the file also receives the run's summary.

    Raises:
        LaunchError: the file cannot be written; said now rather than after the work.
    """
    return [*overrides] if file is None else [*overrides, f"summary_copy={json.dumps(writable(file))}"]


def writable(file: Path, option: str = "--json") -> str:
    """The absolute path of a file that can be written, or a LaunchError that names the option.

    It will be replaced as a whole, so that what is there must be a file: no device, and no pipe.
    """
    target = file.absolute()
    replaceable = target.is_file() or not target.exists()
    if not (replaceable and target.parent.is_dir() and os.access(target.parent, os.W_OK)):
        raise LaunchError(f"{option} {file}: cannot be written: give a file in a folder that exists")
    return str(target)


def require_run(run: Path) -> None:
    """Refuses a run that is not there, before anything is imported that takes seconds.

    Raises:
        LaunchError: there is neither a folder nor a file.
    """
    if not run.exists():
        raise LaunchError(
            f"{run} does not exist: give the folder of a run that has ended or saved a checkpoint, such as runs/NAME"
        )


def _accepted_config(
    place: environment.RankEnvironment, config_path: str | None, overrides: Sequence[str]
) -> RunConfig:
    config = load_config(config_path, overrides)
    resolve_world(config, place.world_size)
    resolve_batch(config, place.world_size)
    meeting.resolve(place, os.environ)
    if place.rank == 0 and place.world_size > 1:
        print(meeting.describe(place, os.environ), flush=True)
    place.export(os.environ)
    if config.world.backend == "gloo":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks for a GPU when it is imported
    environment.prepare_process(os.environ, config.world.threads, place.local_world_size)
    return config


def _train(config: RunConfig) -> bool:
    """Trains; returns whether it stopped before its end because it was asked to."""
    from moe_dist.training.trainer import train  # here, since it loads torch

    return train(config, _give_up)


def _give_up(error: Exception) -> None:
    """Ends a rank whose main thread hangs, from another thread."""
    os._exit(faults.report(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), error))


def _speak_later(place: environment.RankEnvironment) -> None:
    """All ranks refuse the same configuration: the first one says so, its launcher then ends the others."""
    if place.local_rank:
        time.sleep(SPEAK_LATER_SECONDS)


def _interrupted(place: environment.RankEnvironment) -> int:
    faults.mark_done(place.rank)
    if faults.supervised_folder() is not None:
        return 0  # a failure would make the launcher kill ranks that are still closing their files
    if place.rank == 0:
        print("moe-dist: interrupted", file=sys.stderr, flush=True)
    return faults.EXIT_INTERRUPTED


def _stopped(place: environment.RankEnvironment) -> int:
    """A rank that stopped as asked, with all others: whoever started the job may start it again."""
    faults.mark_done(place.rank, faults.STOPPED)
    others_would_be_killed = faults.supervised_folder() is not None or place.kind == "slurm"
    return 0 if others_would_be_killed else EXIT_STOPPED


def _leave(place: environment.RankEnvironment, code: int) -> int:
    """Ends a rank of several at once: a normal exit can wait for ever on peers that are already gone."""
    if place.world_size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the words after the script's name; `--local_rank` is DeepSpeed's, which the environment tells as well."""
    parser = ArgumentParser(prog="launcher/train.py", description="One rank of a training run.")
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the run's summary here")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by the launcher")
    words = parser.parse_intermixed_args(arguments)
    try:
        overrides = with_json(words.overrides, words.json)
    except LaunchError as error:
        return faults.report(0, 1, error)
    return run_rank(words.config, overrides)


if __name__ == "__main__":
    sys.exit(main())
