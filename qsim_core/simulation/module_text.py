"""The text of a module in `print(model)`, with the quantizers at its sites."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from qsim_core.sites.site import Site
from qsim_core.sites.sites import Sites, functional


class ModuleText:
    """Stands in place of a module's `extra_repr`: the module's own text, then the quantizers at its sites."""

    def __init__(self, sites: Sites, path: str, module: nn.Module) -> None:
        self.sites, self.path, self.module = sites, path, module

    def __call__(self) -> str:
        own = type(self.module).extra_repr(self.module)
        return ", ".join(part for part in (own, *self._weighted(), *self._products()) if part)

    def _weighted(self) -> Iterator[str]:
        """The sites of this module's own weights, and of those of children that print without `extra_repr`."""
        for site in self.sites.table.values():
            if site.weight is None:
                continue
            owner, _, parameter = site.weight.rpartition(".")
            if owner == self.path and _tells(self.module):
                yield from _texts(*_quantizers(site), "" if parameter == "weight" else parameter)
            elif owner.rpartition(".")[0] == self.path and owner and not _tells(self._child(owner)):
                yield from _texts(*_quantizers(site), owner.rpartition(".")[2])
        if not self.sites.table and isinstance(self.module, nn.Linear | nn.modules.conv._ConvNd):
            plan = self.sites.recipe.plan([self.path])
            yield from _texts(plan.weight, [plan.input] if plan.input else [], plan.output, "")

    def _child(self, path: str) -> nn.Module | None:
        return self.module._modules.get(path.rpartition(".")[2])

    def _products(self) -> Iterator[str]:
        for site in functional(self.sites, self.path):
            label = (site.aliases or [site.name])[0].rpartition(":")[2]
            yield from _texts(None, site.inputs, site.plan.output, label)


def _tells(module: nn.Module | None) -> bool:
    """Tell if a module's text includes its `extra_repr`; transformers' Conv1D, for one, writes its own."""
    return type(module).__repr__ is nn.Module.__repr__


def _quantizers(site: Site) -> tuple[Any, Sequence[Any], Any]:
    """The quantizers of a site's weight, inputs and output."""
    return site.plan.weight, site.inputs, site.plan.output


def _texts(weight: Any, inputs: Sequence[Any], output: Any, label: str) -> Iterator[str]:
    """The quantizers as text, after the label if there is one."""
    quantizers = {"weight": weight, "input": ", ".join(map(str, inputs)) or None, "output": output}
    texts = [f"{role}={quantizer}" for role, quantizer in quantizers.items() if quantizer is not None]
    if texts:
        yield f"{label}: {' '.join(texts)}" if label else ", ".join(texts)
