"""The address that the server listens on: taken before anything slow is imported, or done."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

from server.settings import Settings, SettingsError

# Bytes of answers that the kernel keeps for a client that does not read. By itself it would take megabytes.
SEND_BUFFER = 128 * 1024


def bind(settings: Settings) -> socket.socket:
    """Take the address before anything slow is done. Raises SettingsError where it cannot be had.

    Clients are refused until the server is warm: another one may answer them. So the socket does not listen yet, and
    must keep others out all the same. Without SO_REUSEADDR it does. Only where connections of a server before this one
    still linger (TIME_WAIT) does it take SO_REUSEADDR; then another server may get the address, too, and who comes
    second is told when it is to listen.
    """
    where = f"{settings.host} port {settings.port}"
    unusable: OSError | None = None
    for family, kind, protocol, _, address in _addresses(settings):
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # connections inherit it
        try:
            try:
                listener.bind(address)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRNOTAVAIL:
                raise SettingsError(f"cannot listen on {where}: {os.strerror(error.errno or 0)}") from None
            unusable = error
        except OverflowError as error:
            listener.close()
            raise SettingsError(f"cannot listen on {where}: {error}") from None
        else:
            return listener
    raise SettingsError(f"cannot listen on {where}: {unusable.strerror if unusable else 'no address'}")


def listen(listener: socket.socket, backlog: int) -> None:
    # For its connections: where they linger, the next server can take the address all the same.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.listen(backlog)


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _addresses(settings: Settings) -> list[Any]:
    """As getaddrinfo tells them; of a name that has several, IPv4 goes first, as with the default host."""
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, ValueError) as error:  # ValueError: what cannot be a name at all
        reason = getattr(error, "strerror", None) or "this is no host name"
        raise SettingsError(f"cannot listen on {settings.host}: {reason}") from None
    return sorted(found, key=lambda one: one[0] != socket.AF_INET)
