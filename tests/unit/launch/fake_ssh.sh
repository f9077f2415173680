#!/bin/sh
# ssh to this machine, whatever the host: HOST COMMAND. Like ssh's, the remote command hears nothing of our end but its
# input's; like sshd's, it runs in a session of its own.
[ "$1" != "unreachable" ] || exit 255
exec setsid -w sh -c "$2"
