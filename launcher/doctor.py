"""Entry script of every rank of `moe-dist doctor`; the library is `moe_dist/launch/rank.py`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # import from this repository, not from this folder

from moe_dist.launch.rank import main

if __name__ == "__main__":
    sys.exit(main(task="doctor"))
