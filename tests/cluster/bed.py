"""Several nodes on one machine: each a process with its own network, host name, processes and mounts, on one switch.

A node is reached through a cable (a veth pair) into a bridge that lives in a network namespace of its own, so that the
machine's interfaces, addresses, hosts file and ssh settings stay as they are, and several beds may stand side by side.
Everything ends with the process that made the bed, also when it is killed. Needs root and what `why_not` looks for.

    python -m tests.cluster.bed 2        # two nodes and a shell on the head node; leave the shell to take them down
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROGRAMS = ("ip", "tc", "unshare", "nsenter", "setpriv")
SUBNET = "10.77.0"
HEAD = "head"
PATHS = (str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin")
MTU_BURST = "128kb"  # lets whole 64 KiB packets of the segmentation offload through
QUEUE = "4mb"  # a shorter one drops bursts from several senders at once
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")
NAMESPACES = ("--net", "--uts", "--mount", "--pid", "--ipc")

os.environ["PATH"] = os.pathsep.join(PATHS)


def why_not() -> str | None:
    """Why no bed can stand here, None: it can; tries the real thing, since root in a container often may not."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "needs root on Linux"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    script = (
        "mount -t proc proc /proc; ip link add name pr0 type veth peer name pr1; ip link add name pr2 type bridge; "
        "tc qdisc add dev pr0 root tbf rate 1gbit burst 128kb limit 1mb"
    )
    tried = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "sh", "-ec", script], capture_output=True, text=True, check=False
    )
    return f"no namespaces, veth, bridge or tbf: {tried.stderr.strip()}" if tried.returncode else None


@dataclass(frozen=True)
class Counters:
    """What a node's cable has carried, out of the node."""

    bytes: int
    packets: int

    def payload_since(self, before: "Counters") -> int:
        """Bytes of TCP payload: each packet has 66 bytes of Ethernet, IPv4 and TCP headers with timestamps."""
        return self.bytes - before.bytes - 66 * (self.packets - before.packets)


class Node:
    """A node that is up.

    Attributes:
        pid: of its process 1, as the machine sees it.
    """

    def __init__(self, name: str, address: str, etc: Path) -> None:
        self.name, self.address = name, address
        init = ["bash", str(HERE / "node_init.sh"), name, str(etc)]
        command = [*DIES_WITH_US, "unshare", *NAMESPACES, "--fork", "--kill-child", "--propagation", "private", *init]
        self._init = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)
        assert self._init.stdout is not None
        assert self._init.stdout.readline() == b"ready\n", f"node {name} did not start"
        self.pid = int(Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text())

    def enter(self, *words: str | Path) -> list[str]:
        """The command that runs `words` in the node."""
        inside = ["nsenter", "-t", str(self.pid), "-n", "-u", "-m", "-p", "-i", f"--wd={ROOT}", "--"]
        return [*inside, *map(str, words)]

    def start(self, *words: str | Path, env: Mapping[str, str] | None = None) -> "subprocess.Popen[str]":
        """Starts a command in the node; its output and errors are in the pipe `stdout`."""
        return subprocess.Popen(
            self.enter(*words),
            env={**os.environ, **(env or {})},
            text=True,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(
        self, *words: str | Path, timeout: float = 60, code: int | None = 0, env: Mapping[str, str] | None = None
    ) -> str:
        """Runs a command in the node to its end and returns what it printed.

        Args:
            code: the exit code it must have; None: any.

        Raises:
            AssertionError: another exit code, or no end within the time; with what it printed.
        """
        process = self.start(*words, env=env)
        output = finish(process, timeout)
        assert code is None or process.returncode == code, f"{words}: exit code {process.returncode}\n{output}"
        return output

    def counters(self) -> Counters:
        """What its cable has carried so far."""
        for line in self.run("cat", "/proc/net/dev").splitlines():
            device, _, figures = line.partition(":")
            if device.strip() == "eth0":
                return Counters(*(int(figures.split()[column]) for column in (8, 9)))
        raise AssertionError(f"{self.name} has no eth0")

    def kill(self) -> None:
        """Ends the node's process 1, and with it every process in the node."""
        self._init.kill()
        self._init.wait()


def finish(process: "subprocess.Popen[str]", timeout: float) -> str:
    """Waits for a command in a node; ends it, and fails, where it takes longer than `timeout` seconds."""
    try:
        return process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        stop(process)
        output = process.communicate()[0]
        raise AssertionError(f"{process.args!r}: no end within {timeout} s\n{output}") from None


def stop(process: "subprocess.Popen[str]") -> None:
    """Ends a command in a node: nsenter's child would survive it, so their group is killed."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> None:
    """Polls until the condition holds.

    Raises:
        AssertionError: it does not within the time; names `what` was awaited.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)


