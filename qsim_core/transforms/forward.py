"""Running a model on one batch, as an evaluation does."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from qsim_core.errors import DataError

Example = Any
"""One batch: a mapping of keyword arguments, a tuple or list of positional ones, or a single argument."""


@contextlib.contextmanager
def as_in_evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients and no cache of keys and values inside; everything as it was again afterwards."""
    training = [module for module in model.modules() if module.training]
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if getattr(config, "use_cache", None)}
    try:
        for config in configs.values():
            config.use_cache = False
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for config in configs.values():
            config.use_cache = True
        for module in training:
            module.training = True
        for module in model.modules():
            if callable(reshard := getattr(module, "reshard", None)):  # FSDP2: an optimizer is to find the shards
                reshard()


def call(model: nn.Module, example: Example) -> Any:
    """Run the model on one batch, given as `Example` says, and on the same each time.

    The model gets a copy, which it may change. What it draws at random is the same each time.
    """
    with _drawing_the_same(example):
        if isinstance(example, Mapping):
            return model(**unshared(dict(example)))
        given = unshared(tuple(example) if isinstance(example, tuple | list) else (example,))
        if len(given) > 1:
            _check_number(model, given)
        return model(*given)


def check_numbers(*batches: Example) -> None:
    """Raise `DataError` for batches on torch's `meta` device, of which nothing can be measured."""
    if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(batches)):
        raise DataError("a batch is on the meta device, which holds no numbers; transforms and static scales need them")


def _check_number(model: nn.Module, given: tuple[Any, ...]) -> None:
    """Raise `DataError` for a batch of more arguments than the model takes, as a loader with labels gives."""
    taken = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in taken):
        return
    places = [parameter.name for parameter in taken if parameter.kind is not parameter.KEYWORD_ONLY]
    if len(given) > len(places):
        raise DataError(
            f"a batch has {len(given)} arguments, and {type(model).__name__} takes {len(places)} "
            f"({', '.join(places)}); leave the others, such as labels, out"
        )


Copies = dict[tuple[int, int], tuple[Tensor, Tensor]]
"""Tensors with their copies, by identity and version."""


def unshared(tree: Any, copies: Copies | None = None) -> Any:
    """Copy containers and plain objects, and the tensors in them, for a module that may change them in place.

    Parameters, modules and generators stay the same. A tensor that is in `copies`, and has not changed since, is not
    copied again.
    """
    return tree_map(_Copier({} if copies is None else copies).copied, tree)


class _Copier:
    """Copies the leaves of one tree. An object, as a function that calls itself would keep the tensors alive."""

    def __init__(self, tensors: Copies) -> None:
        self.tensors = tensors
        self.objects: dict[int, Any] = {}

    def copied(self, leaf: Any) -> Any:
        """Copy a tensor or a plain object, once; anything else stays the same."""
        if isinstance(leaf, Tensor):
            return leaf if isinstance(leaf, nn.Parameter) else self._tensor(leaf)
        if not hasattr(leaf, "__dict__") or isinstance(leaf, nn.Module) or callable(leaf):
            return leaf
        if id(leaf) not in self.objects:
            self.objects[id(leaf)] = copy.copy(leaf)
            vars(self.objects[id(leaf)]).update(tree_map(self.copied, vars(leaf)))
        return self.objects[id(leaf)]

    def _tensor(self, tensor: Tensor) -> Tensor:
        key = id(tensor), 0 if tensor.is_inference() else tensor._version
        if key not in self.tensors:
            self.tensors[key] = tensor, _copied(tensor)
        return self.tensors[key][1]


def _copied(tensor: Tensor) -> Tensor:
    """Copy a tensor; axes along which it is expanded stay so."""
    narrow = tensor
    if tensor.layout == torch.strided and not tensor.is_nested:
        for axis in range(tensor.dim()):
            if tensor.stride(axis) == 0 and tensor.shape[axis]:
                narrow = narrow.narrow(axis, 0, 1)
    return narrow.clone().expand(tensor.shape) if narrow is not tensor else tensor.clone()


@contextlib.contextmanager
def _drawing_the_same(example: Example) -> Iterator[None]:
    """torch's generators start from 0 inside, the batch's own from where they are; all are left as they were."""
    shared = [torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_initialized() else [])]
    values = dict(example) if isinstance(example, Mapping) else example
    own = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Generator)]
    states = [(generator, generator.get_state()) for generator in (*shared, *own)]
    try:
        for generator in shared:
            generator.manual_seed(0)
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
