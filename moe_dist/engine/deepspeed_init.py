"""Initialization of DeepSpeed on the existing default process group."""

import logging
import os

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger


def init_deepspeed() -> None:
    """Initialize DeepSpeed on the default process group, and silence its log messages below errors."""
    logger.setLevel(logging.ERROR)
    # DeepSpeed compiles its shared-memory all-reduce at start-up (half a minute), and an interrupted build leaves a
    # lock on which later runs hang. gloo does the same work, so disable it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires it, even for a single process
    if get_accelerator().device_name() == "cpu":  # DeepSpeed refuses CPUs without instructions for float16
        get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
