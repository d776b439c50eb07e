"""qsim measures how much quality a model loses when its matmuls run in other number formats.

    >>> import qsim_core as qsim
    >>> qsim.parse("abfp(int4, n=64)")                                    # doctest: +SKIP
    >>> simulation = qsim.simulate(model, weights="int4", activations="token(int8)")   # doctest: +SKIP

The names below are the public ones. Each is imported when it is first used, so that `import qsim_core` is fast
and does not import torch. A plugin adds functions by the entry-point group `qsim.functions`: `qsim.study(...)`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qsim_core import moved
from qsim_core.version import __version__ as __version__

_HOME = {
    "hookimpl": "hookspecs",
    "Host": "components.host",
    "Component": "components.component",
    "Preset": "components.component",
    "Quantizer": "formats.quantizer",
    "Format": "formats.format",
    "Encoded": "formats.codes",
    "pack": "formats.codes",
    "unpack": "formats.codes",
    "Scaled": "quantizers.standard_schemes",
    "Scheme": "quantizers.scheme",
    "Calibrator": "quantizers.calibrators",
    "Operation": "operations.operation",
    "Approximation": "operations.operation",
    "OperationCall": "operations.functions",
    "Arithmetic": "sites.arithmetic",
    "ExactArithmetic": "sites.arithmetic",
    "Accumulator": "sites.arithmetic",
    "QuantizedRows": "sites.arithmetic",
    "Transform": "transforms.transform",
    "Adapter": "evaluation.adapter",
    "Evaluator": "evaluation.evaluator",
    "LoadedModel": "evaluation.adapter",
    "NamedModel": "evaluation.adapter",
    "Data": "evaluation.data",
    "Run": "transforms.run",
    "Calibration": "evaluation.data",
    "Context": "transforms.context",
    "EncodedWeight": "transforms.encoded_weights",
    "Hardware": "simulation.work",
    "SiteWork": "simulation.work",
    "Cost": "simulation.work",
    "Recipe": "simulation.recipe",
    "Override": "simulation.recipe",
    "Simulation": "simulation.simulation",
    "simulate": "simulation.simulation",
    "Audit": "simulation.audit",
    "Result": "evaluation.result",
    "Metrics": "evaluation.metrics",
    "evaluate": "evaluation.evaluate",
    "Bench": "evaluation.evaluate",
    "QsimError": "errors",
    "SpecError": "errors",
    "PluginError": "errors",
    "RecipeError": "errors",
    "ModelError": "errors",
    "DataError": "errors",
    "TrainingError": "errors",
    "CalibrationWarning": "errors",
}

FUNCTIONS = "qsim.functions"
"""The entry-point group of functions that plugins add to this module."""

__all__ = [*_HOME, "parse"]  # noqa: PLE0604 - the names are all there

if TYPE_CHECKING:
    from qsim_core.components.component import Component as Component
    from qsim_core.components.component import Preset as Preset
    from qsim_core.components.host import Host as Host
    from qsim_core.errors import CalibrationWarning as CalibrationWarning
    from qsim_core.errors import DataError as DataError
    from qsim_core.errors import ModelError as ModelError
    from qsim_core.errors import PluginError as PluginError
    from qsim_core.errors import QsimError as QsimError
    from qsim_core.errors import RecipeError as RecipeError
    from qsim_core.errors import SpecError as SpecError
    from qsim_core.errors import TrainingError as TrainingError
    from qsim_core.evaluation.adapter import Adapter as Adapter
    from qsim_core.evaluation.adapter import LoadedModel as LoadedModel
    from qsim_core.evaluation.adapter import NamedModel as NamedModel
    from qsim_core.evaluation.data import Calibration as Calibration
    from qsim_core.evaluation.data import Data as Data
    from qsim_core.evaluation.evaluate import Bench as Bench
    from qsim_core.evaluation.evaluate import evaluate as evaluate
    from qsim_core.evaluation.evaluator import Evaluator as Evaluator
    from qsim_core.evaluation.metrics import Metrics as Metrics
    from qsim_core.evaluation.result import Result as Result
    from qsim_core.formats.codes import Encoded as Encoded
    from qsim_core.formats.codes import pack as pack
    from qsim_core.formats.codes import unpack as unpack
    from qsim_core.formats.format import Format as Format
    from qsim_core.formats.quantizer import Quantizer as Quantizer
    from qsim_core.hookspecs import hookimpl as hookimpl
    from qsim_core.operations.functions import OperationCall as OperationCall
    from qsim_core.operations.operation import Approximation as Approximation
    from qsim_core.operations.operation import Operation as Operation
    from qsim_core.quantizers.calibrators import Calibrator as Calibrator
    from qsim_core.quantizers.scheme import Scheme as Scheme
    from qsim_core.quantizers.standard_schemes import Scaled as Scaled
    from qsim_core.simulation.audit import Audit as Audit
    from qsim_core.simulation.recipe import Override as Override
    from qsim_core.simulation.recipe import Recipe as Recipe
    from qsim_core.simulation.simulation import Simulation as Simulation
    from qsim_core.simulation.simulation import simulate as simulate
    from qsim_core.simulation.work import Cost as Cost
    from qsim_core.simulation.work import Hardware as Hardware
    from qsim_core.simulation.work import SiteWork as SiteWork
    from qsim_core.sites.arithmetic import Accumulator as Accumulator
    from qsim_core.sites.arithmetic import Arithmetic as Arithmetic
    from qsim_core.sites.arithmetic import ExactArithmetic as ExactArithmetic
    from qsim_core.sites.arithmetic import QuantizedRows as QuantizedRows
    from qsim_core.transforms.context import Context as Context
    from qsim_core.transforms.encoded_weights import EncodedWeight as EncodedWeight
    from qsim_core.transforms.run import Run as Run
    from qsim_core.transforms.transform import Transform as Transform


def parse(text: str, host: Host | None = None) -> Any:
    """Build the component that a text describes: `parse("abfp(int4, n=64)")`.

    `host` is the set of components that exist, by default those of the installed plugins. Raises `SpecError`, with
    the position of the character, for a text that cannot be read or built. Raises `PluginError` if a plugin that the
    text names is broken.
    """
    from qsim_core.components.host import installed

    return (host or installed()).parse(text)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"qsim_core.{_HOME[name]}"), name)
    if not name.startswith("_"):
        from importlib.metadata import entry_points

        for entry in entry_points(group=FUNCTIONS, name=name):
            return entry.load()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


moved.install()
