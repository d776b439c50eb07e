"""Modules of qsim 0.1 that have moved, so that a plugin written for 0.1 still loads.

A module that has moved within the core is imported under its old name as an alias, with a `DeprecationWarning`. For a
module that has left the core an `ImportError` names the new module and its distribution.
"""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

CORE = "qsim_core"
MOVED: dict[str, tuple[str, ...]] = {
    "addresses": ("qsim_structure.parameter_addresses",),
    "apart": ("qsim_fast.tiled_attention",),
    "atomic": ("qsim_core.files",),
    "attention": ("qsim_core.matmuls.attention",),
    "audit": ("qsim_core.simulation.audit",),
    "bases": (
        "qsim_core.evaluation.adapter",
        "qsim_core.evaluation.data",
        "qsim_core.evaluation.evaluator",
        "qsim_core.transforms.transform",
        "qsim_core.transforms.run",
        "qsim_core.components.component",
        "qsim_core.components.hook_validation",
        "qsim_core.formats.quantizer",
        "qsim_core.quantizers.calibrators",
    ),
    "bf16": ("qsim_fast.bf16", "qsim_fast.arithmetics"),
    "blocks": ("qsim_core.transforms.blocks",),
    "blockwise": ("qsim_fast.blockwise", "qsim_fast.arithmetics"),
    "caches": ("qsim_cache",),
    "causal": ("qsim_fast.causal_attention",),
    "channels": ("qsim_structure.channels",),
    "checking": ("qsim_structure.equivalence_check",),
    "checkpoint": ("qsim_core.transforms.checkpoint",),
    "cli": ("qsim_core.cli.main",),
    "component": ("qsim_core.components.component",),
    "compose": ("qsim_core.cli.recipe_options",),
    "configuration": ("qsim_transformers.configuration",),
    "console": ("qsim_core.cli.console",),
    "context": ("qsim_core.transforms.context", "qsim_core.transforms.report", "qsim_core.matmuls.dispatch"),
    "contract": ("qsim_core.components.hook_validation",),
    "convolution": ("qsim_core.matmuls.convolution",),
    "curve": ("qsim_finetune.loss_curve",),
    "dispatch": ("qsim_core.matmuls.dispatch",),
    "distillation": ("qsim_finetune.distillation",),
    "divergence": ("qsim_finetune.divergence",),
    "encoding": ("qsim_core.formats.codes",),
    "evaluation": ("qsim_core.evaluation.bench", "qsim_core.evaluation.job", "qsim_core.evaluation.record"),
    "finetuning": ("qsim_finetune.finetuning", "qsim_finetune.training"),
    "finetuning_report": ("qsim_finetune.training_table",),
    "fingerprint": ("qsim_core.simulation.fingerprint", "qsim_core.evaluation.baseline_cache"),
    "fixed": ("qsim_core.quantizers.static_scale",),
    "folding": ("qsim_structure.folding",),
    "format": ("qsim_core.formats.format",),
    "forms": ("qsim_core.sites.arithmetic",),
    "forward": ("qsim_core.transforms.forward",),
    "fused": ("qsim_fast.quantizing",),
    "gpu": ("qsim_fast.kernels.gpu",),
    "gradients": ("qsim_core.quantizers.gradients",),
    "heads": ("qsim_structure.heads",),
    "host": ("qsim_core.components.host", "qsim_core.components.discovery"),
    "hub": ("qsim_transformers.hub",),
    "int8": ("qsim_fast.int8", "qsim_fast.arithmetics"),
    "kernels": ("qsim_fast.kernels.arguments", "qsim_fast.kernels.protocol"),
    "kernels_gpu": ("qsim_fast.kernels.quantizers_triton",),
    "learned": ("qsim_core.quantizers.learned_steps", "qsim_core.formats.rounding", "qsim_core.simulation.site_state"),
    "listing": ("qsim_core.cli.components",),
    "lowering": ("qsim_fast.arithmetics",),
    "metrics": ("qsim_core.evaluation.metrics",),
    "models": ("qsim_core.evaluation.locate",),
    "named": ("qsim_fast.tensor_cores", "qsim_fast.arithmetics"),
    "native": ("qsim_fast.kernels.native",),
    "new_plugin": ("qsim_new_plugin",),
    "numerics": ("qsim_core.formats.rounding",),
    "observers": ("qsim_core.quantizers.observers",),
    "offload": ("qsim_core.transforms.offload",),
    "ops": ("qsim_core.matmuls.call", "qsim_core.matmuls.layout", "qsim_core.matmuls.operators"),
    "options": ("qsim_core.cli.options",),
    "pretrained": ("qsim_transformers.pretrained",),
    "products": ("qsim_core.sites.simulated_product",),
    "products_gpu": ("qsim_fast.kernels.products_triton",),
    "progress": ("qsim_core.cli.progress",),
    "quantizer": ("qsim_core.formats.quantizer", "qsim_core.quantizers.stacked"),
    "randomness": ("qsim_core.formats.random_bits",),
    "ranges": ("qsim_core.quantizers.calibrators",),
    "recipe": ("qsim_core.simulation.recipe", "qsim_core.sites.plan"),
    "remember": ("qsim_fast.identity_cache",),
    "report": ("qsim_core.cli.result_table", "qsim_core.cli.evaluate", "qsim_core.cli.recipe_options"),
    "result": ("qsim_core.evaluation.result", "qsim_core.simulation.environment"),
    "reuse": (
        "qsim_core.simulation.cache_entry",
        "qsim_core.simulation.statistics_cache",
        "qsim_core.evaluation.baseline_cache",
    ),
    "running": ("qsim_core.sites.call_stack", "qsim_core.sites.site"),
    "scaling": ("qsim_core.quantizers.scheme",),
    "schemes": ("qsim_core.quantizers.standard_schemes", "qsim_core.sites.core_components"),
    "scratch": ("qsim_core.sites.workspace",),
    "significands": ("qsim_fast.significands",),
    "simulation": ("qsim_core.simulation.simulation",),
    "site_state": ("qsim_core.simulation.site_state",),
    "sites": ("qsim_core.sites.sites",),
    "spec": ("qsim_core.components.syntax",),
    "static": ("qsim_core.simulation.static_calibration",),
    "store": ("qsim_core.files", "qsim_core.simulation.cache_entry"),
    "structure": ("qsim_structure.structure",),
    "tensorfile": ("qsim_tensorfile.rounding", "qsim_tensorfile.header"),
    "tracing": ("qsim_structure.tracing",),
    "trained": ("qsim_core.evaluation.trained",),
    "trainer": ("qsim_finetune.trainer",),
    "transforming": ("qsim_core.transforms.applying",),
    "trial": ("qsim_core.sites.simulated_product",),
    "weights": ("qsim_core.sites.quantized_weights",),
}
"""Old module of the core -> the modules that have its names now."""
RENAMED = {"Fixed": ("StaticScheme",), "Form": ("Lowering",), "Watcher": ("MatmulWatcher", "OperatorWatcher")}
"""Old name -> the names that it has now, each in another module."""


