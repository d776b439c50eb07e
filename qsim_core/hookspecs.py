"""The hooks of qsim: the components that a plugin may offer.

Each hook takes no argument and returns a list. The list holds component classes of the hook's kind, and `Preset`s:
names for filled-in components. A hook only registers; the base class of each kind says what an author writes.
"""

from __future__ import annotations

import pluggy

hookspec = pluggy.HookspecMarker("qsim")
hookimpl = pluggy.HookimplMarker("qsim")


@hookspec
def qsim_quantizers() -> list:  # type: ignore[empty-body, type-arg]
    """Number formats and schemes: subclasses of `qsim_core.Quantizer`."""


@hookspec
def qsim_calibrators() -> list:  # type: ignore[empty-body, type-arg]
    """Ways to choose the range that a scale covers: subclasses of `qsim_core.Calibrator`."""


@hookspec
def qsim_transforms() -> list:  # type: ignore[empty-body, type-arg]
    """Post-training methods that rewrite a model: subclasses of `qsim_core.Transform`."""


@hookspec
def qsim_adapters() -> list:  # type: ignore[empty-body, type-arg]
    """Knowledge about one model family: subclasses of `qsim_core.Adapter`."""


@hookspec
def qsim_evaluators() -> list:  # type: ignore[empty-body, type-arg]
    """Measures that turn a model and data into metrics: subclasses of `qsim_core.Evaluator`."""


@hookspec
def qsim_arithmetics() -> list:  # type: ignore[empty-body, type-arg]
    """Ways to multiply and add up a product: subclasses of `qsim_core.Arithmetic`."""


@hookspec
def qsim_operations() -> list:  # type: ignore[empty-body, type-arg]
    """Ways to compute an operation between products: subclasses of `qsim_core.Operation`."""


@hookspec
def qsim_hardware() -> list:  # type: ignore[empty-body, type-arg]
    """Hardware that says what products cost: subclasses of `qsim_core.Hardware`."""
