"""Entry script of a rank of a traffic measurement; the library is `moe_dist/launch/rank_measure.py`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # import from this repository, not from this folder

from moe_dist.launch.rank_measure import main

if __name__ == "__main__":
    sys.exit(main())
