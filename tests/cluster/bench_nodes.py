"""`make bench-nodes`: `moe-dist bench layer` or `bench step` over two nodes that a cable joins, one rank on each.

The nodes are this machine's, so the ranks need a core each, and what drives the cable takes of them too. Needs root,
and minutes on a machine that does nothing else. Words behind -- go to the command as they are.

    python -m tests.cluster.bench_nodes --rate 1gbit -- --peers deepspeed,megatron --overlap auto --overlap 2
    python -m tests.cluster.bench_nodes --bench step
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.bed import Bed, why_not
from tests.cluster.services import SSH_PROGRAMS, missing, start_ssh

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
WORDS = {
    "layer": ("--peers=deepspeed,megatron", "--overlap=auto", "--overlap=2", "--repeats=5"),
    "step": ("configs/experiment/bench-step.yaml", "world.cluster=2"),
}


def bench(bed: Bed, folder: Path, words: Sequence[str], timeout: float, per_node: int = 1, what: str = "layer") -> str:
    """What a user would type on the head node of a bed whose nodes are reached by ssh; returns what it printed."""
    hosts = bed.write_hostfile(folder / "hosts", per_node)
    command = ("moe-dist", "bench", what, f"--ranks={per_node * len(bed.workers)}", f"--hostfile={hosts}", *words)
    return bed.head.run(*command, timeout=timeout, env=ENVIRONMENT)


def main() -> int:
    """Exit code 2 where no bed can stand."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="bench-nodes")
    parser.add_argument("--bench", choices=sorted(WORDS), default="layer")
    parser.add_argument("--rate", default="1gbit", help="of each node's cable, in tc's words; unshaped: no limit")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for all of it")
    parser.add_argument("words", nargs="*", help="for moe-dist bench; default: what docs/results.md shows")
    options = parser.parse_args()
    if reason := why_not() or ", ".join(f"{name} is not installed" for name in missing(SSH_PROGRAMS)):
        print(f"bench-nodes: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="bed-") as place, Bed(Path(place) / "bed", options.nodes) as bed:
        start_ssh(bed)
        bed.set_rate(options.rate)
        words = options.words or WORDS[options.bench]
        print(bench(bed, Path(place), words, options.timeout, what=options.bench), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
