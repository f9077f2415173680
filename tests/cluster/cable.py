"""A cable with latency: two network devices, and this process that carries each frame between them after a delay.

cable.py DEVICE DEVICE MICROSECONDS        `tc`'s netem would do, where a kernel has it

Frames keep the header of virtio-net, so that the kernel hands over 64 KiB at a time and need not cut them into packets.
"""

import ctypes
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from contextlib import suppress
from typing import NamedTuple

SET_DEVICE, SET_OFFLOAD, SET_HEADER_SIZE = 0x400454CA, 0x400454D0, 0x400454D8  # ioctls of /dev/net/tun
TAP, NO_PACKET_INFO, VIRTIO_HEADER = 0x0002, 0x1000, 0x4000
CHECKSUMS, SEGMENTS_IPV4, SEGMENTS_IPV6 = 0x01, 0x02, 0x04
HEADER_BYTES = 10
LARGEST_FRAME = 70_000
SET_TIMER_SLACK = 29  # prctl


class Frame(NamedTuple):
    """On its way: when it is due at its end, in nanoseconds of the monotonic clock."""

    due: int
    end: int
    content: bytes


def open_device(name: str) -> int:
    """A new Ethernet device whose frames this process reads and writes."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = TAP | NO_PACKET_INFO | VIRTIO_HEADER
    fcntl.ioctl(descriptor, SET_DEVICE, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(descriptor, SET_HEADER_SIZE, struct.pack("i", HEADER_BYTES))
    fcntl.ioctl(descriptor, SET_OFFLOAD, CHECKSUMS | SEGMENTS_IPV4 | SEGMENTS_IPV6)
    return descriptor


def carry(one: int, other: int, delay: int) -> None:
    """Carries frames both ways, each `delay` nanoseconds late, until a device is gone."""
    opposite = {one: other, other: one}
    on_the_way: deque[Frame] = deque()  # the delay is one and the same, so they arrive in the order of their start
    while True:
        wait = max(0.0, (on_the_way[0].due - time.monotonic_ns()) / 1e9) if on_the_way else None
        for device in select.select(list(opposite), [], [], wait)[0]:
            on_the_way.append(Frame(time.monotonic_ns() + delay, opposite[device], os.read(device, LARGEST_FRAME)))
        while on_the_way and on_the_way[0].due <= time.monotonic_ns():
            frame = on_the_way.popleft()
            with suppress(OSError):  # where that end is down the frame is lost, as on a wire
                os.write(frame.end, frame.content)


def main() -> None:
    first, second, microseconds = sys.argv[1:]
    ctypes.CDLL(None).prctl(SET_TIMER_SLACK, 1, 0, 0, 0)  # wake to the nanosecond, not within 50 us
    devices = open_device(first), open_device(second)
    print("ready", flush=True)
    with suppress(OSError):  # a node, and its device with it, is gone
        carry(*devices, int(microseconds) * 1000)


if __name__ == "__main__":
    main()
