#!/usr/bin/env python3
"""Makes tunnel-v2.json without a line of the program: `python3 tests/vectors/tunnel-v2.py > tests/vectors/tunnel-v2.json`.

Messages of docs/protocol.md about tunnels, written from that document alone: struct, hmac and hashlib of Python. A test of ring
netns, where there is a Python, runs it and compares.
"""
import hashlib
import hmac
import ipaddress
import json
import struct

PSK = bytes(range(32))
KEY_ID = 0x1A2B3C4D
SESSION = 0x5E551D0000000001
EPOCH = 0xE90C4A7700000001
COOKIE_KEY = b"\xc0" * 32
TICK = 1000
CLIENT_KEY = bytes.fromhex("85" * 31 + "40")
ROUTER_KEY = bytes.fromhex("a7" * 31 + "3f")
HELLO, PING, TUNNEL, RELEASE = 1, 4, 5, 3
OK, UNSUPPORTED, QUOTA = 0, 35, 65


def hkdf(info: bytes) -> bytes:
    prk = hmac.digest(struct.pack(">I", KEY_ID), PSK, "sha256")
    return hmac.digest(prk, info + b"\x01", "sha256")


C2S = hkdf(b"detour-ctl/2 c2s mac")
S2C = hkdf(b"detour-ctl/2 s2c mac")


def mapped(text: str) -> bytes:
    address = ipaddress.ip_address(text)
    return b"\0" * 10 + b"\xff\xff" + address.packed if address.version == 4 else address.packed


def cookie(address: str, port: int) -> bytes:
    said = b"detour-ctl/2 cookie" + mapped(address) + struct.pack(">HIIQ", port, KEY_ID, TICK, SESSION)
    return struct.pack(">I", TICK) + hmac.digest(COOKIE_KEY, said, "sha256")[:12]


COOKIE = cookie("198.51.100.7", 40123)


def request(kind: int, flags: int, sequence: int, lifetime: int, choice: int, tail: bytes) -> bytes:
    body = struct.pack(">BBBBIQQ", 0xD7, 2, kind, flags, KEY_ID, SESSION, sequence) + COOKIE
    body += struct.pack(">IBBH", lifetime, 2, 2, choice) + tail
    assert len(body) == 80
    return body + hmac.digest(C2S, body, "sha256")[:16]


def response(asked: bytes, result: int, uptime: int, lifetime: int, tail: bytes) -> bytes:
    body = bytes([0xD7, 2, asked[2] | 0x80, result]) + asked[4:24]
    body += struct.pack(">QII", EPOCH, uptime, lifetime) + tail
    assert len(body) == 80
    return body + hmac.digest(S2C, body + asked[80:], "sha256")[:16]


def ordinary(mark: int) -> bytes:
    return mapped("198.51.100.7") + struct.pack(">HHHH", 40123, 0, 0, mark) + COOKIE


MARK = struct.unpack(">H", ROUTER_KEY[:2])[0]
router = request(TUNNEL, 0, 5, 0, 0, bytes(32))
client = request(TUNNEL, 1, 6, 600, 3, CLIENT_KEY)
full = request(TUNNEL, 1, 7, 600, 0, CLIENT_KEY)
release = request(RELEASE, 1, 8, 0, 0, CLIENT_KEY)
ping = request(PING, 0, 9, 0, 0, bytes(32))
addresses = ipaddress.ip_address("fd0d:e70::7:1").packed + ipaddress.ip_address("10.215.7.1").packed
messages = {
    "router": router,
    "routerR": response(router, OK, 3601, 0, ROUTER_KEY + struct.pack(">HH", 51820, 45672) + bytes(4)),
    "refused": router,
    "refusedR": response(router, UNSUPPORTED, 3601, 1800, ordinary(0)),
    "client": client,
    "clientR": response(client, OK, 3602, 600, addresses + struct.pack(">BBH", 48, 16, 1420) + COOKIE),
    "full": full,
    "fullR": response(full, QUOTA, 3603, 30, ordinary(MARK)),
    "release": release,
    "releaseR": response(release, OK, 3604, 0, ordinary(MARK)),
    "ping": ping,
    "pingR": response(ping, OK, 3605, 120, ordinary(MARK)),
}
facts = {"psk": PSK.hex(), "keyId": hex(KEY_ID), "clientKey": CLIENT_KEY.hex(), "routerKey": ROUTER_KEY.hex(), "mark": MARK}
print(json.dumps({**facts, **{name: text.hex() for name, text in messages.items()}}, indent=2))
