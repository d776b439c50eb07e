"""The five hooks of qsim: what a plugin may offer.

Each takes no argument and returns a list of component classes of its kind, or `Preset`s: names for filled-in
components. Hooks only register; what a component does is on its base class.
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
    """What is known about one model family: subclasses of `qsim_core.Adapter`."""


@hookspec
def qsim_evaluators() -> list:  # type: ignore[empty-body, type-arg]
    """What turns a model and data into metrics: subclasses of `qsim_core.Evaluator`."""
