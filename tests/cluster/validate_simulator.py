"""`make validate-simulator`: steps measured on a bed of nodes against `moe-dist calibrate`'s predictions of them.

Trains a few steps of clustered and of standard experts on 2 and 4 nodes over cables of several rates, fits the
constants to some of these cases and predicts the others. All nodes are this machine, so their ranks take turns on its
cores, and so does what moves data where no cable is slow. Needs root, and minutes on a machine that does nothing else.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.bed import ROOT, Bed, why_not
from tests.cluster.services import SSH_PROGRAMS, missing, start_ssh

RATES = {"200mbit": 25e6, "1gbit": 125e6, "unshaped": None}  # bytes/s
LIMIT = 0.15  # of the mean absolute error
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
WORDS = (
    "configs/experiment/demo.yaml",
    "tensorboard=false",
    "world.threads=1",
    "moe.experts=32",
    "moe.clusters=4",
    "recluster.period=null",
    "memory.offload=false",
    "moe.wire_dtype=float32",
    "corpus.max_bytes=1500000",
    "tokenizer.vocab_size=512",
)
MACHINE = {
    "device": {
        "name": "a core of the bed",
        "flops": 1e11,  # about one core's peak in float32; the fit finds the share that is reached
        "memory": 8e9,
        "memory_bandwidth": 1e10,
        "node_bandwidth": 1e11,
        "network_bandwidth": 1e11,
        "host_bandwidth": 1e10,
        "matmul_share": 0.2,
        "expert_share": 0.2,
        "step_overhead": 0.02,
        "stack_bandwidth": 5e8,
        "reserved": 0,
    },
    "rails": 1,
    "network_latency": 5e-4,
}


@dataclass(frozen=True)
class Launch:
    """One launch, which measures both kinds of layer.

    Attributes:
        held_out: nothing is fitted to it.
    """

    nodes: int
    per_node: int
    rate: str
    held_out: bool

    @property
    def name(self) -> str:
        return f"{self.nodes}x{self.per_node}-{self.rate}"


LAUNCHES = (
    Launch(2, 1, "200mbit", False),
    Launch(2, 1, "unshaped", False),
    Launch(4, 1, "200mbit", False),
    Launch(4, 1, "unshaped", False),
    Launch(2, 1, "1gbit", True),
    Launch(4, 1, "1gbit", True),
    Launch(2, 2, "1gbit", True),
)


def measure(launch: Launch, folder: Path, steps: int, timeout: float) -> list[dict[str, object]]:
    """The cases of a launch on a bed of its own; none, with the reason told, where it fails or takes too long."""
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="bed-") as place, Bed(Path(place) / "bed", launch.nodes) as bed:
            start_ssh(bed)
            output = run(bed, launch, folder, steps, timeout)
    except (AssertionError, OSError, subprocess.CalledProcessError) as error:
        print(f"{launch.name}: failed: {error}", flush=True)
        return []
    (folder / f"{launch.name}.log").write_text(output)
    print(f"{launch.name}: measured in {time.monotonic() - started:.0f} s", flush=True)
    kept = {"held_out": launch.held_out, "network_bandwidth": RATES[launch.rate]}
    return [{"run": f"runs/{launch.name}-traffic-{kind}", **kept} for kind in ("clustered", "standard")]


def run(bed: Bed, launch: Launch, folder: Path, steps: int, timeout: float) -> str:
    """What users would type on the head node; returns what it printed."""
    bed.set_rate(launch.rate)
    hosts = bed.write_hostfile(folder / f"{launch.name}.hosts", launch.per_node)
    place = (f"name={launch.name}", f"runs_dir={folder}/runs", f"corpus.cache_dir={folder}/cache")
    options = (f"--hostfile={hosts}", f"--steps={steps}", "--warmup=3", "--kind=clustered", "--kind=standard")
    layout = f"world.cluster={launch.nodes * launch.per_node}"
    command = ("moe-dist", "measure", "traffic", *WORDS, *place, layout, *options)
    return bed.head.run(*command, timeout=timeout, env=ENVIRONMENT)


def main() -> int:
    """Measures, fits, predicts; exit code 1 where a case failed or the mean error is too large."""
    parser = argparse.ArgumentParser(description=__doc__, prog="validate-simulator")
    parser.add_argument("folder", type=Path, help="a new folder for everything that is measured and found")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a case")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds that one launch may take")
    parser.add_argument("--only", action="append", help="launches by name, such as 4x1-200mbit")
    words = parser.parse_args()
    if reason := why_not() or ", ".join(f"{name} is not installed" for name in missing(SSH_PROGRAMS)):
        print(f"validate-simulator: {reason}", file=sys.stderr)
        return 2
    folder = words.folder.absolute()
    folder.mkdir(parents=True)
    launches = [launch for launch in LAUNCHES if not words.only or launch.name in words.only]
    found: list[dict[str, object]] = []
    for launch in launches:
        found.extend(measure(launch, folder, words.steps, words.timeout))
    return judge(found, folder, 2 * len(launches))


def judge(found: list[dict[str, object]], folder: Path, expected: int) -> int:
    """Fits and predicts with the command that users have."""
    machine = {**MACHINE, "cores": len(os.sched_getaffinity(0))}
    (folder / "cases.json").write_text(json.dumps({"machine": machine, "cases": found}, indent=1))
    told = folder / "validation.json"
    command = ["moe-dist", "calibrate", folder / "cases.json", "-o", folder / "machine.json", "--json", told]
    if subprocess.run(list(map(str, command)), cwd=ROOT, check=False).returncode:
        return 1
    error = json.loads(told.read_text())["mean_absolute_error"]
    print(f"{len(found)} of {expected} cases; mean absolute error {error:.1%}, at most {LIMIT:.0%} is asked for")
    return int(len(found) < expected or error > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
