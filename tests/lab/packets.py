#!/usr/bin/env python3
"""Sends packets that no well-behaved stack would. Used inside the network namespaces of tests.

  packets.py tcp SOURCE DESTINATION SPORT DPORT FLAGS OPTION [COUNT]
  packets.py udp SOURCE DESTINATION SPORT DPORT HEX [COUNT]
  packets.py option DEVICE SOURCE HEX
  packets.py announce DEVICE SOURCE PREFIX COUNT

FLAGS out of the letters FSRPA. OPTION: none, join, capable, other (an MPTCP option of subtype 3), joinlast (a capable
before a join), or all options in hex, which may end in the middle of one (J stands for a join, and data may follow a slash). With COUNT, the source port grows by one from packet to packet. UDP takes any SOURCE, owned or not.

`option` waits for a TCP segment that leaves DEVICE from SOURCE (HOST:PORT, one end of a live subflow) and sends an
acknowledgement after it that carries the option HEX, as the host that relays the subflow can.

`announce` does what a server can: it prints `ready`, learns the keys of the next MPTCP connection to SOURCE, and sends COUNT
ADD_ADDR options with valid HMACs (RFC 8684, 3.4.1), for addresses PREFIX.x.y.
"""
import hmac
import os
import socket
import struct
import sys

# Other protocols are shown on their way in only.
ETH_P_ALL = 3
FLAGS = {"F": 1, "S": 2, "R": 4, "P": 8, "A": 16}
# RFC 8684, 3.1 and 3.2: kind 30, length, subtype and flags, ...
JOIN = bytes([30, 12, 0x10, 1]) + os.urandom(8)
CAPABLE = bytes([30, 4, 0x01, 0x81])
OPTIONS = {
    "none": b"",
    "join": JOIN,
    "capable": CAPABLE,
    "other": bytes([30, 4, 0x30, 0]),
    "joinlast": CAPABLE + JOIN,
}


def checksum(data):
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def pseudo(source, destination, protocol, length):
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    head = socket.inet_pton(family, source) + socket.inet_pton(family, destination)
    return head + (struct.pack("!IxxxB", length, protocol) if ":" in source else struct.pack("!xBH", protocol, length))


def tcp(source, destination, sport, dport, flags, option):
    if option in OPTIONS:
        options, data = bytes([2, 4, 5, 180]) + OPTIONS[option], b""
    else:
        options, data = [bytes.fromhex(part.replace("J", JOIN.hex())) for part in (option + "/").split("/")[:2]]
    options += b"\1" * (-len(options) % 4)
    bits = sum(FLAGS[letter] for letter in flags)
    offset = (20 + len(options)) // 4 << 4
    seq = struct.unpack("!I", os.urandom(4))[0]

    def segment(check):
        return struct.pack("!HHIIBBHHH", sport, dport, seq, 0, offset, bits, 65535, check, 0) + options + data

    bare = segment(0)
    return segment(checksum(pseudo(source, destination, 6, len(bare)) + bare))


def udp(source, destination, sport, dport, payload):
    bare = struct.pack("!HHHH", sport, dport, 8 + len(payload), 0) + payload
    check = checksum(pseudo(source, destination, 17, len(bare)) + bare)
    return struct.pack("!HHHH", sport, dport, 8 + len(payload), check or 0xFFFF) + payload


def segments(tap, host, port, outgoing):
    """TCP segments from (outgoing) or to that end: the frame, where TCP begins in it, and TCP's options."""
    address = socket.inet_aton(host)
    while True:
        frame, (_, _, direction, _, _) = tap.recvfrom(65535)
        if frame[12:14] != b"\x08\x00" or frame[23] != 6 or outgoing != (direction == socket.PACKET_OUTGOING):
            continue
        at = 14 + (frame[14] & 15) * 4
        ends = struct.unpack("!HH", frame[at:at + 4])
        end = (frame[26:30], ends[0]) if outgoing else (frame[30:34], ends[1])
        if end == (address, port):
            yield frame, at, frame[at + 20:at + (frame[at + 12] >> 4) * 4]


