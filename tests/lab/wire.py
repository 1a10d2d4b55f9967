#!/usr/bin/env python3
"""A link that delays and loses packets, for kernels without netem. Carries them between two TUN devices.

  wire.py NAMESPACE DEVICE NAMESPACE DEVICE

Devices exist already, in the network namespaces of those files. Prints `ready`. Each line on standard input changes one direction:
`a|b DELAY_MS LOSS_PERCENT`, where `a` is what the first device sends; `changed` is printed when it holds. Packets stay in order.
"""
import collections
import ctypes
import fcntl
import os
import random
import select
import struct
import sys
import time

# linux/if_tun.h
TUNSETIFF = 0x400454CA
IFF_TUN = 1
IFF_NO_PI = 0x1000
# sched.h
CLONE_NEWNET = 0x40000000
LONGEST_PACKET = 65536
# Enough to be fair to the other direction when both are busy.
PACKETS_AT_ONCE = 64


def attach(namespace, device):
    """The device's file: one packet for each read and write."""
    with open(namespace) as there:
        if ctypes.CDLL(None, use_errno=True).setns(there.fileno(), CLONE_NEWNET) != 0:
            sys.exit(f"setns {namespace}: {os.strerror(ctypes.get_errno())}")
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI))
    return file


class Direction:
    def __init__(self, source, sink):
        self.source, self.sink = source, sink
        self.delay = self.loss = 0.0
        self.waiting = collections.deque()

    def take(self):
        """Reads what has been sent."""
        for _ in range(PACKETS_AT_ONCE):
            try:
                packet = os.read(self.source, LONGEST_PACKET)
            except BlockingIOError:
                return
            if random.random() >= self.loss:
                self.waiting.append((time.monotonic() + self.delay, packet))

    def give(self):
        """Hands over what has been under way long enough; seconds until the next is due, None when nothing waits."""
        while self.waiting:
            left = self.waiting[0][0] - time.monotonic()
            if left > 0:
                return left
            try:
                os.write(self.sink, self.waiting.popleft()[1])
            except OSError:
                # The device is down, or its host short of memory: lost, as on a real link.
                pass
        return None


def main(namespace_a, device_a, namespace_b, device_b):
    try:
        # A busy machine must not make a link longer.
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        pass
    a, b = attach(namespace_a, device_a), attach(namespace_b, device_b)
    directions = {"a": Direction(a, b), "b": Direction(b, a)}
    print("ready", flush=True)
    commands = b""
    while True:
        due = [left for left in (one.give() for one in directions.values()) if left is not None]
        readable, _, _ = select.select([0, a, b], [], [], min(due, default=None))
        for one in directions.values():
            if one.source in readable:
                one.take()
        if 0 in readable:
            text = os.read(0, 4096)
            if not text:
                return
            *lines, commands = (commands + text).split(b"\n")
            for line in lines:
                name, delay, loss = line.decode().split()
                directions[name].delay, directions[name].loss = float(delay) / 1000, float(loss) / 100
                print("changed", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
