"""Timing functions of the benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def seconds(run: Callable[[], Any], times: int = 1) -> float:
    """Measure the wall time of one call, or the mean of several calls in sequence; work on a GPU is included."""
    _wait()
    start = time.perf_counter()
    for _ in range(times):
        run()
    _wait()
    return (time.perf_counter() - start) / times


def cpu_seconds(run: Callable[[], Any]) -> float:
    """Measure the processor's time of one call, which other programs on the machine change little."""
    start = time.process_time()
    run()
    return time.process_time() - start


def thread_seconds(run: Callable[[], Any]) -> float:
    """Measure the processor's time of one call in this thread; torch has to run on one thread."""
    start = time.thread_time()
    run()
    return time.thread_time() - start


def machine(device: str) -> str:
    """Name the GPU, or the number of CPU threads."""
    return torch.cuda.get_device_name(device) if device != "cpu" else f"{torch.get_num_threads()} threads"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
