"""Quantized checkpoints: `qsim check` reads one, `qsim evaluate` measures it, and `qsim export` writes one.

from qsim_interop.reading import open_checkpoint
from qsim_interop.writing import export
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qsim_core import hookimpl

if TYPE_CHECKING:
    from qsim_core import Adapter, Preset, Quantizer


@hookimpl
def qsim_adapters() -> list[type[Adapter]]:
    from qsim_interop.adapter import Checkpoint
    from qsim_interop.gguf_model import GGUFModel

    return [Checkpoint, GGUFModel]


@hookimpl
def qsim_quantizers() -> list[type[Quantizer] | Preset]:
    from qsim_interop.stacks import STACKS

    return [*STACKS]
