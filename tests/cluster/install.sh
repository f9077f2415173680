#!/usr/bin/env bash
# Installs what the tests on several nodes run, where it is missing and apt-get is there; the tests say what still lacks.
set -euo pipefail

# program:package
needed="ip:iproute2 tc:iproute2 unshare:util-linux setpriv:util-linux sshd:openssh-server ssh:openssh-client pdsh:pdsh
    slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge mpirun:openmpi-bin"
PATH=$PATH:/usr/sbin:/sbin
packages=()
for pair in $needed; do
    command -v "${pair%%:*}" >/dev/null || packages+=("${pair##*:}")
done
((${#packages[@]})) || exit 0
if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
    echo "not installed here, and only root with apt-get could: ${packages[*]}" >&2
    exit 0
fi
# Nothing that is installed may start by itself: the tests start their own, inside their nodes.
policy=/usr/sbin/policy-rc.d
[ -e "$policy" ] || { printf '#!/bin/sh\nexit 101\n' >"$policy"; chmod +x "$policy"; trap 'rm -f "$policy"' EXIT; }
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"