class MovedModules:
    """Finds the old modules; it stands last on `sys.meta_path`, so only a name that is not found gets here."""

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        """The alias of a module of 0.1; None for any other name. Raises `ImportError` if it has left the core."""
        package, _, old = name.partition(".")
        if package != CORE or old not in MOVED:
            return None
        left = [place for place in MOVED[old] if place.partition(".")[0] != CORE]
        if left:
            distribution = left[0].partition(".")[0].replace("_", "-")
            raise ImportError(f"{name} has moved to {_listed(left)} (pip install {distribution})", name=name)
        from importlib.machinery import ModuleSpec

        return ModuleSpec(name, cls)  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: Any) -> None:
        """Leave it to Python to make the module."""

    @staticmethod
    def exec_module(module: types.ModuleType) -> None:
        """Make a module an alias that looks names up in the new modules."""
        warnings.warn(_sentence(module.__name__), DeprecationWarning, stacklevel=2)
        vars(module)["__getattr__"] = lambda name: _look_up(module.__name__, name)


def names_of_0_1(package: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package that was a module in 0.1: it finds the names of that module."""

    def find(name: str) -> Any:
        from importlib.util import find_spec

        if name.startswith("__") or find_spec(f"{package}.{name}") is not None:  # a submodule is imported by itself
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = _look_up(package, name)
        warnings.warn(_sentence(package), DeprecationWarning, stacklevel=2)
        setattr(sys.modules[package], name, found)
        return found

    return find


def install() -> None:
    """Let old modules be found, once."""
    if MovedModules not in sys.meta_path:
        sys.meta_path.append(MovedModules)


def _look_up(module: str, name: str) -> Any:
    """The object of this name in the new modules of an old one. Raises `AttributeError`."""
    if not name.startswith("__"):
        for place in MOVED[module.partition(".")[2]]:
            found = importlib.import_module(place)
            for known_as in (name, *RENAMED.get(name, ())):
                if hasattr(found, known_as):
                    return getattr(found, known_as)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def _sentence(module: str) -> str:
    return f"{module} has moved to {_listed(MOVED[module.partition('.')[2]])}"


def _listed(places: Sequence[str]) -> str:
    *others, last = places
    return f"{', '.join(others)} and {last}" if others else last
