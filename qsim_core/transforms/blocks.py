"""A model block by block: what repeats in it, and the inputs of one block after another.

A walk keeps the inputs of one block in memory, for all calibration batches, and not the activations of the model. Where
a block takes the output of the block before it, that output is computed from the inputs at hand; where it does
not (the first of a stack, a skip connection in between), the model is run again up to it.

A walk may also give each block as it was before the walk. It then keeps a second set of inputs, those that unchanged
blocks give, and those of the first block of each stack from the beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qsim_core.matmuls.call import Call
from qsim_core.sites.site import Site
from qsim_core.transforms.forward import Copies, as_in_evaluation, call, unshared
from qsim_core.transforms.offload import at_hand
from qsim_core.transforms.run import Run

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
MatmulWatcher = Callable[[Site, Call], None]
"""Called for every matmul that is met, with its site and the call, when it is computed."""


class Walked(Protocol):
    """A model at work, as `Context` has it: its sites, its calibration data, and what an earlier run has finished."""

    model: nn.Module
    run: Run

    @property
    def all_sites(self) -> Iterable[Site]:
        """Every site, in the order in which they were met."""

    @property
    def batches(self) -> Sequence[Any]:
        """The calibration data."""

    def watching(self, watch: MatmulWatcher, sample: int) -> AbstractContextManager[None]:
        """Inside, `watch` is shown every matmul."""

    def quantized_activations(self, on: bool = True) -> AbstractContextManager[None]:
        """Inside, forwards quantize activations, or nothing."""

    def recall(self, index: int, block: nn.Module) -> bool:
        """True if an earlier run has finished this block; it is given back its tensors."""

    def remember(self, index: int, block: nn.Module) -> None:
        """Keep a finished block for a later run."""


@dataclass
class Block:
    """One block and the inputs that it has, batch by batch. Each run gets a copy of them, which it may change."""

    path: str
    module: nn.Module
    inputs: list[Inputs]
    context: Walked
    original: OriginalBlock | None = None
    """The block as it was before the walk; None: the walk was not asked for it."""

    def observe(self, watch: MatmulWatcher) -> None:
        """Run the block on all its inputs and show `watch` every matmul in it."""
        with as_in_evaluation(self.module):
            for sample in range(len(self.inputs)):
                self.show(watch, sample)

    def show(self, watch: MatmulWatcher, sample: int) -> None:
        """Run the block on one batch of its inputs and show `watch` every matmul in it."""
        with self.context.watching(watch, sample):
            self._run(self.inputs[sample])

    def output(self, sample: int) -> Any:
        """Compute the first output for one batch of the inputs, which is what the next block takes."""
        return _hidden(self._run(self.inputs[sample]))

    def outputs(self) -> Iterator[Any]:
        """Give the outputs of the block as it is now, one batch after another."""
        with as_in_evaluation(self.module):
            for inputs in self.inputs:
                yield self._run(inputs)

    def _run(self, inputs: Inputs) -> Any:
        args, kwargs = unshared(inputs)
        return self.module(*args, **kwargs)


@dataclass
class OriginalBlock(Block):
    """A block with the parameters that it had before the walk, and with the inputs that unchanged blocks give it.

    It shares its module with the block, whose parameters get their old values for each run. Nothing is quantized.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    """The parameters as they were, by name."""

    @cached_property
    def hidden(self) -> list[Any]:
        """The first output for each batch, which is what the next block takes."""
        return [_hidden(output) for output in self.outputs()]

    def _run(self, inputs: Inputs) -> Any:
        parameters = dict(self.module.named_parameters())
        now = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = self.values[name]
            with self.context.quantized_activations(False):
                return super()._run(inputs)
        finally:
            for name, parameter in parameters.items():
                parameter.data = now[name]


def block_paths(model: nn.Module, sites: Iterable[Site]) -> list[str]:
    """The paths of the innermost elements of lists of modules that hold attention and more, in the order they run.

    Attention is a module that multiplies activations with each other. A model without any has as blocks the elements
    of its outermost lists that multiply by weights; one without lists is one block by itself, whose path is "".
    """
    sites = list(sites)
    lists = nn.ModuleList | nn.Sequential
    elements = [
        p for p, _ in model.named_modules() if p and isinstance(model.get_submodule(p.rpartition(".")[0]), lists)
    ]
    products = [site.name.rpartition(":")[0] for site in sites if site.weight is None]

    def whole(path: str) -> bool:
        inner = [product for product in products if _within(product, path)]
        return bool(inner) and any(
            _within(s.name, path) and not any(_within(s.name, product) for product in inner)
            for s in sites
            if s.weight is not None
        )

    found = [path for path in elements if whole(path)]
    if found:
        found = [path for path in found if not any(other != path and _within(other, path) for other in found)]
    else:
        weighted = [path for path in elements if any(s.weight is not None and _within(s.name, path) for s in sites)]
        found = [path for path in weighted if not any(other != path and _within(path, other) for other in weighted)]
    order = {path: next(i for i, s in enumerate(sites) if _within(s.name, path)) for path in found}
    return sorted(found, key=lambda path: order[path]) or [""]


def _within(name: str, path: str) -> bool:
    return not path or name == path or name.startswith((f"{path}.", f"{path}:"))


