"""Fixtures of several tests: tiny models of the families, a host with the installed plugins, one thread."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import forked
import pytest
import torch

import qsim_core as qsim

collect_ignore = ["plugins_0_1"]
"""Sources of plugins, which test_plugins_0_1.py builds."""

gc.disable()  # until all tests are collected: modules and tests stay, and looking at them takes a fourth of the time
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: test_gpu.py


def pytest_collection_finish() -> None:
    """Collect garbage from now on, but never look again at what was imported and collected."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture
def make() -> Callable[..., Any]:
    """`make("llama", "sdpa")`: a tiny seeded model of a family, biases and norms random too, in eval mode."""
    return families.make


@pytest.fixture
def ids() -> torch.Tensor:
    """Two sequences of sixteen tokens."""
    return families.tokens()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small language model with random weights."""
    return families.save_small(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="session")
def host() -> Any:
    return qsim.Host()


@pytest.fixture
def quick_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask about plugins in forks of one process that has imported the libraries, not in a Python of their own."""
    monkeypatch.setattr("sys.executable", forked.executable())
