#!/usr/bin/env python3
"""Many Multipath TCP connections to many servers at once. Used inside the network namespaces of tests.

  crowd.py serve ADDRESS:PORT...
  crowd.py connect COUNT BYTES ADDRESS:PORT...

`serve` prints `listening`, and tells every connection at its end what it received (SHA-256) and which server it is. `connect` opens COUNT
connections, one server after the other, sends the first kilobyte of each, prints `connected`, waits for a line on its standard input, sends BYTES more,
different ones on each, and prints how many were told what they ought to be, by the server that they were for.
"""
import hashlib
import resource
import selectors
import socket
import sys

MPTCP = 262


def endpoint(text):
    host, port = text.rsplit(":", 1)
    return host, int(port)


def serve(places):
    chosen = selectors.DefaultSelector()
    for place in places:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, MPTCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(endpoint(place))
        listener.listen(1024)
        chosen.register(listener, selectors.EVENT_READ, place)
    print("listening", flush=True)
    digests = {}
    while True:
        for key, _ in chosen.select():
            if isinstance(key.data, str):
                connection, _ = key.fileobj.accept()
                digests[connection] = hashlib.sha256()
                chosen.register(connection, selectors.EVENT_READ, (key.data,))
                continue
            data = key.fileobj.recv(1 << 16)
            if data:
                digests[key.fileobj].update(data)
                continue
            digest = digests.pop(key.fileobj).hexdigest()
            chosen.unregister(key.fileobj)
            key.fileobj.sendall(("%s %s" % (digest, key.data[0])).encode())
            key.fileobj.close()


def content(number, length):
    seed = hashlib.sha256(b"%d" % number).digest()
    return (seed * (length // len(seed) + 1))[:length]


def connect(count, length, places):
    connections = []
    for number in range(count):
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM, MPTCP)
        connection.connect(endpoint(places[number % len(places)]))
        connection.sendall(content(number, 1024))
        connections.append(connection)
    print("connected", flush=True)
    sys.stdin.readline()
    good = 0
    for number, connection in enumerate(connections):
        more = content(number + count, length)
        connection.sendall(more)
        connection.shutdown(socket.SHUT_WR)
    for number, connection in enumerate(connections):
        said = b""
        while data := connection.recv(4096):
            said += data
        wanted = hashlib.sha256(content(number, 1024) + content(number + count, length)).hexdigest()
        good += said.decode() == "%s %s" % (wanted, places[number % len(places)])
    print("good %d" % good, flush=True)


def main():
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 16384), most))
    if sys.argv[1] == "serve":
        serve(sys.argv[2:])
    else:
        connect(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])


main()