class Bed:
    """A head node and nodes n1, n2, ... on one switch, from entering it to leaving it.

    Args:
        rate: of each node's cable, both ways, in `tc`'s words.
        delay: microseconds that a frame takes through a cable; a round trip between nodes passes four.

    Attributes:
        folder: of its own files; `folder/etc` is what nodes see as parts of /etc.
        nodes: by name, those that are up.
    """

    def __init__(self, folder: Path, nodes: int = 2, rate: str = "1gbit", delay: int = 0) -> None:
        self.folder, self._rate, self._delay = folder, rate, delay
        self.addresses = {HEAD: f"{SUBNET}.10", **{f"n{i}": f"{SUBNET}.{10 + i}" for i in range(1, nodes + 1)}}
        self.nodes: dict[str, Node] = {}
        self._switch: subprocess.Popen[bytes] | None = None
        self._cables: dict[str, subprocess.Popen[bytes]] = {}
        for part in ("ssh", "slurm"):
            (folder / "etc" / part).mkdir(parents=True)
        # The second form of an address is how sockets of IPv6 see it; without it torch warns of every connection.
        named = [f"{form}{address} {name}" for name, address in self.addresses.items() for form in ("", "::ffff:")]
        lines = ["127.0.0.1 localhost", *named]
        (folder / "etc" / "hosts").write_text("\n".join(lines) + "\n")
        (folder / "etc" / "resolv.conf").touch()  # a name that is not in hosts fails at once instead of timing out

    @property
    def head(self) -> Node:
        return self.nodes[HEAD]

    @property
    def workers(self) -> list[str]:
        """Names of all nodes but the head."""
        return [name for name in self.addresses if name != HEAD]

    def __enter__(self) -> Self:
        try:
            self._switch = subprocess.Popen([*DIES_WITH_US, "unshare", "--net", "sleep", "infinity"])
            own = os.readlink("/proc/self/ns/net")
            wait_until(lambda: os.readlink(f"/proc/{self._switch_pid}/ns/net") != own, 5, "the switch")
            self._on_switch("ip", "link", "add", "br0", "type", "bridge")
            self._on_switch("ip", "link", "set", "br0", "up")
            for name in self.addresses:
                self.boot(name)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in self.nodes.values():
            node.kill()
        self.nodes.clear()
        for cable in self._cables.values():
            cable.kill()
            cable.wait()
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait()

    def boot(self, name: str) -> Node:
        """Starts a node and plugs its cable in."""
        node = self.nodes[name] = Node(name, self.addresses[name], self.folder / "etc")
        with suppress(subprocess.CalledProcessError):
            self._on_switch("ip", "link", "del", f"to-{name}")  # of the node's last life
        self._lay_cable(node)
        self.plug(name)
        # A fixed MAC address: after a crash the peers' ARP entries stay right, else they send into the void a minute.
        node.run("ip", "link", "set", "eth0", "address", f"02:6d:64:00:00:{int(node.address.split('.')[-1]):02x}")
        node.run("ip", "addr", "add", f"{node.address}/24", "dev", "eth0")
        node.run("ip", "link", "set", "eth0", "up")
        if name != HEAD:
            self.shape(name, self._rate)
        return node

    def crash(self, name: str) -> None:
        """A power failure: the cable falls silent first, so that no peer is told, then everything there is killed."""
        self.unplug(name)
        self.nodes.pop(name).kill()

    def unplug(self, name: str) -> None:
        """Nothing reaches the node or leaves it; no connection is closed."""
        self._on_switch("ip", "link", "set", f"to-{name}", "nomaster")

    def plug(self, name: str) -> None:
        """Joins the node's cable to the switch."""
        self._on_switch("ip", "link", "set", f"to-{name}", "master", "br0", "up")

    def shape(self, name: str, rate: str) -> None:
        """Limits a node's cable both ways to a rate such as 200mbit."""
        limit = ("root", "tbf", "rate", rate, "burst", MTU_BURST, "limit", QUEUE)
        self.nodes[name].run("tc", "qdisc", "replace", "dev", "eth0", *limit)
        self._on_switch("tc", "qdisc", "replace", "dev", f"to-{name}", *limit)

    def unshape(self, name: str) -> None:
        """Lets a node's cable carry what the machine's processors can move."""
        self.nodes[name].run("tc", "qdisc", "replace", "dev", "eth0", "root", "noqueue")
        self._on_switch("tc", "qdisc", "replace", "dev", f"to-{name}", "root", "noqueue")

    def set_rate(self, rate: str) -> None:
        """Lets every worker's cable carry so much, in tc's words; `unshaped`: what processors can move."""
        for name in self.workers:
            if rate == "unshaped":
                self.unshape(name)
            else:
                self.shape(name, rate)

    def write_hostfile(self, target: Path, per_node: int) -> Path:
        """A host file of all workers with as many slots each."""
        target.write_text("".join(f"{name} slots={per_node}\n" for name in self.workers))
        return target

    def _lay_cable(self, node: Node) -> None:
        """Joins the node's eth0 to the switch's device `to-NAME`."""
        here, pid = f"to-{node.name}", str(node.pid)
        if not self._delay:
            self._on_switch("ip", "link", "add", here, "type", "veth", "peer", "name", "eth0", "netns", pid)
            return
        if (before := self._cables.pop(node.name, None)) is not None:
            before.kill()
            before.wait()
        command = ["nsenter", "-t", str(self._switch_pid), "-n", "--", *DIES_WITH_US, sys.executable]
        words = [str(HERE / "cable.py"), f"from-{node.name}", here, str(self._delay)]
        cable = self._cables[node.name] = subprocess.Popen([*command, *words], stdout=subprocess.PIPE)
        assert cable.stdout is not None
        assert cable.stdout.readline() == b"ready\n", f"no cable for {node.name}"
        self._on_switch("ip", "link", "set", f"from-{node.name}", "netns", pid, "name", "eth0")

    @property
    def _switch_pid(self) -> int:
        assert self._switch is not None
        return self._switch.pid

    def _on_switch(self, *words: str) -> None:
        command = ["nsenter", "-t", str(self._switch_pid), "-n", "--", *words]
        subprocess.run(command, check=True, capture_output=True, text=True)


def main() -> None:
    """A bed of as many nodes as the first word says, with whatever services are installed, and a shell on its head."""
    from tests.cluster.services import start_services

    with (
        tempfile.TemporaryDirectory(prefix="bed-") as folder,
        Bed(Path(folder), int((sys.argv[1:] or ["2"])[0])) as bed,
    ):
        print(f"nodes {', '.join(bed.addresses)}; services: {', '.join(start_services(bed)) or 'none'}", flush=True)
        subprocess.run(bed.head.enter(os.environ.get("SHELL", "bash")), check=False)


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(f"no bed can stand here: {reason}")
    main()
