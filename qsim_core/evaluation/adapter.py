"""The base class of adapters: what is known about one model family."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from qsim_core.components.component import Component
from qsim_core.errors import ModelError
from qsim_core.evaluation.data import Data

if TYPE_CHECKING:
    pass


@dataclass
class LoadedModel:
    """A model, ready to run, and what turns raw data into its inputs."""

    model: nn.Module
    tokenizer: Any = None
    processor: Any = None
    """What prepares images or sound; of a diffusion model its scheduler."""


@dataclass(frozen=True)
class NamedModel:
    """A model that an adapter knows by name: where its directory is, and the data that goes with it."""

    directory: Callable[[], Path]
    data: Callable[[], Data]
    doc: str = ""
    calibration: Callable[[], Data] | None = None
    """What transforms may look at: none of what the model is evaluated on."""
    evaluator: str | None = None
    """Text of the evaluator that goes with the data; none: the adapter's."""


class Adapter(Component):
    """What is known about one model family; its name is the family's `model_type`."""

    kind: ClassVar[str] = "adapter"
    hook: ClassVar[str] = "qsim_adapters"
    families: ClassVar[tuple[str, ...]] = ()
    """Other `model_type`s that it loads."""
    evaluator: ClassVar[str | None] = None
    """Text of the evaluator that its field uses."""
    skip: ClassVar[tuple[str, ...]] = ()
    """Sites left alone unless a recipe says otherwise."""

    @abstractmethod
    def load(self, model: str, dtype: torch.dtype) -> LoadedModel:
        """The model in a local directory or of a hub's name, in eval mode. Raises `ModelError`."""

    def load_dispatched(self, model: str, dtype: torch.dtype, to: str) -> LoadedModel:
        """The same with weights where accelerate puts them: "auto", on whatever has room, or "disk".

        Outside of a forward what is not at hand is on the meta device (`qsim_core.transforms.offload`). Raises `ModelError`.
        """
        raise ModelError(f"adapter {self} cannot put weights elsewhere; name a --device")

    def evaluator_of(self, model: str) -> str | None:
        """Text of the evaluator for one checkpoint, where its head decides; none: a recipe has to say it."""
        return self.evaluator

    def structure(self, model: nn.Module) -> Mapping[str, Sequence[str]] | None:
        """Norm's module path -> names of the weights that read it; none: as tracing finds it."""
        return None

    def models(self) -> Mapping[str, NamedModel]:
        """Models that this adapter knows by a name of their own."""
        return {}
