"""The entry script of every rank of `moe-dist measure`: `launcher/measure.py CONFIG [key=value ...] [options]`."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # started by path: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from moe_dist.config import RunConfig
from moe_dist.launch.rank import run_rank


@dataclass(frozen=True)
class TrafficOptions:
    """What `moe-dist measure traffic` was asked for, as words that each rank's script is given."""

    kinds: tuple[str, ...] = ()
    steps: int = 3
    warmup: int = 2
    profile: bool = False
    json_file: str | None = None

    def words(self) -> list[str]:
        """The options of this script; `parse` reads them back."""
        words = [f"--steps={self.steps}", f"--warmup={self.warmup}", *(f"--kind={kind}" for kind in self.kinds)]
        words += ["--profile"] if self.profile else []
        return words if self.json_file is None else [*words, f"--json={self.json_file}"]


def measure_rank(config_path: str, overrides: Sequence[str], options: TrafficOptions) -> int:
    """Does one rank's whole work and returns its exit code."""

    def measure(config: RunConfig) -> bool:
        from moe_dist.benchmarks.traffic.measure import TrafficSpec, measure_traffic  # here, since it loads torch

        measure_traffic(config, TrafficSpec(**vars(options)))
        return False

    return run_rank(config_path, overrides, measure)


def parse(arguments: Sequence[str] | None = None) -> tuple[str, list[str], TrafficOptions]:
    """Configuration, overrides and options from the words after the script's name."""
    parser = ArgumentParser(prog="launcher/measure.py", description="One rank of a traffic measurement.")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--kind", action="append", default=[])
    parser.add_argument("--steps", type=int, default=TrafficOptions.steps)
    parser.add_argument("--warmup", type=int, default=TrafficOptions.warmup)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by the launcher")
    words = parser.parse_intermixed_args(arguments)
    options = TrafficOptions(tuple(words.kind), words.steps, words.warmup, words.profile, words.json)
    return words.config, words.overrides, options


def main() -> int:
    """Read the words after the script's name and do one rank's work."""
    return measure_rank(*parse())


if __name__ == "__main__":
    sys.exit(main())
