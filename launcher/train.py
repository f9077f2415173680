"""Entry script of every rank of a training run; the library is `moe_dist/launch/rank.py`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # import from this repository, not from this folder

from moe_dist.launch.rank_proxy import run_forked

if __name__ == "__main__":
    run_forked()  # before the imports below: the rank may run in a process that has them already

from moe_dist.launch.processes import end_now
from moe_dist.launch.rank import main

if __name__ == "__main__":
    end_now(main())
