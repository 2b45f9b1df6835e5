"""Who may speak to this server through a browser: names that it is called by, and pages that are its own.

A browser on the same machine or in the same network reaches servers that its user never meant to show to the pages
that it visits. Two ways lead there. A page's name may be made to resolve to 127.0.0.1 (DNS rebinding): such requests
carry the foreign name as their Host. Or a page sends a request across origins: browsers then say so, in
`Sec-Fetch-Site` (W3C Fetch Metadata) or `Origin` (RFC 6454). Clients that are no browsers send neither.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from server.errors import ForeignHost, ForeignOrigin
from server.settings import is_loopback

ANY = "*"
LOCAL = ("localhost", "*.localhost", "127.0.0.0/8", "::1")


class AllowedHosts:
    """`host in allowed`, for the value of a Host header. Only the name counts, not its port."""

    def __init__(self, hosts: Iterable[str]) -> None:
        """Names, `*.name` for what is below one, IP addresses, networks; `*` allows all. Raises ValueError."""
        self._any = False
        self._names: set[str] = set()
        self._below: list[str] = []
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        self._known: set[str] = set()  # Host headers that were looked at, and allowed
        for host in (text.strip().lower().rstrip(".") for text in hosts):
            if host == ANY:
                self._any = True
            elif host.startswith("*."):
                self._below.append(host[1:])
            elif (network := _network(host.strip("[]"))) is not None:
                self._networks.append(network)
            elif host and not set(host) & set("/:*[]@ "):
                self._names.add(host)
            else:
                raise ValueError(f"{host!r} is no host name, address or network")

    def __contains__(self, header: str) -> bool:
        if self._any or header in self._known:
            return True
        allowed = self._allows(_name_of(header))
        if allowed and len(self._known) < 64:
            self._known.add(header)
        return allowed

    def _allows(self, name: str) -> bool:
        if name in self._names or any(name.endswith(below) for below in self._below):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name == ""  # HTTP/1.0 without a Host: no browser sends that
        return any(address in network for network in self._networks)


def hosts_for(listens_on: str, allowed: Iterable[str] | None) -> AllowedHosts:
    """What `allowed` says; by default local names where the server listens for this machine alone, else any."""
    if allowed is not None:
        return AllowedHosts(allowed)
    return AllowedHosts((*LOCAL, listens_on) if is_loopback(listens_on) else (ANY,))


def foreign_host(header: str) -> ForeignHost:
    return ForeignHost(
        f"This server is not called {header[:80]!r}; where it is, say so in DVT_ALLOWED_HOSTS", host=header[:80]
    )


def check_origin(headers: Mapping[bytes, bytes]) -> None:
    """For routes that change something: a page of another origin may not ask. Raises ForeignOrigin."""
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if site is not None:
        if site in (b"same-origin", b"none"):
            return
    elif origin is None or _authority(origin) == headers.get(b"host", b"").decode("latin-1").lower():
        return
    shown = (origin or b"another origin").decode("latin-1")[:80]
    raise ForeignOrigin(f"The request comes from a page of {shown}")


def _authority(origin: bytes) -> str | None:
    """The host and port of an Origin; None for `null`, which is nobody's."""
    try:
        return urlsplit(origin.decode("latin-1")).netloc.lower() or None
    except ValueError:
        return None


def _name_of(header: str) -> str:
    """Without its port."""
    name = header.lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].rstrip(".")


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        return None
