"""DeepSpeed's own start-up: it takes over the process group that exists."""

import logging
import os

import deepspeed
import torch.distributed as dist
from deepspeed.utils import logger


def init_deepspeed() -> None:
    """Let DeepSpeed take over the default process group; its messages below errors are silenced."""
    logger.setLevel(logging.ERROR)
    # Its shared-memory all-reduce is compiled at start-up (half a minute), and a build killed half-way leaves a lock on
    # which later runs hang: leave it out, gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it, also for a single process
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
