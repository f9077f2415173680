"""Bytes over a cable: `receive` prints how many came; `send HOST N` and `trip HOST` the seconds; `reach HOST`."""

import socket
import sys
import time

PORT = 5999


def receive() -> str:
    with socket.create_server(("", PORT)) as server:
        connection, _ = server.accept()
        count = 0
        while chunk := connection.recv(1 << 20):
            count += len(chunk)
        connection.sendall(b"!")
        return str(count)


def send(host: str, size: int) -> str:
    connection = _connected(host)
    started = time.perf_counter()
    connection.sendall(bytes(size))
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)  # the other side has all of it
    return str(time.perf_counter() - started)


def _connected(host: str) -> socket.socket:
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection((host, PORT))
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def reach(host: str) -> str:
    try:
        socket.create_connection((host, PORT), timeout=1).close()
    except ConnectionRefusedError:
        return "reached"  # the host answers, though nobody listens
    except OSError:
        return "silence"
    return "reached"


def trip(host: str) -> str:
    """Seconds until the host has refused a connection: one round trip."""
    started = time.perf_counter()
    reach(host)
    return str(time.perf_counter() - started)


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        print(receive())
    elif sys.argv[1] == "send":
        print(send(sys.argv[2], int(sys.argv[3])))
    elif sys.argv[1] == "trip":
        print(trip(sys.argv[2]))
    else:
        print(reach(sys.argv[2]))
