"""Settings of the whole suite."""

import os
from pathlib import Path

from hypothesis import settings

# Triton reads this once, when it is first imported: without a GPU its kernels are run by its interpreter.
if not (Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The cores are shared: an example that is slow once is not a failure.
settings.register_profile("shared cores", deadline=None, print_blob=True)
settings.load_profile("shared cores")
