"""Apply a recipe's transforms in their order, each on the result of the one before. A transform must change something.

Weights that are pinned, that have factors beside them, or whose inputs have static scales stay: a later transform may
pin them, and is refused if it changes one otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

from qsim_core.errors import RecipeError
from qsim_core.sites.sites import Sites
from qsim_core.snapshots import digest, stored_as
from qsim_core.transforms.context import Context
from qsim_core.transforms.offload import state
from qsim_core.transforms.report import LayerReport
from qsim_core.transforms.transform import Transform


def apply_transforms(transforms: Iterable[tuple[Transform, Context]], model: nn.Module, sites: Sites) -> None:
    """Apply each with its context. Raises `RecipeError` for one that changes nothing, or what is settled already."""
    for name, tensor in state(model):
        if (form := stored_as(tensor)) is not None:
            raise RecipeError(
                f"{name} is stored as {form}; transforms change values: apply them to a model of plain tensors"
            )
    before = _digests(model)
    for transform, context in transforms:
        stood, settled, pinned = _standing(sites), _settled(sites, before), set(sites.weights.pinned)
        with torch.no_grad():
            transform.apply(model, context)
        after = _digests(model)
        changed = {name for name, digest in after.items() if digest != before[name]}
        stands = _standing(sites)
        context.reports = _with_changes(context.reports, changed | {one[0] for one in stands if one not in stood})
        if not changed and stands == stood:
            raise RecipeError(f"{transform} changed nothing in this model: {_why(context)}")
        late = sorted(changed & settled - (sites.weights.pinned - pinned))
        if late:
            raise RecipeError(
                f"{transform} would change {late[0]}, which an earlier transform has put on its grid, split in parts, "
                f"or found scales for the inputs of; put {transform} before that one"
            )
        before = after


def _with_changes(reports: Iterable[LayerReport], changed: Collection[str]) -> list[LayerReport]:
    """Say in each report if its layer changed; `changed` names parameters and sites."""
    paths = {path for name in changed for path in (name, name.rpartition(".")[0])}
    return [report.model_copy(update={"changed": report.layer in paths}) for report in reports]


def _digests(model: nn.Module) -> dict[str, str]:
    """A digest of every parameter and buffer."""
    return {name: digest([(name, tensor)]) for name, tensor in state(model)}


def left_behind(sites: Sites, hooks: int) -> str:
    """Describe anything that transforms have left beside changed weights and scales at sites; empty if nothing."""
    for name, plan, fixed, rotations, *_ in _standing(sites):  # noise in training is no part of what was trained
        if plan or fixed or rotations:
            return f"a transform has left {'rotations' if rotations else 'quantizers of its own'} at {name}"
    if needed := needed_beside(sites, hooks):
        return needed
    if sites.weights.pinned:
        return f"a transform has put {min(sites.weights.pinned)} on its grid for good"
    return ""


def needed_beside(sites: Sites, hooks: int) -> str:
    """Describe what transforms have left without which the changed weights compute something else; empty if nothing."""
    for site in sites.table.values():
        if site.weight and (site.rotations or site.beside):
            return f"a transform has left {site.beside or 'rotations'} at {site.name}"
    return f"a transform has left {hooks} hooks on the model" if hooks else ""


def _standing(sites: Sites) -> list[Any]:
    """List everything at the sites beside the recipe's quantizers."""
    stands = []
    for site in sites.table.values():
        plan = None if site.plan == sites.recipe.plan(site.names) else site.plan
        if plan or site.fixed or site.rotations or site.beside or site.in_training:
            stands.append((site.name, plan, dict(site.fixed), dict(site.rotations), site.beside, site.in_training))
    return stands


def _settled(sites: Sites, names: Iterable[str]) -> set[str]:
    """Name the weights that must stay: pinned and split ones, all but biases once an input has a transform's scale."""
    if any(site.fixed for site in sites.table.values()):
        return sites.weights.pinned | {name for name in names if not name.endswith("bias")}
    return sites.weights.pinned | {site.weight for site in sites.table.values() if site.weight and site.beside}


def _why(context: Context) -> str:
    """Say why a transform did nothing, followed by its hints."""
    reasons = list(dict.fromkeys(report.note for report in context.reports if report.note))
    why = "; ".join(reasons[:3]) or "it found nothing to do"
    if len(reasons) > 3:
        why += f"; and {len(reasons) - 3} more"
    return "; ".join([why, *context.hints])
