"""Which ranks share a node."""

import socket
from pathlib import Path

import pytest

from moe_dist.distributed import links
from moe_dist.distributed.links import LinkKind, Links


def test_kinds_of_link() -> None:
    here = Links(1, (0, 0, 1))
    assert [here.kind(peer) for peer in range(3)] == [LinkKind.INTRA_NODE, LinkKind.SELF, LinkKind.INTER_NODE]


def test_nodes_are_numbered_in_the_order_of_their_first_rank() -> None:
    assert links._numbered([9, 9, 4, 9, 7]) == (0, 0, 1, 0, 2)


def test_a_node_is_a_host_name_and_a_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boot = tmp_path / "boot_id"
    monkeypatch.setattr(links, "BOOT_ID", boot)
    found = []
    for host, boot_id in (("localhost", None), ("localhost", "a"), ("localhost", "b"), ("node-1", "b")):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        if boot_id:
            boot.write_text(f"{boot_id}\n")
        found += [links._node_identity(), links._node_identity()]
    assert found[::2] == found[1::2]
    assert len(set(found)) == 4