def option_of(options, kind):
    """The first option of that kind, whole; None when there is none."""
    while options and options[0]:
        length = 1 if options[0] == 1 or len(options) < 2 else max(2, options[1])
        if options[0] == kind:
            return options[:length]
        options = options[length:]
    return None


def acknowledgement(frame, at, options):
    """A segment like that one without its data, right after it, with other options besides its timestamps (RFC 7323)."""
    sport, dport, seq, ack, offset, _, window = struct.unpack("!HHIIBBH", frame[at:at + 16])
    total = struct.unpack("!H", frame[16:18])[0]
    seq = (seq + total - (at - 14) - (offset >> 4) * 4) & 0xFFFFFFFF
    extra = b"\1\1" + option_of(frame[at + 20:at + (offset >> 4) * 4], 8) + options
    extra += b"\1" * (-len(extra) % 4)
    ends = [socket.inet_ntoa(frame[26:30]), socket.inet_ntoa(frame[30:34])]

    def segment(check):
        return struct.pack("!HHIIBBHHH", sport, dport, seq, ack, (20 + len(extra)) // 4 << 4, FLAGS["A"],
                           window, check, 0) + extra

    bare = segment(0)
    whole = segment(checksum(pseudo(*ends, 6, len(bare)) + bare))
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(whole), 0, 0, 64, 6, 0) + frame[26:34]
    return frame[:14] + ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:] + whole


def live(tap, host, port):
    """The next ordinary segment from that end."""
    for frame, at, options in segments(tap, host, port, True):
        if frame[at + 13] & ~FLAGS["P"] == FLAGS["A"] and option_of(options, 8):
            return frame, at


def inject(tap, host, port, option):
    frame, at = live(tap, host, port)
    tap.send(acknowledgement(frame, at, option))


def announce(tap, host, port, prefix, count):
    print("ready", flush=True)
    for _, _, options in segments(tap, host, port, False):
        capable = option_of(options, 30)
        # The handshake's third packet and the first data carry both keys.
        if capable and len(capable) >= 20 and capable[2] >> 4 == 0:
            break
    key = capable[12:20] + capable[4:12]
    frame, at = live(tap, host, port)
    for n in range(count):
        if n % 50 == 0:
            frame, at = live(tap, host, port)
        about = bytes([1 + n % 255]) + socket.inet_aton("%s.%d.%d" % (prefix, n // 250 % 250, 1 + n % 250))
        proof = hmac.digest(key, about + b"\0\0", "sha256")[-8:]
        tap.send(acknowledgement(frame, at, bytes([30, 16, 0x30]) + about + proof))
    print("announced", flush=True)


def main():
    if sys.argv[1] in ("option", "announce"):
        device, source, *rest = sys.argv[2:]
        host, port = source.rsplit(":", 1)
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        tap.bind((device, ETH_P_ALL))
        if sys.argv[1] == "option":
            inject(tap, host, int(port), bytes.fromhex(rest[0]))
        else:
            announce(tap, host, int(port), rest[0], int(rest[1]))
        return
    kind, source, destination, sport, dport = sys.argv[1:6]
    count = int(sys.argv[-1]) if len(sys.argv) > (8 if kind == "tcp" else 7) else 1
    protocol = 6 if kind == "tcp" else 17
    v6 = ":" in source
    if kind == "udp" and not v6:
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    else:
        raw = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_RAW, protocol)
        raw.bind((source, 0))
    for n in range(count):
        port = int(sport) + n
        if kind == "tcp":
            packet = tcp(source, destination, port, int(dport), sys.argv[6], sys.argv[7])
        else:
            packet = udp(source, destination, port, int(dport), bytes.fromhex(sys.argv[6]))
            if not v6:
                head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(packet), 0, 0, 64, 17, 0,
                                   socket.inet_aton(source), socket.inet_aton(destination))
                packet = head + packet
        raw.sendto(packet, (destination, 0))


main()
