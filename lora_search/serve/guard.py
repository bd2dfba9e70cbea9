"""Who may ask: requests that a page of another site makes a browser send are refused.

A name of an attacker's may come to mean 127.0.0.1 (DNS rebinding); the `Host` header then carries that name. A page may
also send requests whose answers it cannot read; those carry its `Origin`, or are no JSON.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from lora_search.serve.fault import RequestFault

LOCAL = "localhost"


def require_own_site(asked: str, origin: str | None, host: str) -> None:
    """Raise RequestFault unless a request is meant for this server, and no other site's page made it.

    Args:
        asked: the `Host` header.
        origin: the `Origin` header, which browsers send for pages.
        host: what the server listens on. On loopback, only loopback's own names are taken; elsewhere any address, and
            `host` itself where that is a name: an address cannot be made to mean another machine.
    """
    name = _name(asked)
    if name is None or not _is_ours(name, host):
        raise RequestFault(403, f"Host: found {asked[:80]!r}; this server answers to its own address only")
    if origin is not None and urlsplit(origin).netloc != asked:
        raise RequestFault(403, f"Origin: found {origin[:80]!r}; pages of other sites are not answered")


def is_loopback(host: str) -> bool:
    """Whether a name or address means this machine alone."""
    address = _address(host)
    return host == LOCAL if address is None else address.is_loopback


def _is_ours(name: str, host: str) -> bool:
    if is_loopback(name):
        return True
    return not is_loopback(host) and (_address(name) is not None or name == host.lower())


def _name(netloc: str) -> str | None:
    try:
        parts = urlsplit(f"//{netloc}")
        _ = parts.port  # raises where it is no number
    except ValueError:
        return None
    return None if parts.username is not None or parts.path else parts.hostname


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
