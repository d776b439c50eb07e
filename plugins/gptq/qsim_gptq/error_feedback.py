"""The base class of methods that round column by column and compensate each error in the remaining columns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from operator import itemgetter
from typing import Any, ClassVar, NamedTuple, cast

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from qsim_core import DataError, RecipeError, Transform
from qsim_core.formats.quantizer import Quantizer
from qsim_core.formats.random_bits import at
from qsim_core.formats.rounding import working
from qsim_core.quantizers.scales import Scales
from qsim_core.sites.quantized_weights import READ
from qsim_core.transforms.blocks import block_paths
from qsim_core.transforms.context import Context, MatmulWeight
from qsim_core.transforms.offload import at_hand
from qsim_gptq.factors import Factor
from qsim_gptq.feedback import feed_back
from qsim_gptq.grids import ColumnGrid, Known, grids, why_not_by_column, why_scales_are_fixed
from qsim_gptq.hessians import Gathered, Gatherer, Moments, Part
from qsim_gptq.inputs import Unseen
from qsim_gptq.pairs import observe_beside

PORTION = 512
"""Columns of a Hessian that are multiplied at once."""
MEASURE = "relative error of the layer's output"
UNPAIRED = "inputs of the original model unknown: rounded as gptq does"


class ErrorFeedback(Transform):
    """Rounds weights block by block, each column by column to its quantizer's grid.

    A method says what the walk over the columns needs: `factor`.
    """

    paired: ClassVar[bool] = False
    """True if the method knows the inputs of the original model beside those of the model as it is rounded so far."""

    percdamp: float = Field(
        0.01, ge=0, allow_inf_nan=False, description="added to the Hessian's diagonal, as a share of its mean"
    )
    act_order: bool = Field(False, description="round columns by descending diagonal of the Hessian")
    static_groups: bool = Field(False, description="compute the scales of groups from the original weight")
    true_sequential: bool = Field(
        False, description="run a block again after each set of weights with the same input, not once for all weights"
    )
    block: PositiveInt = Field(128, description="columns whose errors are compensated together; affects only the speed")
    activations: bool = Field(False, description="quantize activations too while the inputs are observed")

    @abstractmethod
    def factor(self, moments: Moments) -> Factor:
        """The factor of a matrix whose inputs have these moments. Raises `DataError`."""

    def apply(self, model: nn.Module, context: Context) -> None:
        """Quantize and pin every weight that can be rounded. Raises `DataError` on missing or NaN calibration data."""
        weights = context.weights() if context.batches else []
        free = []
        for weight in weights:
            if reason := _why_left_alone(weight, context):
                context.report(weight.site.name, note=f"left alone: {reason}")
            else:
                free.append(weight)
        if self.activations:
            self._check_known(context)
        paths = block_paths(model, context.sites.table.values())
        inside = [any(_within(weight, path) for path in paths) for weight in free]
        start = inside.index(True) if True in inside else 0
        before = free[:start]
        after = [weight for weight, within in zip(free[start:], inside[start:], strict=True) if not within]
        blocks = context.blocks(originals=self.paired) if True in inside else ()

        def outside(weights: list[MatmulWeight]) -> None:
            with at_hand(*(model.get_submodule(weight.name.rpartition(".")[0]) for weight in weights), inside=False):
                self._quantize(weights, lambda watch: context.observe(watch, self.name), context, paired=False)

        with context.quantized_activations() if self.activations else nullcontext():
            outside(before)
            for block in blocks:
                observe: Callable[[Any], None] = partial(observe_beside, block) if self.paired else block.observe
                own = [weight for weight in free if _within(weight, block.path)]
                self._quantize(own, observe, context, self.paired)
            outside(after)

    def _check_known(self, context: Context) -> None:
        """Raise `RecipeError` if the scale of an input is found after all transforms."""
        for site in context.all_sites:
            for role in site.input_roles:
                planned = site.planned(role)
                if planned is not None and role not in site.fixed and planned.needs_held_scales(role):
                    raise RecipeError(
                        f"{self} comes before the static scale of {site.name} is known; set activations=false"
                    )

    def _quantize(
        self, weights: list[MatmulWeight], observe: Callable[[Gatherer], None], context: Context, paired: bool
    ) -> None:
        """Quantize the weights of one block, observing its inputs once or once for each set with the same input."""
        while weights:
            leader = weights[0] if self.true_sequential else None
            gatherer = Gatherer(weights, leader, paired, context.with_quantized_inputs if self.activations else None)
            observe(gatherer)
            found = gatherer.found
            done = weights if leader is None else [w for w in weights if w is leader or _same(found, w, leader)]
            factors = _Factors(self)
            for weight in done:
                self._finish(weight, found.pop(weight.name), factors, context)
            weights = [weight for weight in weights if weight not in done]

    def _finish(self, weight: MatmulWeight, gathered: Gathered, factors: _Factors, context: Context) -> None:
        """Quantize one weight, pin it, and report its errors."""
        name = weight.site.name
        try:
            parts = gathered.complete(weight.parameter)
        except Unseen as error:
            context.report(name, note=f"left alone: {error}")
            return
        quantizer = weight.quantizer
        assert quantizer is not None
        if not quantizer.by_rows:
            parts = [expert for part in parts for expert in part.experts()]
        with context.run.stage(f"{self.name} {name}"), context.timed() as seconds:
            outcomes: list[_Outcome] = []
            scales: list[tuple[int, list[Known]]] = []
            for index, part in enumerate(parts):
                place = f"{name}:weight" if len(parts) == 1 else f"{name}:weight:{index}"
                try:
                    found, known = self._round(part, quantizer, place, factors)
                    outcomes += found
                    scales.append((int(part.operand.storage_offset()), known))
                except DataError as error:
                    raise DataError(f"{context.name} at {name}: {error}") from None
            in_order = [one for _, known in sorted(scales, key=itemgetter(0)) for one in known]
            context.pin(weight, *map(_below_each_other, zip(*in_order, strict=True)))
        notes = list(_without_tokens(parts))
        if self.paired and any(one.drift is None for part in parts for one in part.moments or ()):
            notes.append(UNPAIRED)
        for few in _too_few(parts):
            context.warn(name, few)
        notes += dict.fromkeys(note for outcome in outcomes for note in outcome.notes)
        if self._refits and isinstance(quantizer.granularity, int) and (reason := why_scales_are_fixed(quantizer)):
            notes.append(f"static groups: {reason}")
        whole = sum(outcome.whole for outcome in outcomes) or 1.0
        before = (sum(outcome.nearest for outcome in outcomes) / whole) ** 0.5
        after = (sum(outcome.fed_back for outcome in outcomes) / whole) ** 0.5
        context.report(name, before=before, after=after, measure=MEASURE, seconds=seconds(), note="; ".join(notes))

    @property
    def _refits(self) -> bool:
        return not (self.static_groups or self.act_order)

    def _round(
        self, part: Part, quantizer: Quantizer, place: str, factors: _Factors
    ) -> tuple[list[_Outcome], list[Known]]:
        """Write the quantized part into its parameter, and return the outcomes and the scales of its matrices."""
        rows, outcomes = part.rows, []
        factored: list[Factor | None] = [None] * len(part.tokens)
        columns: list[ColumnGrid] = []
        with at(place, 0):
            rounded = quantizer.quantize(rows)
        if part.moments is not None:
            weights, rounds = (working(t).reshape(len(part.tokens), -1, rows.shape[-1]) for t in (rows, rounded))
            factored = [factors.of(moments) for moments in part.moments]
            whole_rows = isinstance(quantizer.granularity, str)
            with at(place, 0):
                seen = rows if whole_rows else _without_dead(rows, factored)
                columns = grids(quantizer, seen, len(factored), self._refits, place)
            results = []
            for w, n, moments, factor, grid in zip(weights, rounds, part.moments, factored, columns, strict=True):
                q = n if factor is None else feed_back(w, factor, grid, self.block)
                results.append(q)
                whole, nearest, after = _energies(w, n, q, moments)
                notes = () if factor is None else factor.notes
                outcomes.append(_Outcome(whole, nearest, after, notes))
            rounded = torch.stack(results).reshape(rows.shape)
        if None in factored:  # these matrices are rounded to nearest
            with at(place, 0):
                own = grids(quantizer, rows, len(factored), False, place)
            columns = [n if factor is None else g for n, g, factor in zip(own, columns or own, factored, strict=True)]
        known = [grid.known for grid in columns]
        part.operand.copy_(part.layout.back(rounded))
        return outcomes, known


class _Outcome(NamedTuple):
    """Squared norms for one matrix: of its exact outputs, of the errors of round-to-nearest, and of the method's."""

    whole: float
    nearest: float
    fed_back: float
    notes: tuple[str, ...]


