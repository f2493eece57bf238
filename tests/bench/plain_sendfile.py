"""The least that an HTTP server of a file can be: one thread a connection, one head, `sendfile`. For comparison.

python -m tests.bench.plain_sendfile FILE    prints its port, serves the file at any path until it is ended
"""

from __future__ import annotations

import os
import socket
import sys
import threading


def serve_one(connection: socket.socket, path: str) -> None:
    """Answer the requests of one connection, each with the whole file."""
    with connection, open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        while connection.recv(65536).endswith(b"\r\n\r\n"):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
            sent = 0
            while sent < size:
                sent += os.sendfile(connection.fileno(), file.fileno(), sent, size - sent)


def main() -> None:
    """Serve."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve_one, args=(connection, sys.argv[1]), daemon=True).start()


if __name__ == "__main__":
    main()
