"""A model block by block: what repeats in it, and the inputs of one block after another.

A walk keeps the inputs of one block in memory, for all calibration batches, and not the activations of the model. Where
a block takes the output of the block before it, that output is computed from the inputs at hand; where it does
not (the first of a stack, a skip connection in between), the model is run again up to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from qsim_core.matmuls.call import Call
from qsim_core.sites.site import Site
from qsim_core.transforms.forward import Copies, as_in_evaluation, call, unshared
from qsim_core.transforms.offload import at_hand
from qsim_core.transforms.run import Run

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
MatmulWatcher = Callable[[Site, Call], None]
"""Called for every matmul that is met, with its site and the call, before it is computed."""


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

    def observe(self, watch: MatmulWatcher) -> None:
        """Run the block on all its inputs and show `watch` every matmul in it."""
        with as_in_evaluation(self.module):
            for sample, inputs in enumerate(self.inputs):
                with self.context.watching(watch, sample):
                    self._run(inputs)

    def outputs(self) -> Iterator[Any]:
        """Give the outputs of the block as it is now, one batch after another."""
        with as_in_evaluation(self.module):
            for inputs in self.inputs:
                yield self._run(inputs)

    def _run(self, inputs: Inputs) -> Any:
        args, kwargs = unshared(inputs)
        return self.module(*args, **kwargs)


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


def walk(context: Walked) -> Iterator[Block]:
    """Give the blocks in order. The caller may change a block, and nothing outside of it, before asking for the next.

    Blocks that an earlier run has finished (`Run.work_dir`) are given back their tensors and passed over.
    """
    paths = block_paths(context.model, context.all_sites)
    index = 0
    while index < len(paths):
        first, others, chain = _capture(context, paths[index:])
        inputs = first
        for offset, path in enumerate(paths[index : index + chain]):
            block = Block(path, context.model.get_submodule(path), inputs, context)
            with at_hand(block.module):
                if not context.recall(index + offset, block.module):
                    yield block
                    context.remember(index + offset, block.module)
            if offset + 1 < chain:
                hidden = [_hidden(output) for output in block.outputs()]
                given = others[paths[index + offset + 1]]
                inputs = [_with_hidden(value, rest) for value, rest in zip(hidden, given, strict=True)]
        index += chain


def _capture(context: Walked, paths: list[str]) -> tuple[list[Inputs], dict[str, list[Inputs]], int]:
    """Run all batches and capture the inputs of the blocks.

    Returns the first block's inputs; the later blocks' inputs, without the output of the block before; and the number
    of blocks in a row that take the output of the block before.
    """
    first: list[Inputs] = []
    others: dict[str, list[Inputs]] = {path: [] for path in paths[1:]}
    chained = dict.fromkeys(paths[1:], True)
    last: list[Any] = [None]
    copies: Copies = {}

    def enter(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if path == paths[0]:
                first.append(unshared((args, kwargs), copies))
                return
            chained[path] = chained[path] and _first_tensor(args, kwargs) is last[0]
            others[path].append(unshared(_with_hidden(None, (args, kwargs)), copies))

        return hook

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        last[0] = _hidden(output)

    handles = []
    for path in paths:
        module = context.model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(enter(path), with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        with as_in_evaluation(context.model):
            for batch in context.run.track(context.batches, len(context.batches), "calibration"):
                call(context.model, batch)
                last[0] = None
                copies.clear()
    finally:
        for handle in handles:
            handle.remove()
    length = 1
    for path in paths[1:]:
        if not chained[path] or len(others[path]) != len(first):
            break
        length += 1
    return first, others, length


def _hidden(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) else output


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def _with_hidden(value: Any, inputs: Inputs) -> Inputs:
    """The inputs with the first tensor replaced: what the block before gives."""
    args, kwargs = list(inputs[0]), dict(inputs[1])
    for place, item in enumerate(args):
        if isinstance(item, Tensor | _Hidden):
            args[place] = _Hidden() if value is None else value
            return tuple(args), kwargs
    for key, item in kwargs.items():
        if isinstance(item, Tensor | _Hidden):
            kwargs[key] = _Hidden() if value is None else value
            return tuple(args), kwargs
    return inputs


class _Hidden:
    """Stands where the output of the block before goes."""
