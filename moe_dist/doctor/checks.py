"""`moe-dist doctor` as one of its ranks: rank 0 gathers the facts of all ranks and prints one line per check."""

import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.config import RunConfig
from moe_dist.distributed.init import RankInfo, init_distributed, shutdown
from moe_dist.distributed.links import LinkKind, Links
from moe_dist.doctor.link_speed import Speed, clock_offsets, exchange_speed
from moe_dist.errors import MoeDistError
from moe_dist.kernels.gemm_speed import relative_gemm_speed
from moe_dist.metrics import installed_versions

SHARED_SECONDS = 10.0  # until a new file shows on other nodes; NFS caches for some seconds
SKEW_WARN, SKEW_FAIL = 1.0, 60.0  # seconds
MEMORY_WARN, DISK_WARN = 2 * 2**30, 5 * 2**30  # bytes: free for each rank; in each folder


@dataclass(frozen=True)
class Check:
    """Result of one check; `status` is ok, warn or fail."""

    status: str
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.status:4}  {self.name:13} {self.text}"


@dataclass(frozen=True)
class Facts:
    """Facts about a rank's machine; sizes in bytes, the speed of bfloat16 products as a multiple of float32's."""

    rank: int
    host: str
    address: str | None
    device: str
    gpus: int
    cores: int
    versions: dict[str, str | None]
    memory_free: int
    disk_free: dict[str, int]
    compiler: str | None
    bfloat16_speed: float


def examine(config: RunConfig) -> None:
    """Run all checks; every rank of the job calls this, rank 0 prints.

    Raises:
        MoeDistError: on rank 0: a check failed.
    """
    process = init_distributed(config.world)
    links, failed, count = Links.discover(process.device), [], 0
    for check in _checks(config, process, links):
        count += 1
        if process.rank == 0:
            print(check, flush=True)
        failed += [check.name] if check.status == "fail" else []
    shutdown()
    if failed and process.rank == 0:
        raise MoeDistError(f"{len(failed)} of {count} checks failed: {', '.join(failed)}")


def _checks(config: RunConfig, process: RankInfo, links: Links) -> Iterator[Check]:
    """Yield all checks in order; collective, so every rank must consume them all. Only rank 0's texts are valid."""
    facts = [Facts(**told) for told in gather(asdict(_own_facts(config, process)), process)]
    firsts = [links.node_of_rank.index(node) for node in sorted(set(links.node_of_rank))]
    nodes = [facts[first] for first in firsts]
    yield Check("ok", "ranks", f"{process.ranks} on {len(nodes)} node(s): {', '.join(node.host for node in nodes)}")
    yield check_versions(facts)
    yield check_devices(facts)
    yield check_names(nodes)
    for kind in (LinkKind.INTRA_NODE, LinkKind.INTER_NODE):
        yield check_speed(kind, exchange_speed(process, links, kind))
    yield _check_shared(Path(config.runs_dir), process, facts)
    yield check_clocks(clock_offsets(process, firsts), nodes)
    yield check_memory(facts, [links.node_of_rank.count(node) for node in links.node_of_rank])
    yield check_disk(nodes)
    yield check_compiler(nodes)
    yield check_bfloat16(facts)


def _own_facts(config: RunConfig, process: RankInfo) -> Facts:
    host, address = socket.gethostname(), None
    with suppress(OSError):
        address = socket.gethostbyname(host)
    cuda = process.device.type == "cuda"
    device = torch.cuda.get_device_name(process.device) if cuda else "CPU"
    folders = {config.runs_dir, config.corpus.cache_dir, tempfile.gettempdir()}
    return Facts(
        rank=process.rank,
        host=host,
        address=address,
        device=device,
        gpus=torch.cuda.device_count() if cuda else 0,
        cores=len(os.sched_getaffinity(0)),
        versions=installed_versions(),
        memory_free=_memory_free(),
        disk_free={folder: shutil.disk_usage(_existing(folder)).free for folder in sorted(folders)},
        compiler=next(filter(shutil.which, ("cc", "gcc", "clang")), None),
        bfloat16_speed=relative_gemm_speed(torch.bfloat16, process.device),
    )


def _memory_free() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _existing(folder: str | Path) -> Path:
    """Return the folder, or the nearest existing one above it."""
    path = Path(folder).expanduser().absolute()
    return next(above for above in (path, *path.parents) if above.is_dir())


def gather(value: Any, process: RankInfo) -> list[Any]:
    """Gather every rank's JSON-serializable value, in the order of ranks; collective."""
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(process.device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=process.device) for _ in range(process.ranks)]
    dist.all_gather(sizes, torch.tensor([len(text)], device=process.device))
    longest = int(max(sizes))
    padded = torch.zeros(longest, dtype=torch.uint8, device=process.device)
    padded[: len(text)] = text
    texts = [torch.empty_like(padded) for _ in range(process.ranks)]
    dist.all_gather(texts, padded)
    return [json.loads(bytes(text[: int(size)].tolist())) for text, size in zip(texts, sizes, strict=True)]


def check_versions(facts: Sequence[Facts]) -> Check:
    """Compare software versions."""
    own = facts[0].versions
    text = ", ".join(f"{name} {version or 'missing'}" for name, version in own.items())
    others = [told.rank for told in facts if told.versions != own]
    if others:
        differing = sorted({n for told in facts for n in own if told.versions.get(n) != own[n]})
        return Check("fail", "versions", f"rank {_listed(others)} has other versions of {', '.join(differing)}: {text}")
    missing = [name for name, version in own.items() if version is None]
    return Check("fail" if missing else "ok", "versions", text)


