"""What the doctor makes of the facts, and the whole examination on two ranks."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from moe_dist.config import load_config
from moe_dist.distributed.links import LinkKind, Links
from moe_dist.doctor import checks as doctor
from moe_dist.doctor.checks import Facts, examine
from moe_dist.doctor.link_speed import Speed
from moe_dist.errors import MoeDistError
from tests.distributed.ranks import run_ranks

GIB = 2**30
FACTS = Facts(
    rank=0,
    host="n1",
    address="10.0.0.1",
    device="CPU",
    gpus=0,
    cores=2,
    versions={"python": "3.11", "torch": "2.13"},
    memory_free=8 * GIB,
    disk_free={"/runs": 50 * GIB, "/tmp": 6 * GIB},
    compiler="cc",
    bfloat16_speed=1.5,
)
OTHER = replace(FACTS, rank=1, host="n2", address="10.0.0.2")


@pytest.mark.parametrize(
    ("check", "status", "part"),
    [
        (doctor.check_versions([FACTS, OTHER]), "ok", "torch 2.13"),
        (
            doctor.check_versions([FACTS, replace(OTHER, versions={"python": "3.11", "torch": "2.12"})]),
            "fail",
            "rank 1",
        ),
        (doctor.check_versions([replace(FACTS, versions={"torch": None})]), "fail", "torch missing"),
        (doctor.check_devices([FACTS, replace(OTHER, cores=1)]), "ok", "CPU, at least 1 core"),
        (doctor.check_devices([FACTS, replace(OTHER, device="H100")]), "warn", "CPU, H100"),
        (doctor.check_names([FACTS, OTHER]), "ok", "n2 is 10.0.0.2"),
        (doctor.check_names([FACTS, replace(OTHER, address="127.0.1.1")]), "fail", "n2 is 127.0.1.1 to itself"),
        (doctor.check_names([FACTS, replace(OTHER, address=None)]), "fail", "n2 is unknown"),
        (doctor.check_names([replace(FACTS, address="127.0.1.1")]), "ok", "127.0.1.1"),
        (doctor.check_speed(LinkKind.INTRA_NODE, None), "ok", "no two ranks"),
        (doctor.check_speed(LinkKind.INTER_NODE, Speed(1.5e9, ())), "ok", "1,500 MB/s out of each node"),
        (doctor.check_speed(LinkKind.INTRA_NODE, Speed(1e9, (1, 3))), "fail", "rank 1, 3 received other bytes"),
        (doctor.check_clocks([0.0, -0.002], [FACTS, OTHER]), "ok", "2.0 ms"),
        (doctor.check_clocks([0.0, -2.0], [FACTS, OTHER]), "warn", "2,000.0 ms apart (n2)"),
        (doctor.check_clocks([0.0, 3600.0], [FACTS, OTHER]), "fail", "(n2)"),
        (doctor.check_memory([FACTS, OTHER], [1, 2]), "ok", "4.0 GiB free for each rank (n2)"),
        (doctor.check_memory([FACTS, replace(OTHER, memory_free=3 * GIB)], [1, 2]), "warn", "1.5 GiB"),
        (doctor.check_disk([FACTS, OTHER]), "ok", "6.0 GiB free in the folders"),
        (doctor.check_disk([FACTS, replace(OTHER, disk_free={"/runs": GIB})]), "warn", "(/runs of n2)"),
        (doctor.check_compiler([FACTS, replace(OTHER, compiler=None)]), "warn", "none on n2"),
        (doctor.check_bfloat16([FACTS, OTHER]), "ok", "1.5 times the speed"),
        (
            doctor.check_bfloat16([FACTS, replace(OTHER, bfloat16_speed=0.02)]),
            "warn",
            "0.02 times the speed of float32 (rank 1)",
        ),
    ],
)
def test_checks(check: doctor.Check, status: str, part: str) -> None:
    assert check.status == status
    assert part in check.text
    assert "\n" not in str(check)


def _examine(folder: str, nodes: tuple[int, ...], blind: int | None) -> str:
    """Examines with ranks that believe to be on these nodes; rank `blind` sees no file of another's."""
    import contextlib
    import io

    import torch.distributed as dist

    Links.discover = classmethod(lambda cls, device: cls(dist.get_rank(), nodes))  # type: ignore[method-assign, assignment]
    if dist.get_rank() == blind:
        doctor._appears = lambda path: False
    doctor.leave = lambda: None  # type: ignore[attr-defined]  # run_ranks ends the group itself
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            examine(load_config(None, [f"runs_dir={folder}/runs", "moe.kind=dense"]))
        except MoeDistError as error:
            print(error)
    return said.getvalue()


def test_an_examination_says_one_line_a_check(tmp_path: Path) -> None:
    said, silence = run_ranks(_examine, 2, str(tmp_path), (0, 0), None)
    assert silence == ""
    lines = [line.split(maxsplit=1) for line in said.splitlines()]
    assert {status for status, _ in lines} <= {"ok", "warn"}, said
    starts = [
        "ranks",
        "versions",
        "devices",
        "host",
        "inside",
        "between",
        "shared",
        "clocks",
        "memory",
        "disk",
        "C",
        "bfloat16",
    ]
    assert [text for _, text in lines if not any(text.startswith(start) for start in starts)] == []
    assert len(lines) == len(starts)
    assert "2 on 1 node(s)" in said
    assert "MB/s out of each rank" in said
    assert list(tmp_path.iterdir()) == []


def test_a_failed_check_is_named_and_fails_the_command(tmp_path: Path) -> None:
    said, _ = run_ranks(_examine, 2, str(tmp_path), (0, 1), 1)
    assert "fail  shared files" in said
    assert "MB/s out of each node" in said
    # whether the host's own name is good enough for a second node depends on this machine
    assert re.fullmatch(r"\d of 12 checks failed: (host names, )?shared files", said.splitlines()[-1])
