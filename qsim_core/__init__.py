"""qsim: what a model loses when its matmuls run in other number formats.

    >>> import qsim_core as qsim
    >>> qsim.parse("abfp(int4, n=64)")                                    # doctest: +SKIP
    >>> simulation = qsim.simulate(model, weights="int4", activations="token(int8)")   # doctest: +SKIP

The names below are the public ones; each is imported when it is first used, so that `import qsim_core` costs
nothing and imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "hookimpl": "hookspecs",
    "Host": "host",
    "Component": "component",
    "Preset": "component",
    "Quantizer": "quantizer",
    "Format": "format",
    "Encoded": "encoding",
    "pack": "encoding",
    "unpack": "encoding",
    "Scaled": "schemes",
    "Scheme": "scaling",
    "Calibrator": "ranges",
    "Transform": "bases",
    "Adapter": "bases",
    "Evaluator": "bases",
    "LoadedModel": "bases",
    "NamedModel": "bases",
    "Data": "bases",
    "Run": "bases",
    "Calibration": "bases",
    "Context": "context",
    "Recipe": "recipe",
    "Override": "recipe",
    "Simulation": "simulation",
    "simulate": "simulation",
    "Audit": "audit",
    "Result": "result",
    "Metrics": "metrics",
    "evaluate": "evaluation",
    "QsimError": "errors",
    "SpecError": "errors",
    "PluginError": "errors",
    "RecipeError": "errors",
    "ModelError": "errors",
    "DataError": "errors",
    "TrainingError": "errors",
    "CalibrationWarning": "errors",
}

__all__ = [*_HOME, "parse"]  # noqa: PLE0604 - the names are all there

if TYPE_CHECKING:
    from qsim_core.audit import Audit as Audit
    from qsim_core.bases import Adapter as Adapter
    from qsim_core.bases import Calibration as Calibration
    from qsim_core.bases import Data as Data
    from qsim_core.bases import Evaluator as Evaluator
    from qsim_core.bases import LoadedModel as LoadedModel
    from qsim_core.bases import NamedModel as NamedModel
    from qsim_core.bases import Run as Run
    from qsim_core.bases import Transform as Transform
    from qsim_core.component import Component as Component
    from qsim_core.component import Preset as Preset
    from qsim_core.context import Context as Context
    from qsim_core.encoding import Encoded as Encoded
    from qsim_core.encoding import pack as pack
    from qsim_core.encoding import unpack as unpack
    from qsim_core.errors import CalibrationWarning as CalibrationWarning
    from qsim_core.errors import DataError as DataError
    from qsim_core.errors import ModelError as ModelError
    from qsim_core.errors import PluginError as PluginError
    from qsim_core.errors import QsimError as QsimError
    from qsim_core.errors import RecipeError as RecipeError
    from qsim_core.errors import SpecError as SpecError
    from qsim_core.errors import TrainingError as TrainingError
    from qsim_core.evaluation import evaluate as evaluate
    from qsim_core.format import Format as Format
    from qsim_core.hookspecs import hookimpl as hookimpl
    from qsim_core.host import Host as Host
    from qsim_core.metrics import Metrics as Metrics
    from qsim_core.quantizer import Quantizer as Quantizer
    from qsim_core.ranges import Calibrator as Calibrator
    from qsim_core.recipe import Override as Override
    from qsim_core.recipe import Recipe as Recipe
    from qsim_core.result import Result as Result
    from qsim_core.scaling import Scheme as Scheme
    from qsim_core.schemes import Scaled as Scaled
    from qsim_core.simulation import Simulation as Simulation
    from qsim_core.simulation import simulate as simulate


def parse(text: str, host: Host | None = None) -> Any:
    """The component that a text describes: `parse("abfp(int4, n=64)")`.

    `host` says which components exist; by default those of the installed plugins. Raises `SpecError`, which
    points at the character, for a text that means nothing, and `PluginError` if a plugin it names is broken.
    """
    from qsim_core.host import installed

    return (host or installed()).parse(text)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"qsim_core.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
