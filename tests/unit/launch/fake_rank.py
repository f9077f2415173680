"""A rank without torch: the real entry script with another task, whose behaviour RANK_n variables choose."""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from moe_dist.config import RunConfig
from moe_dist.errors import TrainingError
from moe_dist.launch import rank as rank_entry
from moe_dist.training.preemption import StopSignals


def wait_until_watched() -> None:
    """Until the supervisor holds a pidfd of this process: what happens before that it cannot tell apart."""
    folder, wanted = Path(f"/proc/{os.environ['MOE_DIST_SUPERVISOR_PID']}/fdinfo"), f"Pid:\t{os.getpid()}\n"
    while True:
        for file in folder.iterdir():
            with suppress(FileNotFoundError):
                if wanted in file.read_text():
                    return
        time.sleep(0.01)


def wait_for_all(rank: str, what: str) -> None:
    folder = Path(os.environ.get("FAKE_RENDEZVOUS") or os.environ["MOE_DIST_JOB_FOLDER"])
    (folder / f"{rank}.{what}").touch()
    while len(list(folder.glob(f"*.{what}"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)


def behave(config: RunConfig, task: str, options: object | None) -> bool:
    rank = os.environ["RANK"]
    how = os.environ.get(f"RANK_{rank}", "succeed")
    if how == "stop":
        with StopSignals() as signals:
            return _behave(rank, how, signals)
    try:
        return _behave(rank, how, StopSignals())
    except KeyboardInterrupt:
        if how == "close":  # a rank that has files to close when it is interrupted
            time.sleep(0.3)
            print(f"rank {rank} closed", flush=True)
        raise


def _behave(rank: str, how: str, signals: StopSignals) -> bool:
    wait_until_watched()
    wait_for_all(rank, "up")
    here = f"rank {rank} of {os.environ['WORLD_SIZE']} pid {os.getpid()} tty {sys.stdout.isatty()}\n"
    os.write(sys.stdout.fileno(), here.encode())  # in one piece: print would write the line's end by itself
    wait_for_all(rank, "said")
    match how:
        case "raise":
            raise ValueError("boom\nof two lines")
        case "refuse":
            raise TrainingError(f"step 3: loss is nan on rank {rank}")
        case "lose_peer":
            time.sleep(0.5)
            raise RuntimeError("gloo: Connection closed by peer [127.0.0.1]:1")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        case "exit":
            os._exit(3)
        case "sleep" | "close":
            time.sleep(600)
        case "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        case "stop":  # a rank that stops at its next step when it is asked to
            while not signals.wanted:
                time.sleep(0.02)
            return True
    return False


rank_entry._perform = behave

if __name__ == "__main__":
    sys.exit(rank_entry.main())
