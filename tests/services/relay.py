"""A relay that forwards TCP connections to a server at a limited rate, to simulate a slow network."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_PIECE_BYTES = 8 << 10


@contextmanager
def slow_line(port: int, bytes_per_sec: float) -> Iterator[int]:
    """Yield a port that forwards to 127.0.0.1:`port`. The answers of each connection are limited to `bytes_per_sec`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_accept, args=(listener, port, bytes_per_sec), daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket, port: int, bytes_per_sec: float) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:  # the relay is closed
            return
        server = socket.create_connection(("127.0.0.1", port))
        for ends, rate in (((client, server), float("inf")), ((server, client), bytes_per_sec)):
            threading.Thread(target=_forward, args=(*ends, rate), daemon=True).start()


def _forward(source: socket.socket, target: socket.socket, bytes_per_sec: float) -> None:
    try:
        while data := source.recv(_PIECE_BYTES):
            target.sendall(data)
            time.sleep(len(data) / bytes_per_sec)
    except OSError:
        pass  # one side has closed its connection, so both are closed below
    finally:
        for end in (source, target):
            end.close()
