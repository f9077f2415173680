"""Python blocks of the README and of docs/library.md run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
BLOCK = re.compile(r"^```python(?: torchrun=(\d+))?\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(int(ranks or 0), code, id=f"{name}-{number}")
    for name in ("README.md", "docs/library.md")
    for number, (ranks, code) in enumerate(BLOCK.findall((ROOT / name).read_text(encoding="utf-8")))
]


@pytest.mark.parametrize(("ranks", "code"), BLOCKS)
def test_code_in_the_documentation_runs(ranks: int, code: str, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(code)
    runner = [sys.executable]
    if ranks:
        runner += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*runner, str(script)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr


def test_there_are_blocks_to_run() -> None:
    assert len(BLOCKS) >= 4
