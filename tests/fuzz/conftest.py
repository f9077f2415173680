"""Scratch folder of a fuzz test."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """Folder in memory, if there is such a file system: a file is written for each example."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="moe-dist-fuzz-", dir=memory))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
