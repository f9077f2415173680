"""Supervises one job of fake ranks in a process of its own, as `moe-dist launch` does: WHO N CONFIG.

WHO `ssh`: half of the ranks on each of two machines, a and b.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from moe_dist.launch import runners
from moe_dist.launch.hostfile import Node
from moe_dist.launch.job import Job, Launcher
from moe_dist.launch.supervisor import run_job

HERE = Path(__file__).resolve().parent


def main() -> int:
    who, count, config = sys.argv[1:]
    if who == "ssh":
        nodes = tuple(Node(host, int(count) // 2) for host in ("a", "b"))
        return runners.launch(Job(Launcher.LOCAL, nodes, (config,), entry=HERE / "fake_rank.py"))
    if who in list(Launcher):
        return runners.launch(Job.here(Launcher(who), int(count), (config,), HERE / "fake_rank.py"))
    command = [sys.executable, str(HERE / "fake_launcher.py"), count, who, str(HERE / "fake_rank.py"), config]
    job = Job.here(Launcher.DEEPSPEED, int(count), ())
    outcome = run_job(command, runners.environment(job), job.ranks_of(0), rendezvous_file=True)
    if outcome.line:
        print(f"moe-dist: {outcome.line}", file=sys.stderr)
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
