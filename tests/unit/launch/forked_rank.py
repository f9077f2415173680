"""Entry script of a rank that is forked if it can be: says so if it is not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from moe_dist.launch.rank_proxy import run_forked

if __name__ == "__main__":
    run_forked()
    print("ran in its own process")
