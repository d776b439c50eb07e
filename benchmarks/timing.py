"""What the benchmarks measure with."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def seconds(run: Callable[[], Any], times: int = 1) -> float:
    """Wall time of one call, or the mean of several one after another; of what it leaves to a GPU too."""
    _wait()
    start = time.perf_counter()
    for _ in range(times):
        run()
    _wait()
    return (time.perf_counter() - start) / times


def machine(device: str) -> str:
    """What computes there."""
    return torch.cuda.get_device_name(device) if device != "cpu" else f"{torch.get_num_threads()} threads"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
