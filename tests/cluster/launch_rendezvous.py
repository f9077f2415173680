"""What `moe-dist launch` does, with the entry script of `rendezvous_rank.py`: LAUNCHER HOSTFILE CONFIG [word ...]."""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moe_dist.launch import runners
from moe_dist.launch.job import JobSize, Launcher, plan


def main() -> int:
    launcher, hostfile, config, *words = sys.argv[1:]
    job = plan(Launcher(launcher), JobSize(hostfile=Path(hostfile)), config, words)
    return runners.launch(replace(job, entry=Path(__file__).with_name("rendezvous_rank.py")))


if __name__ == "__main__":
    sys.exit(main())
