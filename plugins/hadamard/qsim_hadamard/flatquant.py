"""FlatQuant: `flatquant()` learns, for each input, two small matrices whose Kronecker product maps it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pydantic import Field, PositiveInt
from qsim_structure.for_transforms import structure_of
from torch import Tensor, nn

from qsim_core import Transform
from qsim_core.matmuls.call import Call
from qsim_core.sites.site import Site
from qsim_core.transforms.blocks import Block, Originals, walk
from qsim_core.transforms.context import Context
from qsim_core.transforms.forward import as_in_evaluation
from qsim_hadamard.learning import Changes, backpropagate, check_dynamic, originals_of, put, quantized
from qsim_hadamard.maps import Kronecker, rotation
from qsim_hadamard.matrices import unknown
from qsim_hadamard.rotatable import Rotatable, survey

MEASURE = "relative error of the block's output, with the first matrices and the learned ones"


class FlatQuant(Transform):
    """Puts Lᵀ (X s) R in place of each row x, as a matrix X, and its inverse into the weights; L, R and s are learned.

    All weights that read one norm share L, R and s. L and R begin as Hadamard matrices with random signs, and s as
    max|w|^(1 - alpha) / max|x|^alpha. Block by block, AdamW minimizes the squared error of the block's output under the
    recipe. Gradients pass quantizers straight, and the rate falls as a cosine. Source: FlatQuant (arXiv 2410.09426).
    """

    name = "flatquant"
    steps: PositiveInt = Field(100, description="of learning for each block")
    lr: float = Field(5e-3, gt=0, description="AdamW's highest learning rate")
    batch: PositiveInt = Field(4, description="calibration batches in a step")
    alpha: float | None = Field(0.3, ge=0, le=1, description="of the first s; none: there is no s")
    seed: int = Field(0, ge=0, description="of the random signs, and of the order of batches")

    def apply(self, model: nn.Module, context: Context) -> None:
        """Map every weight that is quantized or whose input is, and say which were left alone, and why.

        Raises `DataError` without calibration data, and `RecipeError` for static scales, or a model without gradients.
        """
        found = survey(self, "whole", model, context)
        check_dynamic(self, context)
        shared = _by_input(list(found.weights.values()), context)
        largest = _largest(shared, context)
        for block in walk(_Anew(context), Originals(context)):
            inside = {key: group for key, group in shared.items() if _stands_in(group[0], block)}
            if inside:
                maps = {key: self._first(group, largest[key], model) for key, group in inside.items()}
                self._learn(block, inside, maps, context)
                shared = {key: group for key, group in shared.items() if key not in inside}
        for key, group in shared.items():
            first = self._first(group, largest[key], model)
            for weight in group:
                weight.turn(model, context, first)

    def _first(self, group: Sequence[Rotatable], largest: Tensor, model: nn.Module) -> Kronecker:
        """The map from which learning starts."""
        length = group[0].length
        left = _near_root(length)
        scales = torch.ones(length, dtype=torch.float64)
        if self.alpha is not None:
            rows = [weight.layout.rows(model.get_parameter(weight.name)) for weight in group]
            weights = torch.stack([row.abs().double().reshape(-1, length).amax(0) for row in rows]).amax(0).cpu()
            dead = (weights == 0) | (largest == 0)
            scales = weights ** (1 - self.alpha) / largest**self.alpha
            scales = scales.clamp(min=1e-5).masked_fill(dead, 1.0)
        first, second = (_orthogonal(size, self.seed).requires_grad_() for size in (left, length // left))
        return Kronecker(first, second, scales.requires_grad_(self.alpha is not None))

    def _learn(
        self,
        block: Block,
        groups: Mapping[str, Sequence[Rotatable]],
        maps: Mapping[str, Kronecker],
        context: Context,
    ) -> None:
        """Learn the maps of a block, and leave them in its weights and at its sites."""
        assert block.original is not None
        targets = block.original.hidden  # before anything stands at the sites
        changes: Changes = defaultdict(list)
        for key, group in groups.items():
            for weight in group:
                weight.site.rotations["input"] = maps[key]
                changes[weight.name].append(partial(weight.changed, maps[key]))
        learned = [x for one in maps.values() for x in (one.left, one.right, one.scales) if x.requires_grad]
        first = [x.detach().clone() for x in learned]
        optimizer = torch.optim.AdamW(learned, lr=self.lr)
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps, self.lr * 1e-3)
        with (
            context.timed() as seconds,
            as_in_evaluation(block.module),
            originals_of(context, changes) as originals,
            context.run.count(self.steps, 0, f"{self.name} {block.path}") as show,
        ):
            put(context, originals, changes)
            before = _error(block, targets, context)
            for chosen in self._samples(len(targets)):
                with torch.enable_grad(), quantized(context):
                    losses = [(block.output(sample) - targets[sample]).square().mean() for sample in chosen]
                    loss = torch.stack(losses).mean()
                optimizer.zero_grad()
                backpropagate(context, loss, originals, changes)
                optimizer.step()
                rates.step()
                put(context, originals, changes)
                show(f"error {float(loss.detach()):.3g}")
            after = _error(block, targets, context)
            if not after < before:
                for x, kept in zip(learned, first, strict=True):
                    x.copy_(kept)
                context.warn(block.path, f"has learned nothing in {self.steps} steps: the first matrices are kept")
                after = before
            for x in learned:
                x.requires_grad_(False)
            put(context, originals, changes)
        count = sum(map(len, groups.values()))
        for key, group in groups.items():
            for weight in group:
                note = f"{maps[key]}; one pair for {len(group)} weights"
                context.report(
                    weight.name, before=before, after=after, measure=MEASURE, seconds=seconds() / count, note=note
                )

    def _samples(self, count: int) -> Iterator[list[int]]:
        """The calibration batches of each step: each once before any is drawn again."""
        generator = torch.Generator().manual_seed(self.seed)
        order: list[int] = []
        for _ in range(self.steps):
            while len(order) < min(self.batch, count):
                order += torch.randperm(count, generator=generator).tolist()
            yield order[: self.batch]
            order = order[self.batch :]


class _Anew:
    """A context that keeps no blocks for later runs: their maps stand at sites, where no run would find them."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self.context, name)

    def recall(self, index: int, block: nn.Module) -> bool:
        return False

    def remember(self, index: int, block: nn.Module) -> None:
        pass


