#!/usr/bin/env python3
"""Makes announce-v2.json without a line of the program: `python3 tests/vectors/announce-v2.py > tests/vectors/announce-v2.json`.

Messages of docs/protocol.md about announcements and capability ports, written from that document alone: struct and hmac of Python.
A test of ring netns, where there is a Python, runs it and compares.
"""
import hmac
import ipaddress
import json
import struct

PSK = bytes(range(32))
KEY_ID = 0x1A2B3C4D
SESSION = 0x5E551D0000000001
EPOCH = 0xE90C4A7700000001
COOKIE = bytes.fromhex("000003e8") + bytes(range(12))
SERVER, PORT = "198.51.100.7", 443
HELLO, RELEASE, PING, ANNOUNCE = 1, 3, 4, 6
OK, DENIED, UNSUPPORTED, NO_RESOURCES = 0, 33, 35, 64
ANNOUNCED = 2


def hkdf(info: bytes) -> bytes:
    prk = hmac.digest(struct.pack(">I", KEY_ID), PSK, "sha256")
    return hmac.digest(prk, info + b"\x01", "sha256")


C2S = hkdf(b"detour-ctl/2 c2s mac")
S2C = hkdf(b"detour-ctl/2 s2c mac")


def mapped(text: str) -> bytes:
    address = ipaddress.ip_address(text)
    return b"\0" * 10 + b"\xff\xff" + address.packed if address.version == 4 else address.packed


def request(kind: int, flags: int, sequence: int, lifetime: int, server: str | None, cookie: bytes = COOKIE) -> bytes:
    body = struct.pack(">BBBBIQQ", 0xD7, 2, kind, flags, KEY_ID, SESSION, sequence) + cookie
    body += struct.pack(">IBBH", lifetime, 2, 2, 0)
    body += mapped(server) + struct.pack(">HHB11x", PORT, 0, 6) if server else bytes(32)
    assert len(body) == 80
    return body + hmac.digest(C2S, body, "sha256")[:16]


def response(asked: bytes, result: int, lifetime: int, port: int = 0, capability: int = 0) -> bytes:
    body = bytes([0xD7, 2, asked[2] | 0x80, result]) + asked[4:24] + struct.pack(">QII", EPOCH, 3600, lifetime)
    body += mapped(SERVER) + struct.pack(">HHHH", 40123, port, capability, 0) + COOKIE
    assert len(body) == 80
    return body + hmac.digest(S2C, body + asked[80:], "sha256")[:16]


announce = request(ANNOUNCE, 0, 2, 600, SERVER)
foreign = request(ANNOUNCE, 0, 3, 600, "198.51.100.8")
announce6 = request(ANNOUNCE, 0, 4, 600, "2001:db8::7")
withdraw = request(RELEASE, ANNOUNCED, 5, 0, SERVER)
hello = request(HELLO, 0, 1, 0, None, bytes(16))
ping = request(PING, 0, 6, 0, None)
messages = {
    "announce": announce,
    "announceR": response(announce, OK, 600, PORT),
    "foreign": foreign,
    "foreignR": response(foreign, DENIED, 1800),
    "announce6": announce6,
    "announce6R": response(announce6, NO_RESOURCES, 30),
    "withdraw": withdraw,
    "withdrawR": response(withdraw, OK, 0),
    "hello": hello,
    "helloR": response(hello, OK, 120, 0, 23456),
    "ping": ping,
    "pingR": response(ping, OK, 120, 0, 23456),
}
print(json.dumps({"psk": PSK.hex(), "keyId": hex(KEY_ID), **{name: text.hex() for name, text in messages.items()}}, indent=2))
