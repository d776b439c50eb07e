"""The blocks that a transform has finished, kept in a directory: a run that died goes on where it was.

What was kept is found again by what it was made from: the recipe and the transform with their code, the model as it was
before, and the calibration data, by their SHA-256. Another run of another recipe may use the same directory; nothing is
mistaken.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qsim_cache.fingerprint import sha256
from qsim_cache.made_from import leaves, of_components, of_model
from qsim_core.files import keep, kept
from qsim_core.version import __version__


class Blocks:
    """One transform's finished blocks, a file for each. A block whose file is damaged is computed again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @classmethod
    def of(cls, work_dir: Path, model: nn.Module, batches: Sequence[Any], recipe: Any, *texts: str) -> Blocks:
        """The blocks of what a recipe's components, these texts, the model as it is now and the data say.

        Raises `Unknowable` where code that takes part was typed in.
        """
        said = __version__, torch.__version__, *texts
        parts = said, of_components(recipe), of_model(model), leaves(list(batches))
        made_from = sha256(itertools.chain.from_iterable(parts))
        return cls(work_dir / made_from[:16])

    def save(self, index: int, block: nn.Module, said: dict[str, Any]) -> None:
        """Keep a finished block's tensors, and what was said about it (plain data)."""
        tensors = {name: tensor.detach().cpu() for name, tensor in block.state_dict().items()}
        keep(self._file(index), {"tensors": tensors, "said": said})

    def restore(self, index: int, block: nn.Module) -> dict[str, Any] | None:
        """Give a block the tensors that were kept, if they were; what was said about it."""
        found = kept(self._file(index))
        if found is None:
            return None
        with torch.no_grad():
            for name, tensor in block.state_dict().items():
                tensor.copy_(found["tensors"][name])
        said: dict[str, Any] = found["said"]
        return said

    def _file(self, index: int) -> Path:
        return self.directory / f"block-{index:03}.pt"
