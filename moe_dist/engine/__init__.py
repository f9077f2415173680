"""Training engine; the only package that imports deepspeed."""

import os

import torch

if not torch.accelerator.is_available():
    # DeepSpeed selects its accelerator on import, and the modules of this package import it.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
