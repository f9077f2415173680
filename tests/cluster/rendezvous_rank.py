"""The real entry script with another task: the ranks connect over gloo and print the host of each.

MOE_DIST_TEST_AFTER_RENDEZVOUS=sleep: they then sleep; exit:R: rank R ends with exit code 3 while the others sleep.
"""

import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moe_dist.config import RunConfig
from moe_dist.launch import rank as rank_entry


def meet(config: RunConfig, task: str, options: object | None) -> bool:
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    hosts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    line = f"rank {dist.get_rank()} met {hosts}, seed {config.seed}\n"
    os.write(sys.stdout.fileno(), line.encode())  # whole: print may let another rank in before the end of the line
    dist.barrier()
    what, _, who = os.environ.get("MOE_DIST_TEST_AFTER_RENDEZVOUS", "").partition(":")
    if what == "exit" and int(who) == dist.get_rank():
        os._exit(3)
    if what:
        time.sleep(300)
    dist.destroy_process_group()
    return False


rank_entry._perform = meet

if __name__ == "__main__":
    sys.exit(rank_entry.main())
