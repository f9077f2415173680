"""The entry script of every rank of `moe-dist bench ... --ranks`: `launcher/bench.py NAME SPEC [key=value ...]`."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # started by path: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from moe_dist.config import RunConfig
from moe_dist.launch.rank import fitting_any_ranks, run_rank


def bench_rank(name: str, spec: str, config_path: str | None, overrides: Sequence[str]) -> int:
    """Does one rank's whole work and returns its exit code.

    Args:
        spec: what to measure, as JSON.
        config_path: None: a bench that needs no configuration, but takes keys of `world`.
    """

    def bench(config: RunConfig) -> bool:
        from moe_dist.benchmarks.on_ranks import run_bench  # here, since it loads torch

        run_bench(name, spec, config)
        return False

    return run_rank(config_path, overrides if config_path else fitting_any_ranks(overrides), bench)


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the words after the script's name."""
    parser = ArgumentParser(prog="launcher/bench.py", description="One rank of a bench.")
    parser.add_argument("name")
    parser.add_argument("spec", help="JSON")
    parser.add_argument("--config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by the launcher")
    words = parser.parse_intermixed_args(arguments)
    return bench_rank(words.name, words.spec, words.config, words.overrides)


if __name__ == "__main__":
    sys.exit(main())
