"""The channels of a model: who makes them, which weights read them, and what operators do to them.

A *source* makes channels: a norm its last axis, a weight its rows. `qsim_core.structure.tracing` finds them by running the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

CONSTANT = -1
"""Instead of a channel's number: an element that does not depend on the source."""
FREE = -2
"""A zero that was filled in: it goes with every channel."""
VIEWS = frozenset(
    "view _unsafe_view reshape permute transpose t expand slice select squeeze unsqueeze split split_with_sizes unbind "  # noqa: SIM905
    "chunk clone detach alias _to_copy contiguous index gather index_select roll flip repeat unfold _reshape_alias "
    "lift_fresh diagonal movedim repeat_interleave as_strided".split()
)
SCALES_THROUGH = frozenset({"mul", "div", "neg", "relu", "leaky_relu", "threshold", "dropout", "native_dropout"})
"""f(s x) = s f(x) for s > 0, element by element."""
CURVES = frozenset(
    "gelu silu sigmoid tanh pow exp sqrt rsqrt clamp clamp_min clamp_max erf softplus elu hardtanh hardswish abs "  # noqa: SIM905
    "square sin cos log1p reciprocal minimum maximum".split()
)
"""Element by element, but not linear: channels may be permuted across them and not scaled."""
SUMS = frozenset({"add", "sub", "rsub"})
WITH_WEIGHT = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2), "mv": (0, 1), "_grouped_mm": (0, 1)}
"""Products: which arguments are the operands, [..., K] and [..., K, N]."""
FRESH = frozenset(
    "zeros_like ones_like empty_like new_zeros new_ones new_empty full_like rand_like randn_like eq ne lt gt le ge "  # noqa: SIM905
    "argmax isnan isinf any all topk sort argsort sym_size is_nonzero _local_scalar_dense bernoulli".split()
)
"""What depends on the values but carries no channel on."""


@dataclass(frozen=True, eq=False)
class Use:
    """A weight that reads a source: along `axis` of the parameter, element i reads channel `channels[i]`."""

    weight: str
    axis: int
    channels: Tensor
    """On the CPU, wherever the model is."""
    scales: bool
    """Whether a factor on the channel reaches the weight as that factor."""
    event: int = 0
    """Which product it was; sources that reach a weight in one product are multiplied with each other."""


@dataclass(eq=False)
class Source:
    """Something that makes channels."""

    kind: str
    """"norm" or "linear"."""
    name: str
    """The norm's module path, or the weight's name."""
    size: int
    axis: int = 0
    """Of a weight: which of its axes makes the channels."""
    biases: list[str] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    refusals: dict[str, None] = field(default_factory=dict)
    """Why nothing can be folded across it, in the order in which it was found."""
    arguments: tuple[Any, ...] = ()
    """What a norm was called with."""

    def refuse(self, reason: str) -> None:
        self.refusals.setdefault(reason)


@dataclass(frozen=True)
class Rows:
    """What makes channels: a weight, which of its axes, and the biases that are added to them."""

    producer: str
    axis: int
    biases: tuple[str, ...]


@dataclass(frozen=True)
class Product:
    """A product of two computed tensors: who computed it, and the sources of its operands with their channels."""

    owner: str
    left: dict[Source, Tensor]
    right: dict[Source, Tensor]
    after_softmax: bool
    """Whether the left operand comes from a softmax: it is P, and the right one v."""


@dataclass(frozen=True)
class Tag:
    channels: Tensor
    scales: bool = True


Tags = dict[Source, Tag]


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization: a leaf that calls itself one, with vectors for parameters."""
    leaf = not any(True for _ in module.children())
    return leaf and "norm" in type(module).__name__.lower() and all(p.dim() == 1 for p in module.parameters())


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors in dictionaries, lists and tuples."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors_in(item)
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from tensors_in(item)


def numbered(tensor: Tensor, axis: int) -> Tensor:
    """Each element's place along an axis, in the tensor's shape; takes no memory."""
    shape = [tensor.shape[axis] if place == axis else 1 for place in range(tensor.dim())]
    return torch.arange(tensor.shape[axis], device=tensor.device).view(shape).expand(tensor.shape)


def channels_along(channels: Tensor, axis: int) -> Tensor | None:
    """The channels along an axis, if they are the same at every place of the other axes."""
    rows = channels.movedim(axis, -1).reshape(-1, channels.shape[axis])
    if not len(rows):  # an expert without tokens
        return None
    highest = rows.amax(0)
    return highest if bool(((rows == highest) | (rows == FREE)).all()) else None


def axis_in(parameter: Tensor, view: Tensor, axis: int) -> int | None:
    """The axis of a parameter that is this axis of its view, if the view has all of it."""
    for place in range(parameter.dim()):
        if parameter.stride(place) == view.stride(axis) and parameter.shape[place] == view.shape[axis]:
            return place
    return None


def same_view(func: Any, name: str, channels: Tensor, args: Any, kwargs: Any, out: Any) -> Any:
    """Channel numbers taken through the view, or the copy, that made `out`."""
    if name in ("_to_copy", "clone", "contiguous", "alias", "detach", "lift_fresh"):
        return channels
    if name in ("view", "_unsafe_view", "_reshape_alias", "as_strided"):
        return channels.reshape(out.shape)
    return func(channels, *args[1:], **kwargs)
