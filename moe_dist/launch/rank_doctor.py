"""The entry script of every rank of `moe-dist doctor`: `srun ... launcher/doctor.py [CONFIG [key=value ...]]`."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # started by path: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from moe_dist.config import RunConfig
from moe_dist.launch.rank import fitting_any_ranks, run_rank


def examine_rank(config_path: str | None, overrides: Sequence[str]) -> int:
    """Does one rank's part of all checks; the exit code is 1 where one of them failed.

    Args:
        config_path: None: no configuration in particular, but one that any number of ranks fits.
    """

    def examine(config: RunConfig) -> bool:
        from moe_dist.doctor.checks import examine as really  # here, since it loads torch

        really(config)
        return False

    return run_rank(config_path, overrides if config_path else fitting_any_ranks(overrides), examine)


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the words after the script's name."""
    parser = ArgumentParser(prog="launcher/doctor.py", description="One rank of an examination of the environment.")
    parser.add_argument("config", nargs="?")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by the launcher")
    words = parser.parse_intermixed_args(arguments)
    return examine_rank(words.config, words.overrides)


if __name__ == "__main__":
    sys.exit(main())
