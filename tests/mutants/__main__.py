"""Runner of the mutations: `python -m tests.mutants [--workers N] [--limit SECONDS] [--json FILE] [WORD ...]`.

The package, its tests and its configurations are copied to a temporary folder for each worker (`worker.py`). One
mutation at a time is applied there, and its tests are run until the first failure. A mutation is killed if a test fails
or does not end within the limit, and survives if all pass. Anything else, such as a failing import, is broken.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tests.mutants.mutations import MUTATIONS

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("moe_dist", "tests", "configs", "docs", "launcher", "slurm", "pyproject.toml", "README.md")
MOST_WORKERS = 2


def main() -> int:
    """Run the mutations whose name or file holds one of the words; return 1 if any survived or is broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants")
    parser.add_argument("words", nargs="*", metavar="WORD", help="run mutations whose name or file holds it; none: all")
    parser.add_argument("--workers", type=int, choices=range(1, MOST_WORKERS + 1), default=MOST_WORKERS)
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for the tests of one mutation")
    parser.add_argument("--json", type=Path, help="file for the outcome of each mutation")
    given = parser.parse_args()
    chosen = [
        index
        for index, one in enumerate(MUTATIONS)
        if not given.words or any(word in f"{one.file} {one.name}" for word in given.words)
    ]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        outcomes = run(chosen, Path(folder), given.workers, given.limit)
    counts = Counter(outcomes)
    print(f"{len(chosen)} mutations in {time.monotonic() - started:.0f} s: {dict(counts)}")
    if given.json:
        rows = [
            {"file": MUTATIONS[index].file, "name": MUTATIONS[index].name, "outcome": outcome}
            for index, outcome in zip(chosen, outcomes, strict=True)
        ]
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(counts["killed"] + counts["killed by the time limit"] < len(chosen))


def run(chosen: Sequence[int], folder: Path, workers: int, limit: float) -> list[str]:
    """Return the outcome of each mutation; every text is checked before any test runs."""
    for index in chosen:
        MUTATIONS[index].applied((ROOT / "moe_dist" / MUTATIONS[index].file).read_text(encoding="utf-8"))
    started = [_start(folder / str(number), limit) for number in range(workers)]
    idle: SimpleQueue[subprocess.Popen[str]] = SimpleQueue()
    for process in started:
        idle.put(process)

    def outcome(index: int) -> str:
        process = idle.get()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{index}\n")
        process.stdin.flush()
        found = process.stdout.readline().strip()
        if not found:
            raise RuntimeError(f"a worker ended with exit code {process.wait()}")
        idle.put(process)
        print(f"{found:10} {MUTATIONS[index].file}: {MUTATIONS[index].name}", flush=True)
        return found

    try:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(outcome, chosen))
    finally:
        for process in started:
            process.kill()
            process.wait()


def _start(target: Path, limit: float) -> subprocess.Popen[str]:
    """Copy the package and start a worker there."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target / name)
    environment = {**os.environ, "PYTHONPATH": str(target), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.mutants.worker", str(limit)],
        cwd=target,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


if __name__ == "__main__":
    sys.exit(main())
