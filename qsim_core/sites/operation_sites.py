"""The sites of operations between products: each is named by its module, its kind and a count.

`model.layers.0.self_attn:softmax.0` is the first softmax that this module computes itself. The sites are there only if
a recipe names operations, and then all of them are listed. A plugin meets and computes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.overrides import TorchFunctionMode

from qsim_core.formats.quantizer import Quantizer
from qsim_core.operations.functions import OperationCall
from qsim_core.sites.plan import OperationPlan

OperationObserver = Callable[["OperationSite", str, Tensor, Tensor, Quantizer | None], None]
"""Called with the site, the role (input, implementation or output), the tensor before and after, and its quantizer."""
OperationWatcher = Callable[["OperationSite", OperationCall, Tensor], None]
"""Called with the site, the call and its result."""


@dataclass
class OperationSite:
    """One operation of a module."""

    name: str
    kinds: tuple[str, ...]
    plan: OperationPlan
    calls: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Its own name, and those of its kinds."""
        return self.name, *self.kinds


class OperationSites:
    """The sites of all operations of one model. This class has none: a recipe without operations leaves all to torch.

    A class that computes operations is the function `operation_sites` of a plugin. It takes the recipe.
    """

    functions: ClassVar[frozenset[Callable[..., Any]]] = frozenset()
    """The torch functions that are looked at."""

    def __init__(self) -> None:
        self.table: dict[str, OperationSite] = {}
        self.observer: OperationObserver | None = None
        self.watcher: OperationWatcher | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "observer": None, "watcher": None}

    def enter(self, sites: Any, frame: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Meet a module that is an operation itself; give other arguments for it, or None."""
        return None

    def leave(self, sites: Any, frame: Any, output: Any) -> Any:
        """Give another result of such a module, or None."""
        return None

    def meet(
        self, sites: Any, mode: TorchFunctionMode, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Compute a call of one of the functions, in a forward that `sites`, the `Sites` of its products, follow.

        Inside `mode` the functions that it calls are met too.
        """
        return sites.watch(function, args, kwargs)

    def check(self) -> None:
        """Raise `RecipeError` if the recipe names an operation that was not met."""
