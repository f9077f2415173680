"""Module that a fork server imports in place of the trainer: ranks do what their first argument says."""

import json
import os
import signal
import sys
import threading
import time

from moe_dist.launch import rank

if os.environ.get("SERVER_HAS_A_THREAD"):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
if os.environ.get("SERVER_FAILS"):
    raise ImportError("as asked")


def run() -> int:
    how, *rest = sys.argv[1:]
    found = {
        "pid": os.getpid(),
        "group": os.getpgid(0),
        "folder": os.getcwd(),
        "socket": "MOE_DIST_FORK_SERVER" in os.environ,
    }
    print(json.dumps({**found, "rest": rest, "word": os.environ.get("WORD"), "input": sys.stdin.read()}), flush=True)
    if how == "exit":
        print("to standard error", file=sys.stderr)
        return int(rest[0])
    if how == "die":
        os.kill(os.getpid(), int(rest[0]))
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(21))
    print("waiting", flush=True)
    time.sleep(600)
    return 0


rank.main = run  # type: ignore[assignment]