def check_devices(facts: Sequence[Facts]) -> Check:
    """Compare devices."""
    kinds = sorted({told.device for told in facts})
    if len(kinds) > 1:
        return Check("warn", "devices", f"ranks have different devices: {', '.join(kinds)}")
    cores = min(told.cores for told in facts)
    return Check("ok", "devices", f"{kinds[0]}, at least {cores} core(s) for the ranks of a node")


def check_names(nodes: Sequence[Facts]) -> Check:
    """Check that a node's own name does not resolve to a loopback address, which other nodes could not reach."""
    bad = [
        f"{node.host} is {node.address or 'unknown'}" for node in nodes if (node.address or "127.").startswith("127.")
    ]
    if len(nodes) > 1 and bad:
        return Check(
            "fail",
            "host names",
            f"{', '.join(bad)} to itself: give its address in /etc/hosts, or set GLOO_SOCKET_IFNAME",
        )
    return Check("ok", "host names", ", ".join(f"{node.host} is {node.address or 'unknown'}" for node in nodes))


def check_speed(kind: LinkKind, speed: Speed | None) -> Check:
    """Check an all-to-all over one kind of link: correct data, and bandwidth."""
    name = {LinkKind.INTRA_NODE: "inside nodes", LinkKind.INTER_NODE: "between nodes"}[kind]
    if speed is None:
        return Check("ok", name, "no two ranks have such a link")
    if speed.wrong_ranks:
        return Check("fail", name, f"rank {_listed(speed.wrong_ranks)} received other bytes than were sent")
    of_each = "rank" if kind is LinkKind.INTRA_NODE else "node"
    return Check("ok", name, f"all-to-all {speed.bytes_per_second / 1e6:,.0f} MB/s out of each {of_each}")


def _check_shared(folder: Path, process: RankInfo, facts: Sequence[Facts]) -> Check:
    """Check that a file written by rank 0 becomes visible to all; collective."""
    place, path = _existing(folder), None
    if process.rank == 0:
        with suppress(OSError):
            descriptor, path = tempfile.mkstemp(prefix=".moe-dist-doctor-", dir=place)
            os.close(descriptor)
    path = gather(path, process)[0]
    if path is None:
        return Check("fail", "shared files", f"{place}: cannot be written on {facts[0].host}")
    seen = gather(_appears(Path(path)), process)
    if process.rank == 0:
        os.unlink(path)
    blind = sorted({told.host for told, sees in zip(facts, seen, strict=True) if not sees})
    if blind:
        text = f"{place} of {facts[0].host} is not seen on {', '.join(blind)}: checkpoints need a shared runs_dir"
        return Check("fail", "shared files", text)
    return Check("ok", "shared files", f"{place} is one folder for all ranks")


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + SHARED_SECONDS
    while not path.exists():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
    return True


def check_clocks(offsets: Sequence[float], nodes: Sequence[Facts]) -> Check:
    """Compare the clocks of the nodes with rank 0's."""
    worst, host = max((abs(offset), node.host) for offset, node in zip(offsets, nodes, strict=True))
    status = "fail" if worst > SKEW_FAIL else "warn" if worst > SKEW_WARN else "ok"
    where = f" ({host})" if status != "ok" else ""
    return Check(status, "clocks", f"at most {worst * 1e3:,.1f} ms apart{where}")


def check_memory(facts: Sequence[Facts], ranks_on_node: Sequence[int]) -> Check:
    """Check the free memory of the host, divided among the ranks of a node."""
    shares = [(told.memory_free // ranks, told.host) for told, ranks in zip(facts, ranks_on_node, strict=True)]
    return _least("memory", shares, MEMORY_WARN, "for each rank")


def check_disk(nodes: Sequence[Facts]) -> Check:
    """Check the free space of the folders of runs, tokens and temporary files."""
    spaces = [(free, f"{folder} of {node.host}") for node in nodes for folder, free in node.disk_free.items()]
    return _least("disk", spaces, DISK_WARN, "in the folders of runs, tokens and temporary files")


def _least(name: str, found: list[tuple[int, str]], enough: int, what: str) -> Check:
    least, where = min(found)
    return Check("ok" if least >= enough else "warn", name, f"at least {least / 2**30:.1f} GiB free {what} ({where})")


def check_compiler(nodes: Sequence[Facts]) -> Check:
    """Check that the CPU kernel can be compiled, which happens at its first use."""
    without = [node.host for node in nodes if node.compiler is None]
    if without:
        return Check("warn", "C compiler", f"none on {', '.join(without)}: clustered experts are slower on the CPU")
    return Check("ok", "C compiler", ", ".join(sorted({str(node.compiler) for node in nodes})))


def check_bfloat16(facts: Sequence[Facts]) -> Check:
    """Compare the speed of products in bfloat16 with float32's."""
    slowest = min(facts, key=lambda told: told.bfloat16_speed)
    text = f"products run at {slowest.bfloat16_speed:.2g} times the speed of float32 (rank {slowest.rank})"
    if slowest.bfloat16_speed >= 1:
        return Check("ok", "bfloat16", text)
    return Check("warn", "bfloat16", f"{text}: leave train.precision at auto, or set it to float32")


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