def walk(context: Walked, originals: Originals | None = None) -> Iterator[Block]:
    """Give the blocks in order. The caller may change a block, and nothing outside of it, before asking for the next.

    Blocks that an earlier run has finished (`Run.work_dir`) are given back their tensors and passed over. With
    `originals` each block comes with itself as it was.
    """
    paths = block_paths(context.model, context.all_sites)
    index = 0
    while index < len(paths):
        captured = _capture(context, paths[index:])
        chain = paths[index : index + captured.length]
        inputs = captured.inputs[chain[0]]
        for offset, path in enumerate(chain):
            block = Block(path, context.model.get_submodule(path), inputs, context)
            with at_hand(block.module):
                block.original = None if originals is None else originals.of(path)
                if not context.recall(index + offset, block.module):
                    yield block
                    context.remember(index + offset, block.module)
                if originals is not None:
                    originals.finish(block)
            if offset + 1 < len(chain):
                hidden = [_hidden(output) for output in block.outputs()]
                given = captured.inputs[chain[offset + 1]]
                inputs = [_completed(value, rest) for value, rest in zip(hidden, given, strict=True)]
        index += len(chain)


class Originals:
    """The blocks of a model as they are when this is made, each given once, in the order of the walk."""

    def __init__(self, context: Walked) -> None:
        self.context = context
        with context.quantized_activations(False):
            self.inputs = _capture(context, block_paths(context.model, context.all_sites), whole=True).inputs
        self.hidden: list[Any] = []
        """The outputs of the last block."""

    def of(self, path: str) -> OriginalBlock:
        """Give the next block, whose parameters are still as they were."""
        module = self.context.model.get_submodule(path)
        given = self.inputs.pop(path)
        inputs = [_completed(self.hidden[place], rest) if _is_open(rest) else rest for place, rest in enumerate(given)]
        values = {}
        for name, parameter in module.named_parameters():
            with torch.inference_mode(parameter.is_inference()), torch.no_grad():
                values[name] = parameter.detach().clone()
        return OriginalBlock(path, module, inputs, self.context, values=values)

    def finish(self, block: Block) -> None:
        """Compute what the block gave to the next one, if that takes it."""
        takes = any(map(_is_open, next(iter(self.inputs.values()), [])))
        self.hidden = block.original.hidden if takes and block.original is not None else []


@dataclass
class _Captured:
    """The inputs of blocks by path; `_Hidden` stands in the place of what the block before gives."""

    inputs: dict[str, list[Inputs]]
    length: int
    """The number of blocks in a row that take the output of the block before them."""


def _capture(context: Walked, paths: list[str], whole: bool = False) -> _Captured:
    """Run all batches and capture the inputs of the blocks.

    Of a block after the first, the first tensor is left out. With `whole` it is left out only where the block before
    gives it.
    """
    found: dict[str, list[Inputs]] = {path: [] for path in paths}
    chained = dict.fromkeys(paths[1:], True)
    preceding = dict(zip(paths[1:], paths, strict=False))
    last: list[Any] = [None, None]
    copies: Copies = {}

    def enter(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given, before = (args, kwargs), preceding.get(path)
            if before is not None:
                follows = last[0] == before and last[1] is _first_tensor(args, kwargs)
                follows = follows and len(found[before]) == len(found[path]) + 1
                chained[path] = chained[path] and follows
                given = given if whole and not follows else _with_hidden(_Hidden(), given)
            found[path].append(unshared(given, copies))

        return hook

    def leave(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            last[:] = path, _hidden(output)

        return hook

    handles = []
    for path in paths:
        module = context.model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(enter(path), with_kwargs=True))
        handles.append(module.register_forward_hook(leave(path), with_kwargs=True))
    try:
        with as_in_evaluation(context.model):
            for batch in context.run.track(context.batches, len(context.batches), "calibration"):
                call(context.model, batch)
                last[:] = None, None
                copies.clear()
    finally:
        for handle in handles:
            handle.remove()
    length = 1
    for path in paths[1:]:
        if not chained[path] or len(found[path]) != len(found[paths[0]]):
            break
        length += 1
    return _Captured(found, length)


def _hidden(output: Any) -> Any:
    """The first output that is there; a block may give None before it."""
    return next((one for one in output if one is not None), None) if isinstance(output, tuple | list) else output


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def _with_hidden(value: Any, inputs: Inputs) -> Inputs:
    """The inputs with the first tensor replaced: what the block before gives."""
    args, kwargs = list(inputs[0]), dict(inputs[1])
    for place, item in enumerate(args):
        if isinstance(item, Tensor):
            args[place] = value
            return tuple(args), kwargs
    for key, item in kwargs.items():
        if isinstance(item, Tensor):
            kwargs[key] = value
            return tuple(args), kwargs
    return inputs


def _completed(value: Any, inputs: Inputs) -> Inputs:
    """The inputs with a value in the place that `_Hidden` holds."""
    args = tuple(value if isinstance(item, _Hidden) else item for item in inputs[0])
    return args, {key: value if isinstance(item, _Hidden) else item for key, item in inputs[1].items()}


def _is_open(inputs: Inputs) -> bool:
    return any(isinstance(item, _Hidden) for item in (*inputs[0], *inputs[1].values()))


class _Hidden:
    """Stands where the output of the block before goes."""
