"""The channels of a model: their sources, the weights that read them, and the effect of each operator on them.

A *source* makes channels: a norm along its last axis, a weight as its rows. `qsim_structure.tracing` finds sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

CONSTANT = -1
"""The channel number of an element that does not depend on the source."""
FREE = -2
"""The channel number of a padded zero, which fits every channel."""
UNKNOWN = -3
"""The channel number of memory outside of the tensor that is followed."""
VIEWS = frozenset(
    "view _unsafe_view reshape permute transpose t expand slice select squeeze unsqueeze split split_with_sizes unbind "  # noqa: SIM905
    "chunk clone detach alias _to_copy contiguous index gather index_select roll flip repeat unfold _reshape_alias "
    "lift_fresh diagonal movedim repeat_interleave as_strided".split()
)
SCALES_THROUGH = frozenset({"mul", "div", "neg", "relu", "leaky_relu", "threshold", "dropout", "native_dropout"})
"""Elementwise operators with f(s x) = s f(x) for s > 0."""
CURVES = frozenset(
    "gelu silu sigmoid tanh pow exp sqrt rsqrt clamp clamp_min clamp_max erf softplus elu hardtanh hardswish abs "  # noqa: SIM905
    "square sin cos log1p reciprocal minimum maximum".split()
)
"""Elementwise operators that are not linear: channels may be permuted across them, but not scaled."""
SUMS = frozenset({"add", "sub", "rsub"})
WITH_WEIGHT = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2), "mv": (0, 1), "_grouped_mm": (0, 1)}
"""Matrix products, with the positions of the operands [..., K] and [..., K, N] among their arguments."""
FRESH = frozenset(
    "zeros_like ones_like empty_like new_zeros new_ones new_empty full_like rand_like randn_like "  # noqa: SIM905
    "isnan isinf sym_size".split()
)
"""Operators whose result is the same when channels are scaled, and carries no channels."""


@dataclass(frozen=True, eq=False)
class Use:
    """A weight that reads a source: along `axis` of the parameter, element i reads channel `channels[i]`."""

    weight: str
    axis: int
    channels: Tensor
    """On the CPU, also for a model on another device."""
    scales: bool
    """True if a factor on the channel reaches the weight as that factor."""
    event: int = 0
    """The number of the product. Sources that reach a weight in one product are multiplied with each other."""


@dataclass(eq=False)
class Source:
    """A norm or a weight that makes channels."""

    kind: str
    """"norm" or "linear"."""
    name: str
    """The norm's module path, or the weight's name."""
    size: int
    axis: int = 0
    """The axis of the weight that makes the channels."""
    biases: list[str] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    refusals: dict[str, None] = field(default_factory=dict)
    """The reasons why nothing can be folded across it, in the order in which they were found."""
    offset: float | None = None
    """o of a norm whose output is (weight + o) f(x) + bias; None for any other form."""

    def refuse(self, reason: str) -> None:
        """Add a reason not to fold across this source."""
        self.refusals.setdefault(reason)


@dataclass(frozen=True)
class Rows:
    """A weight, the axis of it that makes channels, and the biases that are added to them."""

    producer: str
    axis: int
    biases: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Partner(Rows):
    """A weight whose channels are multiplied with those of another one, for a third to read them: gate and up."""

    size: int
    own: Use
    """The third weight, and the channel of the partner that each element of it reads."""
    other: Use
    """The same use, with the channels of the other weight."""
    reasons: tuple[str, ...]
    """The reasons why the partner's channels may not be changed."""


@dataclass(frozen=True)
class Product:
    """A product of two activations, with the sources of its operands and their channels."""

    owner: str
    """The path of the module that computes it."""
    left: dict[Source, Tensor]
    right: dict[Source, Tensor]
    after_softmax: bool
    """True if the left operand comes from a softmax: then it is P, and the right one is v."""


@dataclass(frozen=True)
class Tag:
    """The channels of one source in a tensor: for each element the number of its channel."""

    channels: Tensor
    scales: bool = True


Tags = dict[Source, Tag]


def is_norm(module: nn.Module) -> bool:
    """Tell if a module is a normalization: a leaf with `norm` in its class name, whose parameters are vectors."""
    leaf = not any(True for _ in module.children())
    return leaf and "norm" in type(module).__name__.lower() and all(p.dim() == 1 for p in module.parameters())


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in mappings, lists, tuples, sets and dataclasses."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from tensors_in(item)
    elif isinstance(tree, list | tuple | Set):
        for item in tree:
            yield from tensors_in(item)
    elif is_dataclass(tree) and not isinstance(tree, type):
        for part in fields(tree):
            yield from tensors_in(getattr(tree, part.name, None))


def numbered(tensor: Tensor, axis: int) -> Tensor:
    """Number the elements along an axis, in the tensor's shape; the result takes no memory."""
    shape = [tensor.shape[axis] if place == axis else 1 for place in range(tensor.dim())]
    return torch.arange(tensor.shape[axis], device=tensor.device).view(shape).expand(tensor.shape)


def compact(channels: Tensor) -> Tensor:
    """Keep channel numbers in little memory: once along those of the last two axes on which they are the same."""
    shape = channels.shape
    for axis in (-2, -1) if channels.dim() > 1 and channels.numel() else ():
        first = channels.narrow(axis, 0, 1)
        channels = first if bool((channels == first).all()) else channels
    return channels.clone().expand(shape)


def channels_along(channels: Tensor, axis: int) -> Tensor | None:
    """Return the channels along an axis, if they are the same at every index of the other axes."""
    rows = channels.movedim(axis, -1).reshape(-1, channels.shape[axis])
    if not len(rows):  # an expert without tokens
        return None
    highest = rows.amax(0)
    return highest if bool(((rows == highest) | (rows == FREE)).all()) else None


def axis_in(parameter: Tensor, view: Tensor, axis: int) -> int | None:
    """Return the axis of a parameter that an axis of its view is, if the view covers all of it."""
    for place in range(parameter.dim()):
        if parameter.stride(place) == view.stride(axis) and parameter.shape[place] == view.shape[axis]:
            return place
    return None


def same_view(
    func: Any, name: str, tensor: Tensor, channels: Tensor, args: Any, kwargs: Any, out: Any, in_place: bool
) -> Any:
    """Apply to channel numbers the view or copy of `tensor` that made `out`."""
    if name in ("_to_copy", "clone", "contiguous", "alias", "detach", "lift_fresh"):
        return channels
    if name in ("view", "_unsafe_view", "_reshape_alias"):
        return channels.reshape(out.shape)
    if name == "as_strided":
        return strided_alike(channels, tensor, *args[1:], **kwargs)
    return func(channels.view_as(channels) if in_place else channels, *args[1:], **kwargs)


def strided_alike(
    channels: Tensor, tensor: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Tensor:
    """Apply `tensor.as_strided(size, stride, storage_offset)` to channel numbers, which lie elsewhere in memory."""
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    memory = channels.new_full((elements,), UNKNOWN)
    memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(channels)
    found = memory.as_strided(size, stride, tensor.storage_offset() if storage_offset is None else storage_offset)
    if bool((found == UNKNOWN).any()):
        raise ValueError("it reads memory outside of its tensor")
    return found
