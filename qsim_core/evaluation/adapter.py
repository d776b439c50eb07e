"""The base class of adapters. An adapter holds the knowledge about one model family."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from qsim_core.components.component import Component
from qsim_core.components.host import Host
from qsim_core.errors import ModelError
from qsim_core.evaluation import configuration
from qsim_core.evaluation.data import Data
from qsim_core.simulation.recipe import Recipe
from qsim_core.snapshots import stored_as
from qsim_core.transforms.offload import state


@dataclass
class LoadedModel:
    """A model that is ready to run, with the tokenizer or processor that makes its inputs."""

    model: nn.Module
    tokenizer: Any = None
    processor: Any = None
    """Prepares images or sound; of a diffusion model the scheduler."""
    final: Mapping[str, Any] = field(default_factory=dict)
    """Weights that were stored quantized: none is rounded again.

    A value is an `EncodedWeight`, the `Scales` of the rows, or None where neither is known.
    """


@dataclass(frozen=True)
class NamedModel:
    """A model that an adapter knows by name: its directory and its data."""

    directory: Callable[[], Path]
    data: Callable[[], Data]
    doc: str = ""
    calibration: Callable[[], Data] | None = None
    """Data for transforms and static scales; none of them are in `data`."""
    evaluator: str | None = None
    """Text of the evaluator for these data; none: the adapter's."""
    is_default: bool = False
    """True if this is the model of a recipe that names none."""


class StoredRecipe(Protocol):
    """The recipe that a checkpoint was made for, and the state of the sites under it."""

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The state of the sites, as `Simulation.state_dict` names it."""

    def beside(self, recipe: Recipe, name: str, host: Host) -> dict[str, Any]:
        """The keys of a recipe that change beside the checkpoint of this name. Raises `RecipeError`."""

    def fits(self, recipe: Recipe, host: Host) -> bool:
        """True if a recipe is the checkpoint's own, so that the state belongs to its sites."""

    def lines(self, name: str, fits: bool) -> list[str]:
        """Lines for the reader of a result under a recipe that fits or does not."""


class TrainedModel(StoredRecipe, Protocol):
    """A checkpoint that was trained under a recipe. A plugin reads its record."""

    base: str
    """The model that was trained."""
    evaluator: str
    data: str | None
    """The data that it is evaluated on, as `--data` says it; None: the base's own."""


class Adapter(Component):
    """Knowledge about one model family; its name is the family's `model_type`."""

    kind: ClassVar[str] = "adapter"
    hook: ClassVar[str] = "qsim_adapters"
    families: ClassVar[tuple[str, ...]] = ()
    """Other `model_type`s that it loads. A `quant_method` is one: that of checkpoints whose weights are final."""
    endings: ClassVar[tuple[str, ...]] = ()
    """Endings of files that it loads, like ".gguf"; each such file is a whole model, and its path is the source."""
    fallback: ClassVar[bool] = False
    """True for an adapter of models whose family no other adapter names. Such an adapter says what it recognizes."""
    evaluator: ClassVar[str | None] = None
    """Text of the evaluator of its field."""
    skip: ClassVar[tuple[str, ...]] = ()
    """Patterns of sites that are not quantized unless a recipe says otherwise."""

    @abstractmethod
    def load(self, model: str, dtype: torch.dtype) -> LoadedModel:
        """The model in a directory, or of a name that the adapter understands, in eval mode. Raises `ModelError`."""

    def outline(self, model: str, dtype: torch.dtype) -> nn.Module:
        """The model without values, on the meta device. By default it is loaded first. Raises `ModelError`."""
        return self.load(model, dtype).model.to("meta")

    def load_dispatched(self, model: str, dtype: torch.dtype, to: str) -> LoadedModel:
        """The model with its weights where there is room (`to` is "auto"), or on disk ("disk").

        Outside of a forward such weights are on the meta device (`qsim_core.transforms.offload`). Raises `ModelError`.
        """
        raise ModelError(f"adapter {self} cannot put weights elsewhere; name a --device")

    def evaluator_of(self, model: str) -> str | None:
        """Text of the evaluator for one checkpoint, where its head decides; none: a recipe has to say it."""
        return self.evaluator

    def family(self, source: str) -> str | None:
        """The family of a model whose directory names none, or that is not in a directory; None: not known.

        Only fallback adapters are asked. Raises `ModelError` with the reason where `source` cannot be read.
        """
        return None

    def recognizes(self, source: str) -> bool:
        """True if a fallback adapter can load this model. May raise `ModelError` with the reason if not."""
        return False

    def stored_quantization(self, source: str) -> StoredRecipe | None:
        """The recipe of a checkpoint whose quantized weights are final; none by default. Raises `ModelError`."""
        return None

    def note(self, source: str) -> str | None:
        """A line for the reader of a result about the way a model was loaded; none: there is nothing to say."""
        return None

    def configuration(self, source: str) -> Mapping[str, Any]:
        """The content of a checkpoint's config.json; empty: not known. Raises `ModelError`."""
        directory = Path(source)
        return configuration.read_directory(directory) if directory.is_dir() else {}

    def stored_dtype(self, source: str) -> str | None:
        """The dtype of a checkpoint's weights, like "bfloat16"; none: not known. By default config.json tells it."""
        return configuration.stored_dtype(self.configuration(source))

    def structure(self, model: nn.Module) -> Mapping[str, Sequence[str]] | None:
        """Norm's module path -> names of the weights that read it; none: it is found by tracing."""
        return None

    def models(self) -> Mapping[str, NamedModel]:
        """Models that this adapter knows by a name of their own."""
        return {}


def check_plain(model: nn.Module) -> None:
    """Raise `ModelError`, naming the weight, if a matrix is stored in a format that has to be decoded before use."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        kind = stored_as(tensor)
        if isinstance(tensor, nn.Parameter) and not tensor.is_floating_point() and tensor.dim() > 1:
            kind = kind or f"codes of {str(tensor.dtype).removeprefix('torch.')}"
        if kind is not None:
            raise ModelError(
                f"weight {name} is stored quantized, as {kind}; load the model with dequantized weights, "
                f"or take the checkpoint that it was quantized from"
            )


def check_finite(model: nn.Module) -> None:
    """Raise `ModelError`, naming the parameter, if a weight is NaN or Inf."""
    names = {name for name, _ in model.named_parameters()}
    bad = [name for name, tensor in state(model) if name in names and not tensor.isfinite().all()]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise ModelError(f"weight {bad[0]}{more} holds NaN or Inf; nothing measured on this model would mean much")
