"""What has to be seen on a GPU: `make test-gpu`. Without one everything here skips itself.

`MOE_DIST_GPU_TESTS=cpu` runs the same on a CPU, to test the tests. Findings that are no pass or fail go to files in the
folder `GPU_REPORT`.
"""

import os
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

WANTED = os.environ.get("MOE_DIST_GPU_TESTS", "cuda")
REPORT = Path(os.environ.get("GPU_REPORT", "build/gpu"))
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests of this folder where the device is missing."""
    if WANTED == "cpu" or torch.cuda.is_available():
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU: make test-gpu needs one"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that is tested."""
    return torch.device(WANTED)


@pytest.fixture(scope="session")
def on_gpu(device: torch.device) -> bool:
    """False where the tests themselves are tested."""
    return device.type == "cuda"


@pytest.fixture(scope="session")
def report() -> Callable[[str, str], None]:
    """Writes a finding to `NAME.txt` and to the output."""
    REPORT.mkdir(parents=True, exist_ok=True)
    written = set[str]()

    def write(name: str, text: str) -> None:
        with (REPORT / f"{name}.txt").open("a" if name in written else "w", encoding="utf-8") as file:
            file.write(text.rstrip() + "\n")
        written.add(name)
        print(f"{name}: {text}")

    write("environment", _environment())
    return write


def _environment() -> str:
    lines = [f"python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}"]
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        lines.append(
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {torch.cuda.device_count()} of them"
        )
        lines.append(f"NCCL {torch.cuda.nccl.version()}")
    for package in ("triton", "deepspeed", "megatron.core", "transformers"):
        try:
            module = __import__(package, fromlist=["__version__"])
            lines.append(f"{package} {module.__version__}")
        except Exception as error:  # whatever a broken package raises is the finding
            lines.append(f"{package}: {type(error).__name__}: {error}")
    return "\n".join(lines)
