"""Entry script of every rank: `[--task NAME] [--options JSON] [CONFIG] [key=value ...] [--json FILE]`.

An invalid configuration is refused before torch is imported and before any process group is created.
"""

import os
import signal
import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # started by path: import from the repository, not from this folder's `train`, `faults`, ...
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from moe_dist.launch.rank_proxy import run_forked

    run_forked()  # before the imports below: the rank may run in a process that has them already

from moe_dist.config import RunConfig, load_config, resolve_batch, resolve_world
from moe_dist.errors import EXIT_STOPPED, ConfigError, LaunchError, file_error
from moe_dist.launch import environment, faults, rendezvous
from moe_dist.launch.files import with_summary, writable
from moe_dist.launch.options import from_json
from moe_dist.launch.preflight import require_ready
from moe_dist.launch.processes import end_now
from moe_dist.launch.tasks import TASKS, TRAIN, resolve

REFUSAL_SECONDS = 3.0


def run_rank(
    config_path: str | None, overrides: Sequence[str], task: str = TRAIN, options: object | None = None
) -> int:
    """Find this rank's place in the job, check the configuration and run a task.

    Args:
        config_path: None: the defaults, fitted to the number of ranks.
        task: name in `TASKS`.
        options: the task's options; None: it has none.

    Returns:
        The exit code; every error has been printed and recorded by then.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # kept until training installs its handler
    try:
        place = environment.discover(os.environ)
    except LaunchError as error:
        return faults.report(0, 1, error)
    if place.kind != "alone":
        faults.register(place.rank, end_with_parent=place.kind != "environment")
    if config_path is None:
        overrides = ["moe.kind=dense", f"train.global_batch_size={place.world_size}", *overrides]
    try:
        config = _accepted_config(place, config_path, overrides)
        environment.silence_library_warnings()
        if _perform(config, task, options):
            return _stopped(place)
    except KeyboardInterrupt:
        return _exit(place, _interrupted(place))
    except ConfigError as error:
        if place.local_rank:  # all refuse the same configuration: the first reports it, its launcher ends the others
            time.sleep(REFUSAL_SECONDS)
        return faults.report(place.rank, place.world_size, error)
    except Exception as error:
        known = file_error(error) if isinstance(error, OSError) else None
        return _exit(place, faults.report(place.rank, place.world_size, known or error))
    faults.mark_done(place.rank)
    return 0


def _perform(config: RunConfig, task: str, options: object | None) -> bool:
    """Run a task; return whether it stopped before its end because a signal asked for it."""
    function = resolve(TASKS[task].function)
    if task == TRAIN:
        return bool(function(config, _abort))
    return bool(function(config) if options is None else function(config, options))


def _accepted_config(
    place: environment.RankEnvironment, config_path: str | None, overrides: Sequence[str]
) -> RunConfig:
    config = load_config(config_path, overrides)
    resolve_world(config, place.world_size)
    resolve_batch(config, place.world_size)
    if config_path is not None and place.local_rank == 0:  # the launcher's check was of its own machine
        require_ready(config, place.local_world_size)
    rendezvous.resolve(place, os.environ)
    if place.rank == 0 and place.world_size > 1:
        print(rendezvous.describe(place, os.environ), flush=True)
    place.export(os.environ)
    if config.world.backend == "gloo":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks for a GPU when it is imported
    environment.prepare_process(os.environ, config.world.threads, place.local_world_size)
    return config


def _abort(error: Exception) -> None:
    """End a rank whose main thread hangs, from another thread."""
    os._exit(faults.report(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), error))


def _interrupted(place: environment.RankEnvironment) -> int:
    faults.mark_done(place.rank)
    if faults.supervised_folder() is not None:
        return 0  # a failure would make the launcher kill ranks that still close their files
    if place.rank == 0:
        print("moe-dist: interrupted", file=sys.stderr, flush=True)
    return faults.EXIT_INTERRUPTED


def _stopped(place: environment.RankEnvironment) -> int:
    """Record that a rank stopped as asked, with all others, and return the exit code."""
    faults.mark_done(place.rank, faults.STOPPED)
    others_would_be_killed = faults.supervised_folder() is not None or place.kind == "slurm"
    return 0 if others_would_be_killed else EXIT_STOPPED


def _exit(place: environment.RankEnvironment, code: int) -> int:
    """End a rank of several at once: a normal exit can wait for ever on ranks that have already ended."""
    if place.world_size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def main(arguments: Sequence[str] | None = None, task: str = TRAIN) -> int:
    """Run a rank as the arguments after the script's name say; `--local_rank` is DeepSpeed's and redundant."""
    parser = ArgumentParser(prog="python -m moe_dist.launch.rank", description="Run one rank of a job.")
    parser.add_argument("words", nargs="*", metavar="[CONFIG] [key=value ...]", help="YAML file, and overrides")
    parser.add_argument("--task", choices=TASKS, default=task)
    parser.add_argument("--options", metavar="JSON", help="options of the task")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the summary of a training run here")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by the launcher")
    given = parser.parse_intermixed_args(arguments)
    chosen, words = TASKS[given.task], given.words
    has_config = chosen.needs_config or bool(words and "=" not in words[0])
    if has_config and not words:
        parser.error("CONFIG is missing: give a YAML file, such as configs/experiment/demo.yaml")
    try:
        overrides = with_summary(words[has_config:], given.json and writable(given.json))
        options = from_json(resolve(chosen.options), given.options or "{}") if chosen.options else None
    except LaunchError as error:
        return faults.report(0, 1, error)
    return run_rank(words[0] if has_config else None, overrides, given.task, options)


if __name__ == "__main__":
    from moe_dist.launch import rank  # by its name, so that the watchdog's guard process finds `_abort`

    end_now(rank.main())
