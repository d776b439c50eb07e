"""The base class of methods that learn the rounding of a block's weights from the block's output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from qsim_core import RecipeError, Scheme, Transform
from qsim_core.errors import one_line
from qsim_core.formats.rounding import working
from qsim_core.matmuls.call import Call
from qsim_core.matmuls.layout import Layout, layout_of
from qsim_core.quantizers.scales import Scales
from qsim_core.sites.quantized_weights import READ
from qsim_core.sites.site import Site
from qsim_core.transforms.blocks import Block, block_paths
from qsim_core.transforms.context import Context, MatmulWeight
from qsim_core.transforms.forward import as_in_evaluation
from qsim_rounding.cells import Grid

MEASURE = "relative error of the block's output"


class Choice(ABC):
    """The rounding of the elements of one weight, as far as it is learned."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    @property
    @abstractmethod
    def learned(self) -> list[Tensor]:
        """The tensors that are learned; each requires a gradient."""

    @abstractmethod
    def soft(self) -> Tensor:
        """The rows with a gradient, as they are while they are learned."""

    @abstractmethod
    def hard(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The rows on their grid, their scales and their zero points [..., B, 1]."""


@dataclass
class Layer:
    """A weight of a block that is learned."""

    weight: MatmulWeight
    layout: Layout
    grid: Grid
    tokens: int = 0

    def put(self, rows: Tensor) -> None:
        """Give the parameter these rows."""
        self.weight.parameter.data.copy_(self.layout.back(rows))


class LearnedRounding(Transform):
    """Learns, block by block, to which of its two neighbours each element of a weight is rounded.

    The block's output for the inputs that rounded blocks give it is to be that of the original model.
    """

    steps: int = Field(200, gt=0, description="steps for each block")
    batch: PositiveInt = Field(8, description="calibration batches in a step")

    @abstractmethod
    def choice(self, grid: Grid) -> Choice:
        """The choice from which the learning of one weight starts."""

    @abstractmethod
    def learn(self, choices: Sequence[Choice], gradients: Iterator[tuple[float, list[Tensor]]]) -> None:
        """Change what is learned, step by step.

        In each step `gradients` gives the mean squared error of a row of the block's output. It also gives its
        gradients by the soft rows of the choices.
        """

    def apply(self, model: nn.Module, context: Context) -> None:
        """Learn and pin every weight that a scheme rounds in a block. Raises `DataError` without calibration data."""
        weights = {}
        paths = block_paths(model, context.all_sites) if context.batches else []
        for weight in context.weights():
            if reason := _why_left_alone(weight, paths, context):
                context.report(weight.site.name, note=f"left alone: {reason}")
            else:
                weights[weight.name] = weight
        for block in context.blocks(originals=True) if weights else ():
            layers = _layers(block, weights, context)
            if layers:
                self._learn_block(block, layers, context)

    def _learn_block(self, block: Block, layers: list[Layer], context: Context) -> None:
        assert block.original is not None
        targets = block.original.hidden
        for target in targets:
            if not isinstance(target, Tensor) or not target.is_floating_point():
                why = f"{block.path or 'the model'} gives a {type(target).__name__}, and no tensor that has an error"
                for layer in layers:
                    context.report(layer.weight.site.name, note=f"left alone: {why}")
                return
        with context.timed() as seconds, as_in_evaluation(block.module):
            choices = [self.choice(layer.grid) for layer in layers]
            for layer in layers:
                layer.put(layer.weight.quantizer.quantize(layer.grid.rows))
            before = _error(block, targets)
            with context.run.count(self.steps, 0, f"{self.name} {block.path}") as show, torch.enable_grad():
                self.learn(choices, self._gradients(block, layers, choices, targets, context, show))
            outcomes = [choice.hard() for choice in choices]
            for layer, outcome in zip(layers, outcomes, strict=True):
                layer.put(outcome[0])
            after = _error(block, targets)
        for layer, outcome in zip(layers, outcomes, strict=True):
            self._finish(layer, outcome, context, before=before, after=after, seconds=seconds() / len(layers))

    def _gradients(
        self,
        block: Block,
        layers: list[Layer],
        choices: list[Choice],
        targets: list[Tensor],
        context: Context,
        show: object,
    ) -> Iterator[tuple[float, list[Tensor]]]:
        """Give the squared error of a row of the block's output, and its gradients by the soft rows, in each step."""
        generator = torch.Generator().manual_seed(context.run.seed)
        order: list[int] = []
        parameters = [layer.weight.parameter for layer in layers]
        for _ in range(self.steps):
            total, sums = 0.0, [torch.zeros_like(parameter) for parameter in parameters]
            with torch.no_grad():
                for layer, choice in zip(layers, choices, strict=True):
                    layer.put(choice.soft())
            count = min(self.batch, len(block.inputs))
            while len(order) < count:
                order += torch.randperm(len(block.inputs), generator=generator).tolist()
            chosen, order = order[:count], order[count:]
            for sample in chosen:
                with _learning(parameters):
                    loss = working(block.output(sample) - targets[sample]).square().sum(-1).mean() / count
                    found = self._gradient(loss, parameters)
                total += float(loss.detach())
                for gathered, gradient in zip(sums, found, strict=True):
                    if gradient is not None:
                        gathered += gradient
            show(f"error {total:.3g}")  # type: ignore[operator]
            yield total, [layer.layout.rows(x) for layer, x in zip(layers, sums, strict=True)]

    def _gradient(self, loss: Tensor, parameters: list[nn.Parameter]) -> Sequence[Tensor | None]:
        """The gradients of a loss by parameters. Raises `RecipeError` for a model that has none."""
        try:
            return torch.autograd.grad(loss, parameters, allow_unused=True)
        except RuntimeError as error:  # such as an operator without a derivative
            raise RecipeError(
                f"{self.name} needs gradients, and this model has none: {one_line(error).partition('. Hint')[0]}"
            ) from None

    def _finish(
        self, layer: Layer, outcome: tuple[Tensor, Tensor, Tensor | None], context: Context, **found: float
    ) -> None:
        rows, scale, zero = outcome
        scheme, kept = layer.grid.scheme, Scales.of(scale, zero)
        of_scales = None if layer.grid.of_scales is None else layer.grid.of_scales.by_rows()
        whole_rows = isinstance(scheme.granularity, int | str)
        context.pin(layer.weight, *((kept, of_scales) if whole_rows else ()))
        if layer.tokens < rows.shape[-1]:
            few = f"saw {layer.tokens} tokens, fewer than its {rows.shape[-1]} columns: give more samples"
            context.warn(layer.weight.site.name, few)
        context.report(layer.weight.site.name, measure=MEASURE, **found)


class _learning:
    """Inside, these parameters require a gradient."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.before = [parameter.requires_grad for parameter in parameters]

    def __enter__(self) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def __exit__(self, *error: object) -> None:
        for parameter, before in zip(self.parameters, self.before, strict=True):
            parameter.requires_grad_(before)


def flat(choices: Sequence[Choice]) -> list[Tensor]:
    """Everything that is learned."""
    return list(chain.from_iterable(choice.learned for choice in choices))


def _why_left_alone(weight: MatmulWeight, paths: list[str], context: Context) -> str | None:
    """Return the reason why a weight cannot be learned; None if it can."""
    state, uses = context.sites.weights, context.sites.weights.uses.get(weight.name, ())
    scheme = weight.quantizer
    if weight.name in state.pinned:
        return "it lies on its grid already"
    if weight.name in state.tied or len(uses) > 1 or READ in uses:
        return "it has another use, which would change with it"
    if not isinstance(scheme, Scheme) or type(scheme).quantize is not Scheme.quantize:
        return f"{scheme} does not round each element under a scale"
    if weight.parameter.is_inference():
        return "it was made under torch.inference_mode, and has no gradient"
    if scheme.draws or scheme.learns:
        return f"{scheme} draws random numbers, or learns its scales"
    if not any(not path or weight.name.startswith(f"{path}.") for path in paths):
        return "it stands outside of the blocks"
    return None


def _layers(block: Block, weights: dict[str, MatmulWeight], context: Context) -> list[Layer]:
    """The weights that a block multiplies by as a whole."""
    found: dict[str, Layer] = {}
    refused: dict[str, str] = {}

    def watch(site: Site, call: Call) -> None:
        weight = weights.get(site.weight or "")
        if weight is None or call.weight is None or weight.name in refused:
            return
        parameter = weight.parameter
        layout = layout_of(parameter, call.operands[call.weight], call.layouts[call.weight])
        if layout is None or call.operands[call.weight].shape != parameter.shape or parameter.dim() != 2:
            refused[weight.name] = "it is not multiplied as one matrix"
            return
        if weight.name not in found:
            assert isinstance(weight.quantizer, Scheme)
            rows = layout.rows(parameter.detach()).clone()
            found[weight.name] = Layer(weight, layout, Grid(rows, weight.quantizer))
        found[weight.name].tokens += call.input.shape[:-1].numel()

    block.observe(watch)
    refused |= {name: "no calibration sample reached it" for name, layer in found.items() if not layer.tokens}
    for name, reason in refused.items():
        context.report(weights[name].site.name, note=f"left alone: {reason}")
    return [layer for name, layer in found.items() if name not in refused]


def _error(block: Block, targets: list[Tensor]) -> float:
    """The relative error of a block's outputs, over all batches."""
    error = whole = 0.0
    for sample, target in enumerate(targets):
        error += float((block.output(sample) - target).double().square().sum())
        whole += float(target.double().square().sum())
    return (error / whole) ** 0.5 if whole else 0.0
