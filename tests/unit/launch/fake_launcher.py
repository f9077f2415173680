"""A launcher without torch: starts N ranks of a script and waits, as clumsily as real ones may.

fake_launcher.py N HOW SCRIPT [word ...]      HOW: stop (the others after a failure), ignore (failures), vanish
"""

import os
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    count, how, *script = sys.argv[1:]
    ranks = []
    for number in range(int(count)):
        place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_SIZE": count, "CROSS_SIZE": 1}
        variables = {name: str(value) for name, value in place.items()}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        ranks.append(subprocess.Popen([sys.executable, *script], env={**os.environ, **variables}))
    if how == "vanish":
        while len(list(Path(os.environ["MOE_DIST_JOB_FOLDER"]).glob("*.said"))) < int(count):
            time.sleep(0.05)
        os._exit(0)
    while any(rank.poll() is None for rank in ranks):
        time.sleep(0.05)
        if how == "stop" and any(rank.poll() for rank in ranks):
            for rank in ranks:
                rank.terminate()
    return 1 if any(rank.returncode for rank in ranks) else 0


if __name__ == "__main__":
    sys.exit(main())
