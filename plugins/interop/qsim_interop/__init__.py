"""Quantized checkpoints: `qsim check` reads one, and `qsim evaluate` measures what it holds.

from qsim_interop.reading import open_checkpoint
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qsim_core import hookimpl

if TYPE_CHECKING:
    from qsim_core import Adapter


@hookimpl
def qsim_adapters() -> list[type[Adapter]]:
    from qsim_interop.adapter import Checkpoint

    return [Checkpoint]
