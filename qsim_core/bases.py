"""What a plugin author subclasses: one base class for each hook, one abstract method in each.

`Quantizer` has a module of its own. The values that pass between the core and these classes stand here too.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from qsim_core.component import Component, Preset
from qsim_core.errors import DataError, ModelError, QsimError
from qsim_core.quantizer import Quantizer
from qsim_core.ranges import Calibrator

if TYPE_CHECKING:
    from qsim_core.context import Context


@dataclass
class LoadedModel:
    """A model, ready to run, and what turns raw data into its inputs."""

    model: nn.Module
    tokenizer: Any = None
    processor: Any = None
    """What prepares images or sound; of a diffusion model its scheduler."""


@dataclass(frozen=True)
class Data:
    """What a model is evaluated on; `sha256` tells whether two runs saw the same."""

    name: str
    content: Any
    sha256: str

    @classmethod
    def of_text(cls, name: str, text: str) -> Data:
        """Text, with the SHA-256 of its UTF-8 bytes."""
        return cls(name, text, hashlib.sha256(text.encode()).hexdigest())


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


@dataclass(frozen=True)
class Calibration:
    """Which data transforms look at: `samples` of them, of `length` (tokens; none: what the evaluator takes)."""

    source: str | None = None
    samples: int = 32
    length: int | None = None


@contextmanager
def no_count(total: int, done: int, description: str) -> Iterator[Callable[[str], None]]:
    """What is called after each step, and shows nothing."""
    yield lambda text: None


def no_progress(items: Iterable[Any], total: int, description: str) -> Iterable[Any]:
    """The items, and nothing shown."""
    return items


@dataclass(frozen=True)
class Run:
    """How one evaluation is carried out: nothing here says what is computed, but for `limit`."""

    batch_size: int = 8
    limit: int | None = None
    """At most so many samples (windows, images), the first ones."""
    seed: int = 0
    track: Callable[[Iterable[Any], int, str], Iterable[Any]] = field(default=no_progress)
    """Wraps a loop to show its progress: `for x in run.track(items, total, "perplexity")`."""
    stage: Callable[[str], AbstractContextManager[Any]] = field(default=nullcontext)
    """Surrounds work without a count to show that it goes on: `with run.stage("loading opt-tiny"):`."""
    count: Callable[[int, int, str], AbstractContextManager[Callable[[str], None]]] = field(default=no_count)
    """Surrounds steps that count themselves: `with run.count(total, done, "training") as step: … step("loss 3.2")`."""
    work_dir: Path | None = None
    """Where finished blocks are kept, so that a run that died goes on from there."""
    reference: Any = None
    """The `outputs` of the baseline's `Metrics`, for the simulated run; none in the baseline's own."""
    allow_code_execution: bool = False
    """Whether an evaluator may run programs that the model wrote."""


class Transform(Component):
    """A post-training method that rewrites a model before its weights are quantized."""

    kind: ClassVar[str] = "transform"

    @abstractmethod
    def apply(self, model: nn.Module, context: Context) -> None:
        """Change the model in place. `context` has its matmuls, calibration data and blocks, and takes reports."""


class Adapter(Component):
    """What is known about one model family; its name is the family's `model_type`."""

    kind: ClassVar[str] = "adapter"
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

        Outside of a forward what is not at hand is on the meta device (`qsim_core.offload`). Raises `ModelError`.
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


class Evaluator(Component):
    """Turns a model and data into metrics. One method to write: `evaluate`."""

    kind: ClassVar[str] = "evaluator"
    metric: ClassVar[str] = ""
    """The metric that a table shows first; empty: the first one that there is."""
    higher_is_better: ClassVar[bool] = False

    @abstractmethod
    def evaluate(self, loaded: LoadedModel, data: Data, run: Run) -> dict[str, float]:
        """The metrics by name; deterministic for the same model, data and run. `Metrics` have confidence intervals."""

    def read(self, source: str, split: str = "test") -> Data:
        """The data that a path or name stands for; of a data set's parts `split`, if the name says no other. Raises
        `DataError`."""
        raise DataError(f"{self.name} cannot read data; leave --data out")

    def default_data(self) -> Data | None:
        """What is measured on when nothing is named: noise needs no file; none: the data that the model comes with."""
        return None

    def calibration(self, loaded: LoadedModel, data: Data, samples: int, length: int | None, seed: int) -> list[Any]:
        """Batches of one sample each for transforms to look at, drawn by `seed`. Raises `DataError`."""
        raise DataError(f"{self.name} makes no calibration batches; use an evaluator that does, or Python")

    def training(self, loaded: LoadedModel, data: Data, length: int | None) -> Sequence[dict[str, torch.Tensor]]:
        """What the model is trained on: samples of `length` tokens (none: what the evaluator takes), each the keyword
        arguments of a forward that gives a `loss`, without the axis of a batch. Raises `DataError`."""
        raise DataError(f"{self.name} makes no training samples; use an evaluator that does, or Python")

    def example(self, loaded: LoadedModel, data: Data) -> dict[str, Any] | None:
        """One small batch, as keyword arguments of the model's forward: finds the sites, feeds the audit."""
        return None

    def protocol(self, loaded: LoadedModel) -> str:
        """What exactly is measured, in one sentence that a paper could print."""
        return str(self)

    def save_samples(self, baseline: Any, simulated: Any, directory: Path) -> None:
        """Write what a person would look at, from the `outputs` of both runs' `Metrics`. Raises `DataError`."""
        raise DataError(f"{self.name} makes no samples that could be saved")


HOOK_BASES: dict[str, type[Component]] = {
    "qsim_quantizers": Quantizer,
    "qsim_calibrators": Calibrator,
    "qsim_transforms": Transform,
    "qsim_adapters": Adapter,
    "qsim_evaluators": Evaluator,
}


def hook_of(thing: Any) -> str:
    """The hook under which a component class is offered; presets are names for quantizers here."""
    if isinstance(thing, Preset):
        return "qsim_quantizers"
    for hook, base in HOOK_BASES.items():
        if isinstance(thing, type) and issubclass(thing, base):
            return hook
    kinds = ", ".join(base.__name__ for base in HOOK_BASES.values())
    raise QsimError(f"{thing!r} is neither a preset nor a subclass of {kinds}")
