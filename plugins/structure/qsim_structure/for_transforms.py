"""Structure for qsim's transforms: trace a context's model, and fold weights wherever they are kept.

The functions are those of `qsim_structure.folding`, for models whose weights accelerate keeps elsewhere too. An error
is a `qsim_core.ModelError`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qsim_core import Context, ModelError
from qsim_core.transforms.forward import as_in_evaluation, call
from qsim_core.transforms.offload import at_hand, editing
from qsim_structure import folding
from qsim_structure.equivalence_check import Edit, refuse_changed_products
from qsim_structure.errors import StructureError
from qsim_structure.heads import Attention, Projection
from qsim_structure.structure import CHECKS, Check, NormGroup, Structure, WeightPair, trace

HINT = "`qsim structure` shows what tracing found, simulate(…, structure={norm: [weights]}) declares the rest"
"""The text that follows the message of a transform that changed nothing."""

_TRACED: WeakKeyDictionary[Context, dict[tuple[Check, ...], Structure]] = WeakKeyDictionary()


def structure_of(context: Context, *checks: Check) -> Structure:
    """Return the structure of a context's model. It is traced on the context's example at the first call.

    `checks` are those of `qsim_structure.trace`; all without any.
    """
    traced = _TRACED.setdefault(context, {})
    if checks not in traced:
        if any(site.rotations or site.beside for site in context.all_sites):
            context.hint(
                f"an earlier transform rotates inputs or splits weights, and nothing folds through that: put "
                f"{context.name} first"
            )
        context.hint(HINT)
        traced[checks] = trace_example(context.model, context.example, context.declared, checks or CHECKS)
    return traced[checks]


def trace_example(
    model: nn.Module,
    example: Any,
    declared: Mapping[str, Sequence[str]] | None = None,
    checks: Collection[Check] = CHECKS,
) -> Structure:
    """Trace a model on one batch, with its weights brought into memory. Raises `ModelError`."""

    def run() -> Any:
        with as_in_evaluation(model):
            return call(model, example)

    with _as_model_error(), at_hand(model):
        return trace(model, run, declared, checks=checks)


def scale_group(model: nn.Module, group: NormGroup, factors: Tensor) -> None:
    """Divide a norm's channels by `factors` [size] and multiply the columns that read them; the function stays."""
    with _as_model_error():
        folding.scale_group(model, group, factors, editing)


def scale_pair(model: nn.Module, pair: WeightPair, factors: Tensor) -> None:
    """Divide the rows of the producer, and its biases, by `factors` [size], and multiply the columns that read them."""
    with _as_model_error():
        folding.scale_pair(model, pair, factors, editing)


def permute_group(model: nn.Module, group: NormGroup, order: Tensor) -> RemovableHandle:
    """Put a norm's channels, and the columns that read them, in another order; the function stays.

    A hook reorders the norm's input. Add the handle that is returned to `context.handles`.
    """
    with _as_model_error():
        return folding.permute_group(model, group, order, editing)


def permute_rows(model: nn.Module, rows: WeightPair | Projection, order: Tensor) -> None:
    """Put the channels of a weight and its partners, and the columns that read them, in another order."""
    with _as_model_error():
        folding.permute_rows(model, rows, order, editing)


def permute_scores(model: nn.Module, attention: Attention, places: Sequence[Tensor]) -> None:
    """Put the channels of q and k in another order within their heads, `places` [size of a head] for each head of k."""
    with _as_model_error():
        folding.permute_scores(model, attention, places, editing)


def rotate_values(model: nn.Module, value: Projection, rotation: Callable[[Tensor], Tensor]) -> None:
    """Rotate the channels of each head of v, and the columns that read them. Try it with `rotatable_values` first."""
    with _as_model_error():
        folding.rotate_values(model, value, rotation, editing)


def rotatable_values(
    context: Context, rotations: Mapping[Attention, Callable[[Tensor], Tensor]]
) -> dict[Attention, str]:
    """Try `rotate_values` on the context's example: the reason why not for each attention, empty where it can be.

    It can be where every product of the model stays, except those that make v.
    """
    model, edits = context.model, []
    reasons = dict.fromkeys(rotations, "")

    def run() -> Any:
        with as_in_evaluation(model):
            return call(model, context.example)

    for attention, rotation in rotations.items():
        value = attention.value
        if value.reasons or value.partners or not value.uses:
            reasons[attention] = "; ".join(value.reasons) or "its channels are multiplied with others, or not read"
            continue
        touched = frozenset({value.producer, *value.biases, *(use.weight for use in value.uses)})
        edit = partial(folding.rotate_values, model, value, rotation)
        edits.append(Edit(edit, touched, frozenset({value.producer}), partial(reasons.__setitem__, attention)))
    with _as_model_error(), at_hand(model):
        refuse_changed_products(model, run, edits, "a product of the model changes")
    return reasons


@contextlib.contextmanager
def _as_model_error() -> Iterator[None]:
    try:
        yield
    except StructureError as error:
        raise ModelError(str(error)) from error
