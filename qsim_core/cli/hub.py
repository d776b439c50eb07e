"""What the hub's libraries are told before they are imported."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

OFFLINE = "HF_HUB_OFFLINE"
"""The variable by which these libraries know that they shall ask nobody."""


def offline_unless_reachable(model: str | None, *data: str | None) -> None:
    """Set `OFFLINE` if one of the names is on the hub, if anywhere, and the hub's own name does not resolve.

    The libraries would try six times, for half a minute, each file anew. What is in their cache is found all the same.
    """
    names = [name for name in (model if model and "/" in model else None, *data) if name]  # OWNER/MODEL
    if OFFLINE in os.environ or getproxies() or all(Path(name).expanduser().exists() for name in names):
        return
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        os.environ[OFFLINE] = "1"
