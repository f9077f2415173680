"""The training engine; the only package that imports deepspeed."""

import os

import torch

if not torch.accelerator.is_available():
    # DeepSpeed picks its accelerator when it is imported, which the modules of this package do.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
