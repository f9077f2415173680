"""A rank without torch: the real entry script with another `train`, whose behaviour RANK_n variables choose."""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from launcher import train as entry
from moe_dist.config import RunConfig
from moe_dist.errors import TrainingError
from moe_dist.training.interrupt import StopSignals


def wait_for_all(rank: str) -> None:
    folder = Path(os.environ.get("FAKE_MEETING") or os.environ["MOE_DIST_JOB_FOLDER"])
    (folder / f"{rank}.up").touch()
    while len(list(folder.glob("*.up"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)


def behave(config: RunConfig) -> bool:
    rank = os.environ["RANK"]
    if os.environ.get(f"RANK_{rank}") == "stop":
        with StopSignals() as signals:
            return _behave(rank, signals)
    return _behave(rank, StopSignals())


def _behave(rank: str, signals: StopSignals) -> bool:
    wait_for_all(rank)
    here = f"rank {rank} of {os.environ['WORLD_SIZE']} pid {os.getpid()} tty {sys.stdout.isatty()}\n"
    os.write(sys.stdout.fileno(), here.encode())  # in one piece: print would write the line's end by itself
    how = os.environ.get(f"RANK_{rank}", "succeed")
    if how in ("raise", "refuse", "lose_peer", "die", "terminate", "exit"):
        time.sleep(0.5)  # the others have said that they are there, and whoever watches has found them
    match how:
        case "raise":
            raise ValueError("boom\nof two lines")
        case "refuse":
            raise TrainingError(f"step 3: loss is nan on rank {rank}")
        case "lose_peer":
            time.sleep(0.02)
            raise RuntimeError("gloo: Connection closed by peer [127.0.0.1]:1")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        case "exit":
            os._exit(3)
        case "sleep":
            time.sleep(600)
        case "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        case "close":  # a rank that has files to close when it is interrupted
            try:
                time.sleep(600)
            except KeyboardInterrupt:
                time.sleep(0.3)
                print(f"rank {rank} closed", flush=True)
                raise
        case "stop":  # a rank that stops at its next step when it is asked to
            while not signals.wanted:
                time.sleep(0.02)
            return True
    return False


entry._train = behave

if __name__ == "__main__":
    sys.exit(entry.main())
