"""Quantized weights: each is quantized once, and not in every forward.

With `keep`, a quantized copy is held here, and the model's parameters stay as they are. Without `keep`, the parameter
itself is overwritten, unless another user would see the change. A copy is held of a weight that is tied, is another
module's, is used in parts, or is read by other code. A weight that is computed from a parameter is quantized in every
forward. Where an exact arithmetic multiplies codes that are smaller than the values, a `CodedParameter` with these
takes the place of an overwritten parameter.

A weight in training is quantized in every forward, with its straight-through gradient. Elsewhere `Snapshot` tells in
each forward if a parameter has changed; it is then quantized again. A weight that a transform has quantized may not
change.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import sys
import threading
from collections import Counter
from collections.abc import KeysView
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qsim_core.errors import QsimError, natural_order
from qsim_core.formats.coded_parameter import PARAMETERS, CodedParameter
from qsim_core.formats.quantizer import SiteQuantizer, straight_through
from qsim_core.matmuls.layout import LAST, Layout
from qsim_core.quantizers.scales import Scales
from qsim_core.sites.arithmetic import Lowered, Lowering, QuantizedRows
from qsim_core.snapshots import Snapshot, has_memory

READ = "read"
"""Stands among the uses of a parameter that other code than a matmul reads: to look up rows, or to compute a weight."""
MOVES = 2
"""A parameter whose object was replaced more often than this is being offloaded: no copy of it is held."""


class Weight(NamedTuple):
    """A parameter that is an operand of a matmul."""

    name: str
    """Its full name."""
    parameter: Tensor
    owned: bool
    """True if the operand is the whole parameter, multiplied by the module that owns it."""
    computed: bool = False
    """True if the operand is computed from the parameter. It is quantized in each forward, and never overwritten."""


@dataclass
class _Quantized:
    """One quantized weight: a copy, a lowered form, or values that overwrote the parameter."""

    seen: Snapshot
    held: tuple[Snapshot, ...]
    """The tensors that the quantizer holds, such as learned steps."""
    layout: Layout | None
    """The layout of its rows; None for an overwritten parameter."""
    in_place: bool
    copy: Tensor | None
    lowered: Any
    """The lowered form. For an overwritten parameter it is what `Lowering.keep` gave, to make the form again."""
    key: tuple[Any, ...] | None
    """The key of the lowering."""
    scales: Scales | None = None
    """The scales of an overwritten parameter, if a simulated arithmetic needs them."""
    fresh: Lowered | None = None
    """The lowered form whose values have just overwritten the parameter; it is taken once."""
    rows: QuantizedRows | None = None
    """The rows of the copy, as a simulated arithmetic gets them."""

    def holds(self, parameter: Tensor, quantizer: SiteQuantizer) -> bool:
        """Tell if the parameter, and what the quantizer holds, are unchanged."""
        held = quantizer.held
        if (held or self.held) and (len(held) != len(self.held) or not all(map(Snapshot.holds, self.held, held))):
            return False
        return self.seen.holds(parameter)

    def values(self) -> Tensor:
        """The quantized values of a weight that was not overwritten."""
        if self.copy is not None:
            return self.copy
        assert self.layout is not None
        values: Tensor = self.layout.back(self.lowered.values())
        return values


@dataclass
class _Pinned:
    """A weight that a transform has quantized."""

    seen: Snapshot
    dtype: torch.dtype
    scales: Scales | None
    of_scales: Scales | None = None
    """The scales of the scales."""
    stored: Any = None
    """The `EncodedWeight` of a weight that was stored quantized."""


class Weights:
    """The quantized weights of one model."""

    def __init__(self, model: nn.Module, keep: bool) -> None:
        self.names = frozenset(name for name, _ in _all_parameters(model))
        """The names of all parameters that the model had when it was simulated."""
        self.model = model
        self._tied: frozenset[str] | None = None
        self.elsewhere = frozenset(name for name, parameter in _all_parameters(model) if parameter.is_meta)
        self.keep = keep
        self.folded: dict[tuple[str, str, Part | None], _Quantized] = {}
        self.moves: Counter[str] = Counter()
        self.uses: dict[str, set[str]] = {}
        """The layouts in which each weight is multiplied: with two different ones it cannot be overwritten."""
        self._pins: dict[str, _Pinned] = {}
        self._coded: dict[str, tuple[CodedParameter, tuple[Any, ...]]] = {}
        """The overwritten parameters that hold codes, each with the key of the lowering that made these."""
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out quantized copies, which a copied model makes again; the record of overwritten parameters stays."""
        in_place = {key: folded for key, folded in self.folded.items() if folded.in_place}
        return {**self.__dict__, "folded": in_place, "moves": Counter(), "_coded": {}, "lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock = threading.Lock()

    @property
    def pinned(self) -> KeysView[str]:
        """The names of weights that a transform has quantized: they are final, and are not rounded again."""
        return self._pins.keys()

    @property
    def tied(self) -> frozenset[str]:
        """The names of parameters that share their memory in this forward; code may tie them at any time."""
        if self._tied is None:
            self._tied = _sharing_memory(_all_parameters(self.model))
        return self._tied

    def begin(self) -> None:
        """Compare the weights on a device with what they were, at the start of a forward."""
        with self.lock:
            self._tied = None
            Snapshot.compare(self._seen())

    def refresh(self) -> None:
        """Forget all copies, and compare the values of overwritten and of final weights at their next use."""
        with self.lock:
            self.folded = {key: folded for key, folded in self.folded.items() if folded.in_place}
            for seen in self._seen():
                seen.doubt()

    def _seen(self) -> list[Snapshot]:
        return [*(folded.seen for folded in self.folded.values()), *(pin.seen for pin in self._pins.values())]

    def met(self, weight: Weight, layout: Layout) -> None:
        """Note that a matmul multiplies by a weight."""
        if layout.name not in self.uses.get(weight.name, ()):
            self.uses.setdefault(weight.name, set()).add(layout.name)

    def read(self, name: str) -> None:
        """Note that other code than a matmul reads a parameter, which is a use of its own."""
        uses = self.uses.setdefault(name, set())
        if READ not in uses:
            uses.add(READ)
            if any(key[0] == name and folded.in_place for key, folded in self.folded.items()):
                raise _second_use(name, "also read by other code than a matmul")

    def pin(
        self, name: str, parameter: Tensor, scales: Scales | None, of_scales: Scales | None = None, stored: Any = None
    ) -> None:
        """Take a weight as final: its values are quantized. `scales` are those of its rows, [N, B]; None: unknown.

        `of_scales` are the scales of these. `stored` is the `EncodedWeight` of a weight that was stored quantized.
        """
        self._pins[name] = _Pinned(Snapshot(parameter, whole=True), parameter.dtype, scales, of_scales, stored)

    def known(self, name: str) -> tuple[Scales | None, Scales | None]:
        """The scales of a pinned weight, and the scales of these, as far as they are known."""
        return self._pins[name].scales, self._pins[name].of_scales

    def stored(self, name: str) -> Any:
        """The `EncodedWeight` of a weight that was stored quantized; None: it was not, or has no codes."""
        return self._pins[name].stored if name in self._pins else None

    def shown(self, name: str, operand: Tensor, computed: bool) -> Weight:
        """Give the weight that an operand is, or is a part of, where a watcher is shown a call."""
        parameter = operand if computed or name not in self.names else self.model.get_parameter(name)
        return Weight(name, parameter, owned=parameter.numel() == operand.numel(), computed=computed)

    def final(self, weight: Weight) -> _Pinned | None:
        """Find the record of a weight that a transform has quantized; what is computed from such a weight has none.

        Raises `QsimError` if the weight has changed since.
        """
        pin = None if weight.computed or not self._pins else self._pins.get(weight.name)
        if pin is None or self._coded_by(weight) is not None or pin.seen.holds(weight.parameter):
            return pin
        if pin.dtype == weight.parameter.dtype:
            raise QsimError(
                f"{weight.name} has changed since a transform put it on its grid; "
                f"load the model again, change it, and simulate it then"
            )
        self._pins[weight.name] = _Pinned(Snapshot(weight.parameter, whole=True), weight.parameter.dtype, None)
        return self._pins[weight.name]

    @staticmethod
    def _scales_for(pin: _Pinned, weight: Weight, rows: Tensor) -> Scales | None:
        """The scales of a final weight, if `rows` are the whole weight; else None."""
        whole = weight.owned and pin.scales is not None and len(pin.scales.scale) == len(rows)
        return pin.scales if whole else None

    def overwritten(self, weight: Weight) -> bool:
        """Tell if the parameter itself was overwritten with quantized values, or with their codes."""
        coded = weight.name in self._coded
        return coded or any(key[0] == weight.name and folded.in_place for key, folded in self.folded.items())

    def will_overwrite(self, weight: Weight) -> bool:
        """Tell if quantizing a weight overwrites the parameter."""
        return not (self.keep or weight.computed or self.overwritten(weight)) and self._only_use(weight)

    def quantized(
        self,
        weight: Weight,
        operand: Tensor,
        layout: Layout,
        quantizer: SiteQuantizer,
        training: bool,
        lowering: Lowering | None = None,
        keep_scales: bool = False,
    ) -> Tensor:
        """Quantize the operand: anew if it trains, else once for all calls."""
        codes = self._coded_by(weight)
        if codes is not None and layout is LAST and not torch.is_grad_enabled():
            value: Tensor = codes.values()
            return value
        if self.final(weight) is not None:
            return operand
        learns = quantizer.learns
        differentiable = torch.is_grad_enabled() and (operand.requires_grad or learns)
        if weight.computed or (differentiable and (training or learns)):
            return layout.back(quantizer(layout.rows(operand)))
        with self.lock:
            folded = self._fold(weight, operand, layout, quantizer, lowering, keep_scales)
            value = operand if folded.in_place else folded.values()
        if differentiable:
            return layout.back(straight_through(layout.rows(operand), quantizer, layout.rows(value)))
        return value

    def lowered(
        self,
        weight: Weight,
        operand: Tensor,
        layout: Layout,
        quantizer: SiteQuantizer,
        lowering: Lowering,
        keep_scales: bool = False,
    ) -> Lowered | None:
        """Lower the operand's rows, once for all calls; None if the lowering is not exact for them.

        The lowered form of an overwritten parameter takes its place, or is made again in each call from its values.
        """
        found: Lowered | None = self._coded_by(weight, lowering)
        if found is not None and layout is LAST:
            return found
        if weight.computed:
            new: Lowered | None = lowering.new(layout.rows(operand.detach()))
            return new
        if (pin := self.final(weight)) is not None:
            rows = layout.rows(operand.detach())
            found = lowering.pinned(rows, self._scales_for(pin, weight, rows))
            return found if self.keep else self._in_place_of(weight, layout, lowering, found, pin)
        with self.lock:
            folded = self._fold(weight, operand, layout, quantizer, lowering, keep_scales)
            if not folded.in_place:
                if folded.key != lowering.key:
                    with torch.inference_mode(False):
                        made = lowering.new(layout.rows(operand.detach()))
                    if made is not None:
                        folded.lowered, folded.key, folded.copy = made, lowering.key, None
                return folded.lowered if folded.key == lowering.key else None
        if folded.key is None or folded.key[0] != lowering.arithmetic:
            return None
        again, folded.fresh = folded.fresh, None
        if again is None:
            again = lowering.again(layout.rows(operand.detach()), folded.lowered)
        return again if folded.held else self._in_place_of(weight, layout, lowering, again, folded)

    def _coded_by(self, weight: Weight, lowering: Lowering | None = None) -> Any:
        """The codes that a parameter holds, if this lowering made them, or any; None: it holds values."""
        coded, key = self._coded.get(weight.name, (None, None))
        if coded is None or coded is not weight.parameter or not weight.owned:
            return None
        return coded.codes if lowering is None or lowering.key == key else None

    def _in_place_of(
        self, weight: Weight, layout: Layout, lowering: Lowering, made: Lowered | None, record: _Quantized | _Pinned
    ) -> Lowered | None:
        """Put codes in the place of a parameter with their values, if they are smaller and this is its only use."""
        path, _, attribute = weight.name.rpartition(".")
        if made is None or layout is not LAST or not self._only_use(weight) or not lowering.compact(made):
            return made
        parameters = self.model.get_submodule(path)._parameters
        own = parameters.get(attribute)
        if own is not None and own is weight.parameter and type(own) in PARAMETERS:
            record.seen = Snapshot(made.values(), whole=True)  # a zero has no sign any more
            parameters[attribute] = coded = CodedParameter(own, made)
            self._coded[weight.name] = coded, lowering.key
        return made

    def _only_use(self, weight: Weight) -> bool:
        """Tell if no other code sees the values of a parameter, which may be overwritten then."""
        alone = len(self.uses[weight.name]) == 1 and weight.name not in self.elsewhere
        return weight.owned and alone and weight.name not in self.tied

    def scales_of(self, weight: Weight, operand: Tensor, layout: Layout) -> Scales | None:
        """The scales of a weight whose original values were overwritten; None for any other, or if unknown."""
        if weight.computed:
            return None
        if (pin := self.final(weight)) is not None:
            return self._scales_for(pin, weight, layout.rows(operand))
        folded = self.folded.get(_key(weight, operand, layout))
        return None if folded is None or not folded.in_place else folded.scales

    def rows(
        self, weight: Weight, operand: Tensor, layout: Layout, quantizer: SiteQuantizer, values: Tensor
    ) -> QuantizedRows | None:
        """Give the rows of a quantized copy, made once, to a simulated arithmetic; None for values of no copy."""
        folded = self.folded.get(_key(weight, operand, layout))
        if folded is None or folded.copy is not values:
            return None
        with self.lock:
            if folded.rows is None:
                before, after = (torch.atleast_2d(layout.rows(x.detach())) for x in (operand, values))
                folded.rows = QuantizedRows(after, quantizer, functools.partial(quantizer.scales, before))
        return folded.rows

    def _fold(
        self,
        weight: Weight,
        operand: Tensor,
        layout: Layout,
        quantizer: SiteQuantizer,
        lowering: Lowering | None = None,
        keep_scales: bool = False,
    ) -> _Quantized:
        """Quantize the operand, or find its quantized weight if the parameter has not changed since."""
        parameter, key = weight.parameter, _key(weight, operand, layout)
        folded = self.folded.get(key)
        if folded is None and self.overwritten(weight):
            raise _second_use(weight.name, "multiplied along two axes")
        if folded is not None and (self._coded_by(weight) is not None or folded.holds(parameter, quantizer)):
            return folded
        if folded is not None and not folded.seen.is_of(parameter):
            self.moves[weight.name] += 1
        with torch.inference_mode(parameter.is_inference()), torch.no_grad():
            rows = layout.rows(operand.detach())
            lowered = lowering.new(rows) if lowering is not None else None
            quantized: Any = quantizer.quantize(rows) if lowered is None else None
            in_place = not self.keep and self._only_use(weight)
            scales = quantizer.scales(rows) if in_place and keep_scales else None
            if in_place:
                into = getattr(lowered, "values_into", None)
                if into is not None and layout is LAST:
                    into(parameter.data)
                else:
                    parameter.data.copy_(layout.back(quantized if lowered is None else lowered.values()))
                quantized, made = None, lowered
                _return_freed_memory()
                lowered = None if lowering is None or lowered is None else lowering.keep(lowered)
            kept = None if quantized is None else torch.empty_like(operand).copy_(layout.back(quantized))
        key_of_lowering = None if lowering is None or lowered is None else lowering.key
        seen, held = Snapshot(parameter, whole=in_place), tuple(map(Snapshot, quantizer.held))
        folded = _Quantized(seen, held, None if in_place else layout, in_place, kept, lowered, key_of_lowering, scales)
        self.folded[key] = folded
        if in_place and made is not None and lowering is not None and lowering.compact(made):
            folded.fresh = made
        if weight.name in self.elsewhere or self.moves[weight.name] > MOVES:
            del self.folded[key]
        return folded

    def folded_into(self, state: dict[str, Tensor], wanted: set[str]) -> tuple[dict[str, Tensor], list[str]]:
        """Put the quantized copies into a copy of a model's state; name the `wanted` ones that keep original values.

        A weight with another use keeps them: a tied one, or one that is multiplied in two layouts or looked up.
        """
        copies = [(key, folded) for key, folded in self.folded.items() if not folded.in_place]
        left = wanted - {key[0] for key in self.folded} - self.pinned
        left |= {key[0] for key, _ in copies if key[0] in self.tied or len(self.uses[key[0]]) > 1}
        memo: dict[int, Any] = {}
        found = {name: _copied(value, memo) for name, value in state.items()}
        for (name, _, part), folded in copies:
            if name not in left:
                _part_of(found[name], part).copy_(folded.values())
        return found, sorted(left, key=natural_order)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """Copy what a state holds. Tied tensors stay tied; those of classes of their own may not know how to be copied."""
    own = isinstance(value, Tensor) and type(value) is not Tensor
    return value.detach().clone() if own else copy.deepcopy(value, memo)


def _second_use(name: str, how: str) -> QsimError:
    return QsimError(
        f"{name} is {how} and was overwritten for the first use; keep its original with keep=True, or give simulate "
        f"an example, so that both uses are known beforehand"
    )


Part = tuple[int, tuple[int, ...], tuple[int, ...]]
"""The part of a parameter that an operand is: where it begins, its shape and its strides."""


def _key(weight: Weight, operand: Tensor, layout: Layout) -> tuple[str, str, Part | None]:
    """A key for an operand: the parameter, the layout, and the part of the parameter; None: all of it, as it is."""
    if operand is weight.parameter:
        return weight.name, layout.name, None
    begin = int(operand.storage_offset() - weight.parameter.storage_offset())
    return weight.name, layout.name, (begin, tuple(operand.shape), operand.stride())


def _part_of(parameter: Tensor, part: Part | None) -> Tensor:
    """The part of a parameter, as a view."""
    if part is None:
        return parameter
    begin, shape, stride = part
    return parameter.as_strided(shape, stride, parameter.storage_offset() + begin)


def _return_freed_memory() -> None:
    """Return freed memory to the system, which glibc would keep."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _sharing_memory(parameters: list[tuple[str, nn.Parameter]]) -> frozenset[str]:
    """The names of parameters that lie, in part at least, in the memory of another one."""
    shared: set[str] = set()
    end, last = 0, ""
    for (begin, stop), name in sorted((_extent(parameter), name) for name, parameter in parameters):
        if begin < end:
            shared |= {name, last}
        if stop > end:
            end, last = stop, name
    return frozenset(shared)


def _extent(parameter: Tensor) -> tuple[int, int]:
    """The first address of a parameter's memory and the one after it; the object's id, if it has no memory."""
    begin = parameter.data_ptr() if has_memory(parameter) else 0
    if begin == 0:
        return id(parameter), id(parameter) + 1
    span = 1 + sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    return begin, begin + span * parameter.element_size()


def _all_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))
