#!/bin/bash
# Process 1 of a node. The file system is the machine's own, as if by NFS, but for what a node must have to itself.
#
#     node_init.sh NAME ETC          ETC: a folder with the node's hosts, resolv.conf, ssh/ and slurm/
set -eu
name=$1 etc=$2
mount -t proc proc /proc
mount -t sysfs sysfs /sys                                   # /sys/class/net shows the node's own devices
mount -t tmpfs -o mode=0755 tmpfs /run                      # sockets and pid files of sshd, munge, slurmd
mount -t tmpfs -o mode=1777 tmpfs /dev/shm                  # shared memory must not reach across nodes
mkdir -p /run/sshd /run/munge /run/pmix
mount --bind "$etc/hosts" /etc/hosts
[ ! -e /etc/resolv.conf ] || mount --bind "$etc/resolv.conf" "$(readlink -f /etc/resolv.conf)"
for folder in ssh slurm; do [ ! -d "/etc/$folder" ] || mount --bind "$etc/$folder" "/etc/$folder"; done
hostname "$name"
ip link set lo up
echo ready
exec </dev/null >/dev/null 2>&1
while :; do sleep 3600 & wait $!; done                      # bash also reaps the orphans of its node
