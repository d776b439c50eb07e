"""A fixture that runs a test twice: with the installed accelerators, and from the reference alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from qsim_core.components.discovery import ACCELERATORS, installed
from qsim_core.formats.accelerator import accelerated_by, accelerators, at_once

WAYS = ("accelerated", "reference") if installed([ACCELERATORS])[ACCELERATORS] else ("reference",)


@contextlib.contextmanager
def computed(way: str) -> Iterator[str]:
    """Quantize by the accelerators, compiled at once, or by the reference; give the arithmetic that fits."""
    with contextlib.ExitStack() as entered:
        if way == "reference":
            entered.enter_context(accelerated_by())
        else:
            for accelerator in accelerators():
                entered.enter_context(at_once(accelerator))
        yield "float32" if way == "reference" else "auto"


@pytest.fixture(params=WAYS)
def both_ways(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with accelerators and arithmetic `auto`, and from the reference with `float32`; the arithmetic."""
    with computed(request.param) as arithmetic:
        yield arithmetic
