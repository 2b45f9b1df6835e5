"""Whether the server in this container is ready. Exit status 0: yes; 1: no, with the reason in one line.

In HTTP/1.0, without a Host: whatever names DVT_ALLOWED_HOSTS knows. With nothing imported that is slow to import, as it
runs every few seconds, and with no proxy that the environment may name.
"""

import os
import socket
import sys

TIMEOUT_S = 4.0
EVERYWHERE = ("", "0.0.0.0", "::", "[::]")


def main() -> str | None:
    """Why it is not ready."""
    host = os.environ.get("DVT_HOST", "")
    address = ("127.0.0.1" if host in EVERYWHERE else host.strip("[]"), int(os.environ.get("DVT_PORT") or 8000))
    try:
        with socket.create_connection(address, TIMEOUT_S) as line:
            line.sendall(b"GET /readyz HTTP/1.0\r\n\r\n")
            status = line.recv(1024).split(b"\r\n")[0].decode("latin-1")
    except OSError as error:
        return f"no server answers at {address[0]}:{address[1]}: {error}"
    return None if status.split(" ")[1:2] == ["200"] else f"not ready: {status or 'no answer'}"


if __name__ == "__main__":
    sys.exit(main())
