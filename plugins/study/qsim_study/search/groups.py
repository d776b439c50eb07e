"""Groups of sites that are shipped together, found from one forward.

Weights that read the same tensor in the same module form a group: q, k and v of one attention, or gate and up of one
MLP. Kernels hold such weights as one. The products of activations of one module form a group too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from qsim_core import Recipe, RecipeError, simulate
from qsim_core.matmuls.call import Call
from qsim_core.simulation.recipe import REACHED
from qsim_core.sites.site import Site
from qsim_core.transforms.forward import as_in_evaluation, call
from qsim_study.search.choices import Group, Offered


def groups_of(model: nn.Module, base: Recipe, offered: Offered, example: Any) -> tuple[list[Group], dict[str, int]]:
    """The groups of a model, in the order of the forward, and the elements of each weight that is quantized.

    A site is in a group if a choice changes its quantizers: it is not skipped, and no override holds them. Raises
    `RecipeError` for a format that reaches no site.
    """
    first = {key: next((one for one in several if one is not None), None) for key, several in offered.items()}
    with simulate(model, base.model_copy(update={**first, "transforms": ()}), example=example) as simulation:
        reads = _Reads()
        simulation.sites.quantizing, simulation.sites.watcher = False, reads
        try:
            with as_in_evaluation(model):
                call(model, example)
        finally:
            simulation.sites.quantizing, simulation.sites.watcher = True, None
        sites = list(simulation.sites.table.values())
    together: dict[Any, list[str]] = defaultdict(list)
    for site in sites:
        keys = tuple(key for key in offered if _takes(site, key, first[key]))
        if keys:
            together[keys, _parent(site), reads.of(site)].append(site.name)
    if not together:
        raise RecipeError("nothing to allot: overrides and skipped sites leave no site to the choices")
    groups = [Group(_name(parent, names), tuple(names), keys) for (keys, parent, _), names in together.items()]
    return groups, _elements(model, sites)


class _Reads:
    """Notes the tensor that each weight multiplies, call by call."""

    def __init__(self) -> None:
        self.met: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
        self.kept: list[Tensor] = []
        """The tensors, so that no two of them have the same address."""

    def __call__(self, site: Site, call: Call) -> None:
        read = call.operands[1 if call.weight == 0 else 0]
        self.kept.append(read)
        self.met[site.name].append((read.data_ptr(), read.shape, read.stride()))

    def of(self, site: Site) -> Any:
        return tuple(self.met[site.name]) if site.weight else None


def _takes(site: Site, key: str, quantizer: Any) -> bool:
    roles = REACHED[key] & site.recipe_roles
    return quantizer is not None and any(getattr(site.plan, role) is quantizer for role in roles)


def _parent(site: Site) -> str:
    """The path of the module that has the weight's layer, or that multiplies activations."""
    return site.name.rpartition("." if site.weight else ":")[0]


def _name(parent: str, names: Sequence[str]) -> str:
    """The names of sites in one, like `layers.0.self_attn.{q_proj,k_proj,v_proj}`."""
    if len(names) == 1:
        return names[0]
    mark = names[0][len(parent) : len(parent) + 1] if parent else ""
    return f"{parent}{mark}{{{','.join(name[len(parent) + len(mark) :] for name in names)}}}"


def _elements(model: nn.Module, sites: Sequence[Site]) -> dict[str, int]:
    """The elements of each weight that is quantized, by its full name."""
    named = (*model.named_buffers(remove_duplicate=False), *model.named_parameters(remove_duplicate=False))
    tensors: Mapping[str, Tensor] = dict(named)  # under all names of a tied one
    quantized = {site.weight for site in sites if site.weight and site.standing("weight") is not None}
    return {name: tensors[name].numel() for name in quantized}
