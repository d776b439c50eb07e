"""Follow channels through a model in one run, watched below autograd.

Each tensor that depends on a source has channel numbers: an integer tensor of the same shape, with the channel that
each element comes from. Views and copies of the tensor are applied to these numbers too. So the tracer finds which
column of each weight reads which channel, for any architecture: fused projections, repeated heads and experts too.

A source is refused, with the reason, if its channels enter an operator that is not listed, or if other tensors are
added to them. No operator ends a trace: one whose rule fails is like one that is not listed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from qsim_structure.channels import (
    CONSTANT,
    CURVES,
    FREE,
    FRESH,
    SCALES_THROUGH,
    SUMS,
    VIEWS,
    WITH_WEIGHT,
    Partner,
    Product,
    Source,
    Tag,
    Tags,
    Use,
    axis_in,
    channels_along,
    compact,
    is_norm,
    numbered,
    same_view,
    tensors_in,
)
from qsim_structure.operator_watcher import OperatorWatcher, operator_name, run_watched
from qsim_structure.parameter_addresses import ParameterAddresses


class Tracer(OperatorWatcher):
    """Watch one run with `Tracer(model).watch(run)`; then `sources` and `products` hold the results."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.sources: dict[tuple[str, str], Source] = {}
        self.products: list[Product] = []
        self.readers: dict[str, set[str]] = defaultdict(set)
        """The operators that read each parameter, without products."""
        self.events: dict[str, set[int]] = defaultdict(set)
        """The numbers of the products in which each weight was read."""
        self._event = 0
        self._tags = WeakTensorKeyDictionary()
        """The tags of each tensor, for as long as the model keeps it."""
        self._softmaxed = WeakTensorKeyDictionary()
        self._stack: list[str] = []
        self._quiet = 0
        self._parameters = ParameterAddresses(model)

    def watch(self, run: Callable[[], Any]) -> Tracer:
        """Trace one run of the model. Sources whose channels are outputs of the model, or of `run`, are refused."""
        handles = []
        for path, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # it takes no hooks, and its operators are seen all the same
                continue
            handles.append(module.register_forward_pre_hook(self._entering(path)))
            handles.append(module.register_forward_hook(self._leaving(path), with_kwargs=True, always_call=True))
        try:
            output = run_watched(self.model, run, self)
        finally:
            for handle in handles:
                handle.remove()
        self._refuse_outputs(output)
        return self

    def _refuse_outputs(self, output: Any) -> None:
        for tensor in tensors_in(output):
            self._refuse(tensor, "is an output of the model")

    def _entering(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._stack.append(path)
            self._quiet += is_norm(module)

        return hook

    def _leaving(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._stack.pop()
            if is_norm(module):
                if self._quiet == 1:  # the outermost of norms in norms
                    inputs = list(tensors_in((args, kwargs)))
                    self._follow(partial(self._norm, path, module, args, kwargs, output), path, inputs, output)
                self._quiet -= 1
            if module is self.model:  # `run` may return nothing
                self._refuse_outputs(output)

        return hook

    def _norm(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        for tensor in tensors_in((args, kwargs)):
            self._refuse(tensor, f"feeds the norm {path}")
        if not isinstance(output, Tensor):
            return
        axis = 1 if isinstance(module, nn.GroupNorm | nn.modules.batchnorm._NormBase) else output.dim() - 1
        if ("norm", path) not in self.sources:
            source = self.sources["norm", path] = Source("norm", path, output.shape[axis], axis)
            source.offset = offset_of(module, args, kwargs)
        source = self.sources["norm", path]
        for name, _ in module.named_parameters():
            self.readers[f"{path}.{name}"].add("norm")
        if source.size != output.shape[axis]:
            source.refuse("has outputs of two sizes")
        else:
            self._tag(output, {source: Tag(numbered(output, axis))})

    def partners(self, source: Source) -> tuple[Partner, ...]:
        """Find the weights whose channels are multiplied with those of a source before a weight reads both."""
        events = {use.event for use in source.uses}
        found = []
        for other in self.sources.values():
            if other is source or other.kind != "linear" or events.isdisjoint(use.event for use in other.uses):
                continue
            pairs = ((own, use) for own in other.uses for use in source.uses if own.event == use.event)
            for own, use in pairs:
                if bool(((own.channels >= 0) & (use.channels >= 0)).any()):
                    reasons = tuple(other.refusals)
                    found.append(Partner(other.name, other.axis, tuple(other.biases), other.size, own, use, reasons))
                    break
        return tuple(found)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._quiet:
            name = operator_name(func)
            in_place = name.endswith("_") and not name.endswith("__")
            inputs = list(tensors_in((args, kwargs)))
            plain = name.rstrip("_") if in_place else name
            self._follow(partial(self._meet, plain, func, args, kwargs, out, inputs, in_place), name, inputs, out)
        return out

    def _follow(self, rule: Callable[[], None], name: str, inputs: list[Tensor], out: Any) -> None:
        """Apply the rule of an operator or norm. If the rule fails, no channels are followed through it."""
        try:
            rule()
        except Exception as error:
            results = list(tensors_in(out))
            seen = str(error).partition("\n")[0] or type(error).__name__
            for tensor in [*inputs, *results]:
                self._read_by(name, tensor)
                self._refuse(tensor, f"cannot be followed through {name} in {self._where}: {seen}")
            for tensor in results:
                self._tags.pop(tensor, None)

    @property
    def _where(self) -> str:
        return self._stack[-1] if self._stack and self._stack[-1] else "the model"

    def _meet(
        self, name: str, func: Any, args: Any, kwargs: Any, out: Any, inputs: list[Tensor], in_place: bool
    ) -> None:
        tagged = [tensor for tensor in inputs if self._tags.get(tensor)]
        if name not in VIEWS and name not in WITH_WEIGHT and "convolution" not in name:
            for tensor in inputs:
                self._read_by(name, tensor)
        if name in WITH_WEIGHT:
            left, right = (args[place] for place in WITH_WEIGHT[name])
            self._multiply(left, right, out, args[0] if name == "addmm" else None)
        elif "convolution" in name:
            self._convolve(args, out, tagged)
        elif "scaled_dot_product" in name:
            self._attend(args[0], args[1], args[2], out[0] if isinstance(out, tuple | list) else out)
        elif name in ("_softmax", "_safe_softmax"):
            self._softmaxed[out] = True
            self._lose(tagged, name)
        elif name in VIEWS:
            self._view(func, name, args, kwargs, out, inputs, in_place)
        elif not tagged or name in FRESH:
            return
        elif in_place and args[0]._is_view():
            self._lose([*tagged, args[0]], f"{name}_ on a view")
        elif name == "constant_pad_nd" and (len(args) < 3 or args[2] == 0):
            tags = self._tags[args[0]]
            self._tag(out, {s: Tag(func(t.channels, args[1], FREE), t.scales) for s, t in tags.items()})
        elif name in ("cat", "stack"):
            self._join(func, args, kwargs, out)
        elif name in SCALES_THROUGH or name in CURVES or name in SUMS:
            self._elementwise(name, args, out, tagged)
        elif name in ("mean", "sum") and len(args) > 1 and args[1]:
            self._reduce(args, kwargs, out)
        else:
            self._lose(tagged, name)

    def _read_by(self, name: str, tensor: Tensor) -> None:
        if (found := self._parameters.of(tensor)) is not None:
            self.readers[found[0]].add(name)

    def _multiply(self, left: Tensor, right: Tensor, out: Tensor, bias: Tensor | None) -> None:
        """Trace [..., K] x [..., K, N]: a weight on one side reads channels and makes channels."""
        if (weight := self._parameters.of(right)) is not None:
            self._read(left, -1, weight, right, right.dim() - 2 if right.dim() > 1 else 0)
            if right.dim() > 1:
                self._make(weight, right, right.dim() - 1, out, out.dim() - 1, bias)
        elif (weight := self._parameters.of(left)) is not None:
            self._read(right, right.dim() - 2, weight, left, -1)
            self._make(weight, left, left.dim() - 2, out, out.dim() - 2, None)
        else:
            self._product(left, right, self._tags.get(left, {}), self._tags.get(right, {}), out)

    def _convolve(self, args: Any, out: Tensor, tagged: list[Tensor]) -> None:
        x, kernel, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
        weight = self._parameters.of(kernel)
        if weight is None or groups != 1:
            return self._lose(
                tagged, "a grouped convolution" if groups != 1 else "a convolution with a computed kernel"
            )
        self._read(x, 1, weight, kernel, 0 if transposed else 1)
        return self._make(weight, kernel, 1 if transposed else 0, out, 1, bias)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
        """Trace fused attention: q is multiplied with k, and the output has v's channels, once for each head."""
        repeats = query.shape[1] // key.shape[1] if query.dim() > 3 else 1
        keys = {s: Tag(t.channels.transpose(-1, -2), t.scales) for s, t in self._tags.get(key, {}).items()}
        values = {
            s: Tag(t.channels.repeat_interleave(repeats, 1) if repeats > 1 else t.channels, t.scales)
            for s, t in self._tags.get(value, {}).items()
        }
        self._product(query, key, self._tags.get(query, {}), keys, None)
        weights = torch.empty(0)
        self._softmaxed[weights] = True
        self._product(weights, value, {}, values, out)

    def _product(self, left: Tensor, right: Tensor, of_left: Tags, of_right: Tags, out: Tensor | None) -> None:
        owner = self._stack[-1] if self._stack else ""
        self.products.append(
            Product(
                owner,
                {s: compact(t.channels) for s, t in of_left.items()},
                {s: compact(t.channels) for s, t in of_right.items()},
                left in self._softmaxed,
            )
        )
        kept: Tags = {}
        for tags, axis in ((of_left, -1), (of_right, -2)):
            for source, tag in tags.items():
                first = tag.channels.narrow(axis, 0, 1)
                if out is not None and bool((tag.channels == first).all()):
                    kept[source] = Tag(first.expand(out.shape), tag.scales)
                else:
                    source.refuse(f"is multiplied with other activations in {owner}")
        if out is not None:
            self._tag(out, kept)

    def _read(self, x: Tensor, axis: int, weight: tuple[str, Tensor], view: Tensor, view_axis: int) -> None:
        name, parameter = weight
        self._event += 1
        self.events[name].add(self._event)
        for source, tag in self._tags.get(x, {}).items():
            channels = channels_along(tag.channels, axis)
            place = axis_in(parameter, view, view_axis)
            if not x.numel():
                source.refuse(f"reaches {name} with no element of the example")
            elif channels is None or place is None:
                source.refuse(f"reaches {name} in another order at every position")
            else:
                source.uses.append(Use(name, place, channels.cpu(), tag.scales, self._event))

    def _make(
        self, weight: tuple[str, Tensor], view: Tensor, view_axis: int, out: Tensor, axis: int, bias: Tensor | None
    ) -> None:
        name, parameter = weight
        place = axis_in(parameter, view, view_axis)
        if place is None:
            return
        source = self.sources.setdefault(("linear", name), Source("linear", name, out.shape[axis], place))
        if source.size != out.shape[axis]:
            source.refuse("is used in parts")
            return
        if bias is not None and (found := self._parameters.of(bias)) is not None and found[0] not in source.biases:
            source.biases.append(found[0])
        self._tag(out, {source: Tag(numbered(out, axis))})

    def _view(
        self, func: Any, name: str, args: Any, kwargs: Any, out: Any, inputs: list[Tensor], in_place: bool
    ) -> None:
        if not inputs:
            return
        first = inputs[0]
        if name in ("_to_copy", "clone"):
            self._parameters.copied(first, out)
        if any(self._parameters.of(tensor) is None for tensor in tensors_in(out)):
            self._read_by(name, first)
        if first in self._softmaxed:
            self._softmaxed.update(dict.fromkeys(tensors_in(out), True))
        tags = self._tags.get(first, {})
        if any(self._tags.get(other) for other in inputs[1:]):
            self._lose(inputs, name)
        elif tags:
            views = list(tensors_in(out))
            made: list[Tags] = [{} for _ in views]
            for source, tag in tags.items():
                channels = same_view(func, name, first, tag.channels, args, kwargs, out, in_place)
                for into, part in zip(made, tensors_in(channels), strict=True):
                    into[source] = Tag(part, tag.scales)
            for view, of_view in zip(views, made, strict=True):
                self._tag(view, of_view)

    def _join(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        parts = [self._tags.get(tensor, {}) for tensor in args[0]]
        made: Tags = {}
        for source in {source for tags in parts for source in tags}:
            channels = [
                tags[source].channels if source in tags else torch.full(tensor.shape, CONSTANT)
                for tags, tensor in zip(parts, args[0], strict=True)
            ]
            scales = all(tags[source].scales for tags in parts if source in tags)
            made[source] = Tag(func(channels, *args[1:], **kwargs), scales)
        self._tag(out, made)

    def _elementwise(self, name: str, args: Any, out: Tensor, tagged: list[Tensor]) -> None:
        where = self._where
        made: Tags = {}
        for tensor in tagged:
            other = next((other for other in args[:2] if other is not tensor), None)
            for source, tag in self._tags[tensor].items():
                channels = tag.channels.expand(out.shape)
                scales = tag.scales and name not in CURVES and not (name == "div" and tensor is not args[0])
                twice = isinstance(other, Tensor) and source in self._tags.get(other, {})
                if twice and not torch.equal(self._tags[other][source].channels.expand(out.shape), channels):
                    source.refuse(f"meets its own other channels in {where}")
                elif name in SUMS and not twice and not self._adds_nothing(source, other, out):
                    source.refuse(f"is added to another tensor in {where}")
                first = made.get(source, Tag(channels))  # of x and rotated x, x has the channels
                made[source] = Tag(first.channels, first.scales and scales and not (twice and name not in SUMS))
        self._tag(out, made)

    def _adds_nothing(self, source: Source, other: Any, out: Tensor) -> bool:
        """Tell if the tensor added to a source is zero, or is the bias of the source."""
        if not isinstance(other, Tensor):
            return other in (0, None)
        found = self._parameters.of(other)
        if found is not None and source.kind == "linear" and found[1].dim() == 1 and found[1].numel() == source.size:
            if found[0] not in source.biases:
                source.biases.append(found[0])
            return True
        return not bool(other.any())

    def _reduce(self, args: Any, kwargs: Any, out: Tensor) -> None:
        axes = list(args[1]) if isinstance(args[1], list | tuple) else [args[1]]
        made: Tags = {}
        for source, tag in self._tags[args[0]].items():
            low, high = tag.channels.amin(axes, keepdim=True), tag.channels.amax(axes, keepdim=True)
            if bool((low == high).all()):
                made[source] = Tag(high.reshape(out.shape), tag.scales)
            else:
                source.refuse(f"is summed over its channels in {self._where}")
        self._tag(out, made)

    def _tag(self, tensor: Tensor, tags: Tags) -> None:
        for tag in tags.values():
            if tag.channels.shape != tensor.shape:
                raise ValueError(f"{list(tag.channels.shape)} channels for {list(tensor.shape)} elements")
        self._tags[tensor] = tags

    def _lose(self, tensors: list[Tensor], name: str) -> None:
        for tensor in tensors:
            self._refuse(tensor, f"enters {name} in {self._where}")

    def _refuse(self, tensor: Tensor, reason: str) -> None:
        for source in self._tags.get(tensor, {}):
            source.refuse(reason)


def offset_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """Find o of a norm whose output is (weight + o) f(x) + bias, by running it. None for any other form.

    A norm without one weight for each channel of its output has none.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1:
        return None
    kept = {p: p.detach().clone() for p in (weight, bias) if isinstance(p, nn.Parameter)}
    outputs = []
    with torch.no_grad():
        try:
            if isinstance(bias, nn.Parameter):
                bias.zero_()
            for value in (0.0, 1.0, 2.0):
                weight.fill_(value)
                outputs.append(module(*args, **kwargs).double())
        finally:
            for parameter, values in kept.items():
                parameter.copy_(values)
    zero, one, two = outputs
    slope = one - zero
    if not bool(slope.abs().max() > 0) or (two - one - slope).abs().max() > 1e-4 * slope.abs().max():
        return None
    place = slope.abs().argmax()
    return round(float(zero.flatten()[place] / slope.flatten()[place]), 2)
