"""Learned rotations: `spinquant()` turns what norms give, and v within its heads, to where rounding costs least."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import partial

from pydantic import Field
from qsim_structure import Attention
from qsim_structure.folding import rotated_columns, rotated_rows
from qsim_structure.for_transforms import structure_of
from torch import nn

from qsim_core import RecipeError, Transform
from qsim_core.transforms.context import Context
from qsim_hadamard.attention import names_behind, rotate_scores, rotations_of_values
from qsim_hadamard.learning import Changes, check_dynamic, learn
from qsim_hadamard.maps import Blocks, learnable, rotation
from qsim_hadamard.matrices import unknown
from qsim_hadamard.rotatable import Rotatable, Size, Survey, fold_norms, survey

MEASURE = "divergence of the model's output from the unquantized one, with the first rotations and the learned ones"


class SpinQuant(Transform):
    """Learns the rotation of what norms give, and of v within its heads; rotates all else as `hadamard` does.

    R₁ is one rotation for all weights that read norms of one width. R₂ is one for each layer's v and the weight behind
    it. Both begin as randomized Hadamard matrices. Each step runs one calibration sample through the quantized model,
    with straight-through gradients G of the loss, and moves each rotation R, which stays orthogonal:

        S = ½ (Rᵀ G - Gᵀ R),   α = min(1 / ‖S‖₁, lr),   R ← R (I - α/2 S)(I + α/2 S)⁻¹

    lr falls to 0 as a cosine. The loss is the divergence of the logits from the unquantized model's. For an output
    without logits it is the relative squared error. Source: SpinQuant (arXiv 2405.16406), section 3.
    """

    name = "spinquant"
    steps: int = Field(100, ge=1, description="of learning, each with one calibration sample")
    lr: float = Field(1.5, gt=0, description="the longest step")
    seed: int = Field(0, ge=0, description="of the random signs that learning begins with")
    attention: bool = Field(True, description="rotate q and k too, along the head, without learning")
    size: Size = Field(
        "whole", description="of what is rotated together: whole (all of a row), block (a block of the formats), or n"
    )

    def apply(self, model: nn.Module, context: Context) -> None:
        """Rotate every weight that is quantized or whose input is, and say which were left alone, and why.

        Raises `DataError` without calibration data, and `RecipeError` where nothing can be learned. So does a transform
        before it that has put such a weight on its grid, and a size that does not divide its inputs.
        """
        found = survey(self, self.size, model, context)
        check_dynamic(self, context)
        values = rotations_of_values(found, context, self._within_a_head)
        behind = {name for attention in values for name in names_behind(attention)}
        streams = _streams(found, behind, context)
        if not streams and not values:
            raise RecipeError(
                f"{self} finds no norm that weights alone read, and no v that it can rotate; use hadamard"
            )
        if self.attention:
            rotate_scores(found, self.size, self.seed, context)
        fold_norms(model, found, context)
        of_streams = {key: learnable(key[0], self.seed, key[1]) for key in streams}
        inputs = {weight.name: turn for key, turn in of_streams.items() for weight in streams[key]}
        notes = dict.fromkeys(inputs, "the rotation of its input is learned")
        notes |= dict.fromkeys(behind, "the rotation of its input is learned, and folded into v")
        changes: Changes = defaultdict(list)
        for name, weight in found.weights.items():
            if name in inputs:
                weight.site.rotations["input"] = inputs[name]
                changes[name].append(partial(weight.changed, inputs[name]))
            elif name not in behind:
                weight.turn(model, context, rotation(weight.length, self.seed, weight.size))
        for attention, turn in values.items():
            _fold_into(changes, attention, turn)
        peaks = {name: found.weights[name].peak(model) for name in notes}
        before, after = learn(context, [*of_streams.values(), *values.values()], changes, self.steps, self.lr)
        for name, note in notes.items():
            weight = found.weights[name]
            weight.report(context, peaks[name], weight.peak(model), note)
        for (length, _), weights in streams.items():
            note = f"{self.steps} steps; one rotation for the inputs of {len(weights)} weights, of {length} each"
            context.report(weights[0].site.name, before=before, after=after, measure=MEASURE, note=note)

    def _within_a_head(self, head: int, size: int) -> Blocks | None:
        along = head if self.size == "whole" else size
        return None if head % along or unknown(along) else learnable(head, self.seed, along)


def _streams(found: Survey, behind: Iterable[str], context: Context) -> dict[tuple[int, int], list[Rotatable]]:
    """The weights that read norms, by length and size; those behind v are rotated within heads."""
    streams: dict[tuple[int, int], list[Rotatable]] = defaultdict(list)
    for group in structure_of(context).groups:
        for name in group.weights:
            weight = found.weights.get(name)
            if weight is not None and name not in behind:
                streams[weight.length, weight.size].append(weight)
    return streams


def _fold_into(changes: Changes, attention: Attention, turn: Blocks) -> None:
    """Rotate the rows of v, its biases, and the columns of the weights behind it."""
    value = attention.value
    for name, axis in ((value.producer, value.axis), *((bias, -1) for bias in value.biases)):
        changes[name].append(partial(rotated_rows, axis=axis, heads=value.distinct, rotation=turn))
    for use in value.uses:
        changes[use.weight].append(partial(rotated_columns, axis=use.axis, size=attention.head_size, rotation=turn))
