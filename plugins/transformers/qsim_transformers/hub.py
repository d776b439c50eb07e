"""Access to the hub. Its libraries would try six times for each file where the hub's host has no address."""

from __future__ import annotations

import functools
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

from qsim_core.files import place

OFFLINE = "HF_HUB_OFFLINE"
"""The environment variable and the constant by which the libraries know that no request is wanted."""
REMEMBERED = 60
"""Seconds for which the answer of a name server is used again."""


@contextmanager
def offline_unless_reachable(name: str) -> Iterator[None]:
    """Let the libraries look for `name` in their caches alone, within this context, if the hub cannot be reached.

    The name of a file or directory needs no hub. Where `HF_HUB_OFFLINE` is set, its value decides.
    """
    if OFFLINE in os.environ or place(name).exists() or reachable():
        yield
        return
    from huggingface_hub import constants

    settings = [constants]
    if "datasets" in sys.modules:  # it has copied the constant
        settings.append(sys.modules["datasets"].config)
    before = [getattr(module, OFFLINE) for module in settings]
    for module in settings:
        setattr(module, OFFLINE, True)
    try:
        yield
    finally:
        for module, value in zip(settings, before, strict=True):
            setattr(module, OFFLINE, value)


def reachable() -> bool:
    """Tell if the hub's host has an address. Behind a proxy it is the proxy that looks for one."""
    if getproxies():
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    return _has_address(host, int(time.monotonic() // REMEMBERED))


@functools.lru_cache(maxsize=1)
def _has_address(host: str | None, period: int) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True