def _by_input(weights: Sequence[Rotatable], context: Context) -> dict[str, list[Rotatable]]:
    """The weights that read the same norm together, each other one alone."""
    norms = {(name, group.size): group.norm for group in structure_of(context).groups for name in group.weights}
    found: dict[str, list[Rotatable]] = defaultdict(list)
    for weight in weights:
        found[norms.get((weight.name, weight.length), weight.name)].append(weight)
    return found


def _largest(shared: Mapping[str, Sequence[Rotatable]], context: Context) -> dict[str, Tensor]:
    """The largest magnitude of each channel of each input, float64. Raises `DataError` without calibration data."""
    keys = {weight.site.name: (key, weight.length) for key, group in shared.items() for weight in group}
    found = {key: torch.zeros(length, dtype=torch.float64) for key, length in keys.values()}

    def watch(site: Site, call: Call) -> None:
        if site.name in keys and call.input.numel():
            key, length = keys[site.name]
            here = call.input.reshape(-1, length).abs().amax(0).double().cpu()
            found[key] = torch.maximum(found[key], here)

    context.observe(watch, context.name)
    return found


def _stands_in(weight: Rotatable, block: Block) -> bool:
    return not block.path or weight.name.startswith(f"{block.path}.")


def _near_root(length: int) -> int:
    """The largest divisor of a length that is not above its root: both matrices are as small as can be."""
    return max(divisor for divisor in range(1, math.isqrt(length) + 1) if length % divisor == 0)


def _orthogonal(size: int, seed: int) -> Tensor:
    """A Hadamard matrix over √n with random signs; of a size that has none, normal numbers that are made orthogonal."""
    if unknown(size) is None:
        return rotation(size, seed, size)(torch.eye(size, dtype=torch.float64))
    generator = torch.Generator().manual_seed(seed)
    turned, upper = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    found: Tensor = turned * upper.diagonal().sign()
    return found


def _error(block: Block, targets: Sequence[Tensor], context: Context) -> float:
    """The relative error of a block's outputs under the recipe, over all batches."""
    error = whole = 0.0
    with torch.no_grad(), quantized(context):
        for sample, target in enumerate(targets):
            error += float((block.output(sample) - target).double().square().sum())
            whole += float(target.double().square().sum())
    return (error / whole) ** 0.5 if whole else 0.0
