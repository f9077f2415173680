"""Entry script of a rank of an examination of the environment; the library is `moe_dist/launch/rank_doctor.py`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # import from this repository, not from this folder

from moe_dist.launch.rank_doctor import main

if __name__ == "__main__":
    sys.exit(main())
