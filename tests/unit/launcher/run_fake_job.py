"""Supervises one job of fake ranks in a process of its own, as `moe-dist launch` does: WHO N CONFIG."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from launcher import runners
from launcher.supervise import run_job

HERE = Path(__file__).resolve().parent


def main() -> int:
    who, count, config = sys.argv[1:]
    if who in list(runners.Launcher):
        entry = HERE / "fake_rank.py"
        return runners.launch(runners.Job(runners.Launcher(who), int(count), (config,), entry=entry))
    command = [sys.executable, str(HERE / "fake_launcher.py"), count, who, str(HERE / "fake_rank.py"), config]
    job = runners.Job(runners.Launcher.DEEPSPEED, int(count), ())
    return run_job(command, runners.environment(job), int(count), rendezvous_file=True)


if __name__ == "__main__":
    sys.exit(main())
