"""Quantized weights: each is quantized once, and not in every forward.

With `keep`, a quantized copy is held here, and the model's parameters stay as they are. Without `keep`, the parameter
itself is overwritten, unless another user would see the change. A copy is held of a weight that is tied, is another
module's, is used in parts, or is read by other code. A weight that is computed from a parameter is quantized in every
forward.

A weight in training is quantized in every forward, with its straight-through gradient. A changed parameter is noticed
by its identity, version and address. A change written through `parameter.data`, which autograd does not count, is not
noticed.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import weakref
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qsim_core.errors import QsimError
from qsim_core.formats.quantizer import SiteQuantizer, straight_through
from qsim_core.matmuls.layout import Layout
from qsim_core.quantizers.scales import Scales
from qsim_core.sites.arithmetic import Lowered, Lowering

READ = "read"
"""Stands among the uses of a parameter that other code than a matmul reads: to look up rows, or to compute a weight."""
MOVES = 2
"""A parameter whose object was replaced more often than this is being offloaded: no copy of it is held."""


@dataclass(frozen=True)
class Weight:
    """A parameter that is an operand of a matmul."""

    name: str
    """Its full name."""
    parameter: Tensor
    owned: bool
    """True if the operand is the whole parameter, multiplied by the module that owns it."""
    computed: bool = False
    """True if the operand is computed from the parameter. It is quantized in each forward, and never overwritten."""


@dataclass
class _State:
    """The state of a parameter at one time, from which a later change is noticed."""

    of: weakref.ref[Tensor] | None
    """The parameter. A weak reference: after the parameter is deleted, a new one may get its address and its id."""
    version: int
    address: int
    sums: tuple[float, float] | None = None
    """The sum and the sum of squares of values that qsim wrote: they identify a copied or reloaded parameter."""

    @classmethod
    def now(cls, parameter: Tensor, written: bool) -> _State:
        """Record the parameter's state; with its sums if qsim has `written` its values."""
        sums = _sums(parameter.detach()) if written else None
        return cls(weakref.ref(parameter), _version(parameter), parameter.data_ptr(), sums)

    def is_of(self, parameter: Tensor) -> bool:
        """Tell if this is the state of the same parameter object."""
        return self.of is not None and self.of() is parameter

    def holds(self, parameter: Tensor) -> bool:
        """Tell if the parameter is unchanged, or is another object that holds the values that were written."""
        now = _version(parameter), parameter.data_ptr()
        if self.is_of(parameter) and now == (self.version, self.address):
            return True
        held = self.sums is not None and self.sums == _sums(parameter.detach())
        if held:
            self.of = weakref.ref(parameter)
            self.version, self.address = now
        return held


@dataclass
class _Quantized:
    """One quantized weight: a copy, a lowered form, or values that overwrote the parameter."""

    state: _State
    in_place: bool
    copy: Tensor | None
    lowered: Any
    """The lowered form. For an overwritten parameter it is what `Lowering.keep` gave, to make the form again."""
    key: tuple[Any, ...] | None
    """The key of the lowering."""
    version: int = 0
    """The version of the learned steps that quantized the weight."""
    scales: Scales | None = None
    """The scales of an overwritten parameter, if a simulated arithmetic needs them."""


@dataclass
class _Pinned:
    """The scales of a weight that a transform has quantized."""

    state: _State
    scales: Scales


