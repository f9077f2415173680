"""What runs on the nodes of a bed: sshd everywhere, and SLURM (munge, slurmctld on the head, slurmd on the others)."""

import os
import shutil
import subprocess
from pathlib import Path

from tests.cluster.bed import Bed, wait_until

SSH_PROGRAMS = ("sshd", "ssh", "ssh-keygen")
SLURM_PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch")
CPUS = 4  # of a node, as SLURM is told, whatever the machine has

SSHD_CONFIG = """\
HostKey /etc/ssh/host_key
PidFile /run/sshd.pid
AuthorizedKeysFile /etc/ssh/user_key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
UseDNS no
PrintMotd no
MaxStartups 200
"""
SSH_CONFIG = """\
Host *
  IdentityFile /etc/ssh/user_key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  ConnectTimeout 5
"""
SLURM_CONF = """\
ClusterName=bed
SlurmctldHost=head
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
# a requeued job waits until its old credentials have expired: 120 s by default
AuthInfo=cred_expire=5
StateSaveLocation={folder}/slurm/state
SlurmdSpoolDir={folder}/slurm/spool-%n
SlurmctldLogFile={folder}/slurm/slurmctld.log
SlurmdLogFile={folder}/slurm/slurmd-%n.log
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
# no cgroups, no systemd
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# nodes may claim more cores than the machine has
SlurmdParameters=config_overrides
# seconds instead of minutes
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=30
KillWait=5
UnkillableStepTimeout=20
MessageTimeout=10
TCPTimeout=2
BatchStartTimeout=20
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=0,requeue_delay=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptExemptTime=00:00:00
SlurmctldParameters=preempt_send_user_signal
"""
PARTITIONS = """\
PartitionName=normal Nodes=ALL Default=YES MaxTime=60 DefaultTime=10 PriorityTier=10 State=UP GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=60 DefaultTime=10 PriorityTier=100 State=UP PreemptMode=OFF
"""


def missing(programs: tuple[str, ...]) -> list[str]:
    """Those of the programs that are not installed."""
    return [program for program in programs if shutil.which(program) is None]


def start_services(bed: Bed) -> list[str]:
    """Starts what is installed; returns the names."""
    started = []
    if not missing(SSH_PROGRAMS):
        start_ssh(bed)
        started.append("ssh")
    if not missing(SLURM_PROGRAMS):
        start_slurm(bed)
        started.append("slurm")
    return started


def start_ssh(bed: Bed) -> None:
    """Every node can reach every other as root, by a key of the bed's own; nobody's ~/.ssh is read or written."""
    etc = bed.folder / "etc" / "ssh"
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", etc / key], check=True)
    (etc / "sshd_config").write_text(SSHD_CONFIG)
    (etc / "ssh_config").write_text(SSH_CONFIG)
    for name in bed.nodes:
        start_sshd(bed, name)


def start_sshd(bed: Bed, name: str) -> None:
    """The ssh server of one node."""
    bed.nodes[name].run(str(shutil.which("sshd")), "-f", "/etc/ssh/sshd_config")


def start_slurm(bed: Bed) -> None:
    """Returns when all nodes are idle."""
    folder = bed.folder / "slurm"
    folder.mkdir()
    etc = bed.folder / "etc" / "slurm"
    nodes = [f"NodeName={name} NodeAddr={bed.addresses[name]} CPUs={CPUS} State=UNKNOWN" for name in bed.workers]
    (etc / "slurm.conf").write_text(SLURM_CONF.format(folder=bed.folder) + "\n".join(nodes) + "\n" + PARTITIONS)
    # slurmd 22.05 sets cgroups up whatever the plugins say
    (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    for name in bed.nodes:
        _start_munge(bed, name, key)
    bed.head.run("slurmctld")
    for name in bed.workers:
        bed.nodes[name].run("slurmd", "-N", name)
    wait_until(lambda: idle_nodes(bed) == len(bed.workers), 30, "idle nodes")


def start_slurmd(bed: Bed, name: str) -> None:
    """SLURM's part on a node that has been booted again."""
    _start_munge(bed, name, bed.folder / "slurm" / "munge.key")
    bed.nodes[name].run("slurmd", "-N", name)


def idle_nodes(bed: Bed) -> int:
    """How many nodes SLURM could use at once."""
    return len(set(bed.head.run("sinfo", "-h", "-N", "-p", "normal", "-t", "idle", "-o", "%N").split()))


def _start_munge(bed: Bed, name: str, key: Path) -> None:
    run = "/run/munge"
    files = (f"--pid-file={run}/munged.pid", f"--log-file={run}/munged.log", f"--seed-file={run}/seed")
    bed.nodes[name].run("munged", f"--key-file={key}", *files, "--force")
