"""A bed of two nodes for all tests here; where it cannot stand they skip, or fail where MOE_DIST_REQUIRE_BED is set."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.bed import Bed, why_not
from tests.cluster.services import SLURM_PROGRAMS, SSH_PROGRAMS, missing, start_slurm, start_ssh

REQUIRED = "MOE_DIST_REQUIRE_BED"


def unavailable(reason: str) -> None:
    """Skips the test with the reason, or fails it where a bed must be there."""
    if os.environ.get(REQUIRED):
        pytest.fail(f"{REQUIRED} is set, but {reason}")
    pytest.skip(reason)


def require(*programs: str) -> None:
    """Skips (or fails) a test that needs programs which are not installed."""
    if absent := missing(programs):
        unavailable(f"not installed: {', '.join(absent)} (`make test-cluster` installs all)")


@pytest.fixture(scope="session")
def possible() -> None:
    """A bed can stand on this machine."""
    if reason := why_not():
        unavailable(f"no bed of nodes can stand here: {reason}")


@pytest.fixture(scope="session")
def bed(possible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    """Two nodes without services."""
    with Bed(tmp_path_factory.mktemp("bed") / "bed") as standing:
        yield standing


@pytest.fixture(scope="session")
def ssh(bed: Bed) -> Bed:
    """The bed, its nodes reachable by ssh."""
    require(*SSH_PROGRAMS)
    start_ssh(bed)
    return bed


@pytest.fixture(scope="session")
def slurm(bed: Bed) -> Bed:
    """The bed under SLURM."""
    require(*SLURM_PROGRAMS)
    start_slurm(bed)
    return bed


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of all tests keep their tokens, so that the text is prepared once."""
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    """Two ranks on each of the two nodes."""
    path = tmp_path / "hosts"
    path.write_text("n1 slots=2\nn2 slots=2\n")
    return path