class Weights:
    """The quantized weights of one model."""

    def __init__(self, model: nn.Module, keep: bool) -> None:
        owners = Counter(_storage(parameter) for _, parameter in _all_parameters(model))
        self.tied = frozenset(name for name, parameter in _all_parameters(model) if owners[_storage(parameter)] > 1)
        self.elsewhere = frozenset(name for name, parameter in _all_parameters(model) if parameter.is_meta)
        self.keep = keep
        self.folded: dict[tuple[Any, ...], _Quantized] = {}
        self.moves: Counter[str] = Counter()
        self.uses: dict[str, set[str]] = {}
        """The layouts in which each weight is multiplied: with two different ones it cannot be overwritten."""
        self.pinned: set[str] = set()
        """The names of weights that a transform has quantized: they are final, and are not rounded again."""
        self._pins: dict[str, _Pinned] = {}
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out quantized copies, which a copied model makes again; the record of overwritten parameters stays."""
        in_place = {key: _without_reference(folded) for key, folded in self.folded.items() if folded.in_place}
        pins = {name: _without_reference(pin) for name, pin in self._pins.items()}
        return {**self.__dict__, "folded": in_place, "moves": Counter(), "_pins": pins, "lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock = threading.Lock()

    def met(self, weight: Weight, layout: Layout) -> None:
        """Note that a matmul multiplies by a weight."""
        self.uses.setdefault(weight.name, set()).add(layout.name)

    def read(self, name: str) -> None:
        """Note that other code than a matmul reads a parameter, which is a use of its own."""
        uses = self.uses.setdefault(name, set())
        if READ not in uses:
            uses.add(READ)
            if any(key[0] == name and folded.in_place for key, folded in self.folded.items()):
                raise _second_use(name, "also read by other code than a matmul")

    def pin(self, name: str, parameter: Tensor, scales: Scales | None) -> None:
        """Take a weight as final: its values are quantized. `scales` are those of its rows, [N, B]; None: unknown."""
        self.pinned.add(name)
        if scales is not None:
            self._pins[name] = _Pinned(_State.now(parameter, written=True), scales)

    def is_final(self, weight: Weight) -> bool:
        """Tell if a transform has quantized this weight; what is computed from such a weight is not final."""
        return weight.name in self.pinned and not weight.computed

    def pinned_scales(self) -> dict[str, Scales]:
        """The scales of the pinned weights by name, as far as they are known."""
        return {name: pin.scales for name, pin in self._pins.items()}

    def _pinned_under(self, weight: Weight, rows: Tensor) -> Scales | None:
        """The scales of a pinned weight, if `rows` are the whole weight and it has not changed; else None."""
        pin = self._pins.get(weight.name)
        if pin is None or not weight.owned or not pin.state.holds(weight.parameter):
            return None
        return pin.scales if len(pin.scales.scale) == len(rows) else None

    def overwritten(self, weight: Weight) -> bool:
        """Tell if the parameter itself was overwritten with quantized values."""
        return any(key[0] == weight.name and folded.in_place for key, folded in self.folded.items())

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
        if self.is_final(weight):
            return operand
        learns = quantizer.learns
        differentiable = torch.is_grad_enabled() and (operand.requires_grad or learns)
        if weight.computed or (differentiable and (training or learns)):
            return layout.back(quantizer(layout.rows(operand)))
        with self.lock:
            folded = self._fold(weight, operand, layout, quantizer, lowering, keep_scales)
            value = self._value(folded, operand, layout)
        if differentiable:
            return layout.back(straight_through(layout.rows(operand), quantizer, layout.rows(value)))
        return value

    def lowered(
        self, weight: Weight, operand: Tensor, layout: Layout, quantizer: SiteQuantizer, lowering: Lowering
    ) -> Lowered | None:
        """Lower the operand's rows, once for all calls; None if the lowering is not exact for them.

        The lowered form of an overwritten parameter is made again in each call, from the parameter's values.
        """
        if weight.computed:
            new: Lowered | None = lowering.new(layout.rows(operand.detach()))
            return new
        if self.is_final(weight):
            rows = layout.rows(operand.detach())
            found: Lowered | None = lowering.pinned(rows, self._pinned_under(weight, rows))
            return found
        with self.lock:
            folded = self._fold(weight, operand, layout, quantizer, lowering)
            if not folded.in_place:
                if folded.key != lowering.key:
                    made = lowering.new(layout.rows(operand.detach()))
                    if made is not None:
                        folded.lowered, folded.key, folded.copy = made, lowering.key, None
                return folded.lowered if folded.key == lowering.key else None
        if folded.key is None or folded.key[0] != lowering.arithmetic:
            return None
        again: Lowered | None = lowering.again(layout.rows(operand.detach()), folded.lowered)
        return again

    def scales_of(self, weight: Weight, operand: Tensor, layout: Layout) -> Scales | None:
        """The scales of a weight whose original values were overwritten; None for any other, or if unknown."""
        if weight.computed:
            return None
        if self.is_final(weight):
            return self._pinned_under(weight, layout.rows(operand.detach()))
        folded = self.folded.get(_key(weight, operand, layout))
        return None if folded is None or not folded.in_place else folded.scales

    @staticmethod
    def _value(folded: _Quantized, operand: Tensor, layout: Layout) -> Tensor:
        """The operand's quantized values."""
        if folded.in_place:
            return operand
        if folded.copy is not None:
            return folded.copy
        values: Tensor = layout.back(folded.lowered.values())
        return values

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
        if folded is not None and folded.version == quantizer.version and folded.state.holds(parameter):
            return folded
        if folded is not None and not folded.state.is_of(parameter):
            self.moves[weight.name] += 1
        with torch.no_grad():
            rows = layout.rows(operand.detach())
            lowered = lowering.new(rows) if lowering is not None else None
            quantized: Any = quantizer.quantize(rows) if lowered is None else None
            only_use = weight.name not in self.tied | self.elsewhere and len(self.uses[weight.name]) == 1
            in_place = not self.keep and weight.owned and only_use
            scales = quantizer.scales(rows) if in_place and keep_scales else None
            if in_place:
                parameter.data.copy_(layout.back(quantized if lowered is None else lowered.values()))
                quantized = None
                _return_freed_memory()
                lowered = None if lowering is None or lowered is None else lowering.keep(lowered)
            copy = None if quantized is None else torch.empty_like(operand).copy_(layout.back(quantized))
        key_of_lowering = None if lowering is None or lowered is None else lowering.key
        state = _State.now(parameter, written=in_place)
        folded = _Quantized(state, in_place, copy, lowered, key_of_lowering, quantizer.version, scales)
        self.folded[key] = folded
        if weight.name in self.elsewhere or self.moves[weight.name] > MOVES:
            del self.folded[key]
        return folded

    def folded_into(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Put the quantized copies into a model's state, and name the weights that keep their original values.

        A weight with another use keeps them: a tied one, or one that is multiplied in two layouts or looked up.
        """
        copies = [(key, folded.copy) for key, folded in self.folded.items() if folded.copy is not None]
        left = {key[0] for key, _ in copies if key[0] in self.tied or len(self.uses[key[0]]) > 1}
        found = dict(state)
        for (name, _, offset, shape, stride), copy in copies:
            if name not in left:
                if found[name] is state[name]:
                    found[name] = state[name].clone()
                found[name].as_strided(shape, stride, offset - state[name].storage_offset()).copy_(copy)
        return found, sorted(left)


def _second_use(name: str, how: str) -> QsimError:
    return QsimError(
        f"{name} is {how} and was overwritten for the first use; keep its original with keep=True, or give simulate "
        f"an example, so that both uses are known beforehand"
    )


def _key(weight: Weight, operand: Tensor, layout: Layout) -> tuple[Any, ...]:
    """A key for an operand: the parameter, the part of it, and the layout."""
    return weight.name, layout.name, operand.storage_offset(), tuple(operand.shape), operand.stride()


def _without_reference(kept: Any) -> Any:
    """Copy a record without its reference to the parameter object, which a copied model does not share."""
    return replace(kept, state=replace(kept.state, of=None))


def _return_freed_memory() -> None:
    """Return freed memory to the system, which glibc would keep."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _sums(x: Tensor) -> tuple[float, float]:
    """The sum and the sum of squares, in float64."""
    wide = x.double()
    return float(wide.sum()), float(wide.square().sum())


def _storage(parameter: Tensor) -> int:
    """An identifier that tied parameters share: the address of their memory, or the object's id if it has none."""
    address = 0 if parameter.is_meta or parameter.layout != torch.strided else parameter.untyped_storage().data_ptr()
    return address or id(parameter)


def _all_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version
