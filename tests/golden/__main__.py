"""`python -m tests.golden record FILE` keeps the figures of all cases; `compare FILE` runs them again and compares.

Figures are equal to the bit on one machine only: processor, threads and library versions enter the last digits.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.golden.cases import CASES
from tests.golden.run import figures_of


def _run_cases(old_words: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found[case] = figures_of(case, Path(folder), old_words)
        print(f"{case}: loss {found[case]['validation'][-1]}", flush=True)
    return found


def main(mode: str, file: str) -> int:
    """Record the figures or compare them with a record; return the exit code."""
    found = json.loads(json.dumps(_run_cases(mode == "record-old")))
    if mode != "compare":
        Path(file).write_text(json.dumps(found))
        return 0
    expected, differing = json.loads(Path(file).read_text()), 0
    for case, figures in expected.items():
        for name, value in figures.items():
            if found[case][name] != value:
                differing += 1
                print(f"DIFFERS: {case}: {name}\n  was {str(value)[:300]}\n  is  {str(found[case][name])[:300]}")
    print(f"{len(expected)} cases, {differing} differences")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