def _below_each_other(scales: tuple[Scales | None, ...]) -> Scales | None:
    """Join the scales of matrices that stand one below the other; None if they have none."""
    if None in scales:
        return None
    scale, zero = zip(*cast(tuple[Scales, ...], scales), strict=True)
    return Scales(torch.cat(scale), None if zero[0] is None else torch.cat(zero))


class _Factors:
    """Computes factors, and reuses the last one for equal moments, such as those of q, k and v."""

    def __init__(self, method: ErrorFeedback) -> None:
        self._method = method
        self._last: tuple[Moments, Factor] | None = None

    def of(self, moments: Moments) -> Factor | None:
        """Return the factor for the moments of a matrix; None if its input was always 0."""
        if not moments.hessian.diagonal().any():
            return None
        if self._last is None or not _equal(self._last[0], moments):
            self._last = moments, self._method.factor(moments)
        return self._last[1]


def _equal(one: Moments, other: Moments) -> bool:
    pairs = zip(one, other, strict=True)
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


def _without_dead(rows: Tensor, factors: list[Factor | None]) -> Tensor:
    """Set columns to 0 whose input was always 0, so that they do not affect the scale of a block."""
    if not any(factor is not None and factor.dead.any() for factor in factors):
        return rows
    matrices = rows.reshape(len(factors), -1, rows.shape[-1]).clone()
    for matrix, factor in zip(matrices, factors, strict=True):
        if factor is not None:
            matrix[:, factor.dead] = 0
    return matrices.reshape(rows.shape)


