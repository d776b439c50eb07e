"""Running a model on one batch, as an evaluation does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Generator, nn
from torch.utils._pytree import tree_leaves

Example = Any
"""One batch: a mapping of keyword arguments, a tuple of positional ones, or a single argument."""


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


def call(model: nn.Module, example: Example) -> Any:
    """Run the model on one batch, given as `Example` says. What it draws at random is the same each time."""
    with _drawing_the_same(example):
        if isinstance(example, Mapping):
            return model(**example)
        return model(*example) if isinstance(example, tuple) else model(example)


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
