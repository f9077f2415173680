"""Configuration, overrides, host file and environment."""

from pathlib import Path
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from moe_dist.config import RunConfig, dump_config, load_config
from moe_dist.launch import rendezvous
from moe_dist.launch.environment import discover
from moe_dist.launch.hostfile import read_hostfile, take
from tests.fuzz.damage import ODD_TEXTS, bytes_like, fuzzed, json_bytes, reads, trees_like

ROOT = Path(__file__).resolve().parents[2]
TREE = RunConfig().model_dump(mode="json")
KEYS = [f"{name}.{key}" for name, section in TREE.items() if isinstance(section, dict) for key in section]
SHIPPED = (ROOT / "configs" / "test" / "smoke.yaml").read_bytes()
HOSTS = b"# two machines\nnode-1 slots=4\nuser@10.0.0.2 slots=2  # more\n\nfe80::1 slots=1\n"
ENVIRONMENTS = (
    {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"},
    {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "CROSS_SIZE": "4", "MASTER_ADDR": "a"},
    {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"},
    {
        "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "11", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
        "SLURM_NODEID": "1", "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "gpu[003-007,9],login", "SLURM_STEP_ID": "0",
        "SLURM_STEP_RESV_PORTS": "12000-12010",
    },
    {
        "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    },
    {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
)  # fmt: skip


@fuzzed()
@given(
    data=st.one_of(
        bytes_like(SHIPPED), bytes_like(dump_config(RunConfig()).encode(), [f"{k}: " for k in KEYS]), json_bytes(TREE)
    )
)
def test_configuration_file(scratch: Path, data: bytes) -> None:
    (scratch / "config.yaml").write_bytes(data)
    config = reads(lambda: load_config(scratch / "config.yaml"))
    if config is not None:
        assert load_config(scratch / "config.yaml") == config


@fuzzed()
@given(
    words=st.lists(
        st.one_of(
            st.builds(
                "{}={}".format, st.sampled_from(KEYS), st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=12))
            ),
            st.builds("{}={}".format, st.sampled_from(KEYS), st.one_of(st.integers(), st.floats())),
            st.builds("{}={}".format, st.sampled_from([*TREE, "include"]), trees_like([{}, [1]])),
            st.text(max_size=20),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_overrides(words: list[str]) -> None:
    reads(lambda: load_config(None, words))


@fuzzed()
@given(
    data=bytes_like(HOSTS, ["slots=", "x slots=3\n"]),
    nodes=st.none() | st.integers(1, 5),
    ranks=st.none() | st.integers(1, 5),
)
def test_host_file(scratch: Path, data: bytes, nodes: int | None, ranks: int | None) -> None:
    file = scratch / "hostfile"
    file.write_bytes(data)
    listed = reads(lambda: read_hostfile(file))
    if listed:
        reads(lambda: take(listed, nodes, ranks))


@st.composite
def environments(draw: st.DrawFn) -> dict[str, str]:
    """Return a launcher's variables with a few changed, missing, or another launcher's."""
    found = dict(draw(st.sampled_from(ENVIRONMENTS)))
    values = st.one_of(st.sampled_from(ODD_TEXTS), st.integers(-2, 12).map(str), st.text(max_size=8))
    for _ in range(draw(st.integers(0, 4))):
        others = sorted({name for one in ENVIRONMENTS for name in one})
        name = draw(st.sampled_from(others))
        if draw(st.booleans()):
            found[name] = draw(st.one_of(values, st.sampled_from(sorted(found.values()) or [""])))
        else:
            found.pop(name, None)
    return found


@fuzzed()
@given(environments())
def test_environment(variables: dict[str, str]) -> None:
    place = reads(lambda: discover(variables))
    if place is None:
        return
    assert 0 <= place.rank < place.world_size
    assert 0 <= place.local_rank < place.local_world_size <= place.world_size
    with mock.patch.object(rendezvous, "_from_mpi", return_value={}):
        reads(lambda: rendezvous.resolve(place, variables))