def _energies(weight: Tensor, nearest: Tensor, rounded: Tensor, moments: Moments) -> list[float]:
    """Compute |Y|^2 for the outputs Y of the original model, then |X M^T - Y|^2 for `nearest` and `rounded` M [N, K].

    Y = (X + D) W^T, where D is what the rows of the original model are more than X.
    """
    changes = torch.stack([weight, nearest - weight, rounded - weight])
    rows, found = changes.flatten(0, 1), torch.zeros(changes.shape[:2], dtype=torch.float64, device=weight.device)
    hessian = moments.hessian
    for first in range(0, len(hessian), PORTION):  # half of the symmetric Hessian is enough
        here = slice(first, first + PORTION)
        product = (rows[:, here] @ hessian[here, here]).addmm_(rows[:, :first], hessian[:first, here], alpha=2)
        found += torch.linalg.vecdot(product, rows[:, here]).view(found.shape)
    if moments.drift is not None and moments.spread is not None:
        drift, spread = weight @ moments.drift, torch.linalg.vecdot(weight @ moments.spread, weight)
        sign = found.new_tensor([2.0, -2.0, -2.0]).unsqueeze(1)
        found += sign * torch.linalg.vecdot(drift, changes) + spread
    return found.sum(1).clamp(min=0).tolist()


def _why_left_alone(weight: MatmulWeight, context: Context) -> str | None:
    """Return the reason why a weight cannot be rounded; None if it can."""
    state = context.sites.weights
    assert weight.quantizer is not None
    if weight.name in state.pinned:
        return "it lies on its grid already"
    if weight.name in state.tied:
        return "it is tied to another parameter, which would change with it"
    if READ in state.uses.get(weight.name, ()):
        return "the model also reads it outside a matmul, as a table or to compute a weight"
    if len(state.uses.get(weight.name, ())) > 1:
        return "it is multiplied along two axes"
    return why_not_by_column(weight.quantizer)


def _within(weight: MatmulWeight, path: str) -> bool:
    return not path or weight.name.startswith(f"{path}.")


def _same(found: dict[str, Gathered], weight: MatmulWeight, leader: MatmulWeight) -> bool:
    """Tell if both weights had the same inputs in every call."""
    a, b = (list(found[w.name].parts.values()) for w in (weight, leader))
    moments = [(x.moments, y.moments) for x, y in zip(a, b, strict=False)]
    return len(a) == len(b) > 0 and all(x and y and all(map(_equal, x, y)) for x, y in moments)


def _too_few(parts: list[Part]) -> Iterator[str]:
    """Yield a warning if matrices received fewer rows of inputs than they have columns."""
    tokens, width = [count for part in parts for count in part.tokens], parts[0].rows.shape[-1]
    few = [index for index, count in enumerate(tokens) if 0 < count < width]
    if few:
        which = "" if len(tokens) == 1 else f" for {_listed(parts, few)}"
        yield f"saw {min(tokens[i] for i in few)} tokens, fewer than its {width} columns{which}: give more samples"


def _without_tokens(parts: list[Part]) -> Iterator[str]:
    """Yield a note if the inputs of matrices were always 0."""
    tokens = [count for part in parts for count in part.tokens]
    none = [index for index, count in enumerate(tokens) if not count]
    if none:
        seen = "its input was always 0" if len(tokens) == 1 else f"no token for {_listed(parts, none)}"
        yield f"{seen}: rounded to nearest"


def _listed(parts: list[Part], numbers: list[int]) -> str:
    kind = "group" if parts[0].layout.name.startswith("taps") else "expert"
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"{kind}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:8]))}{more}"
