"""Weights are quantized once, not once a forward, and only where nobody else looks.

With `keep` the quantized copy lies here, beside the model, whose parameters stay as they are. Without it the
parameter itself is overwritten, unless it is tied, foreign to the module that multiplies by it, or used in parts:
then its other users would see it, and a copy is held after all. A weight that trains is quantized in every
forward, with its straight-through gradient. That a parameter has changed is seen by its identity, version and address:
what is written behind autograd's back, through `parameter.data`, is not.
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
from qsim_core.formats.quantizer import Quantizer, straight_through
from qsim_core.matmuls.layout import Layout
from qsim_core.quantizers.scales import Scales
from qsim_core.sites.lowered import Form, Lowered

MOVES = 2
"""A parameter object that was exchanged more often than this is being offloaded: no copy of it is held."""


@dataclass(frozen=True)
class Weight:
    """A parameter met as an operand: whose it is, and whether the operand is all of it, met by its owner."""

    name: str
    parameter: Tensor
    owned: bool


@dataclass
class _Folded:
    """One quantized weight, and what it was made from: a copy, another form, or what the parameter itself became."""

    in_place: bool
    copy: Tensor | None
    lowered: Any
    """The other form; of a parameter that was overwritten what its form keeps."""
    form: tuple[Any, ...] | None
    """The key of that form."""
    of: weakref.ref[Tensor] | None
    """The parameter, as long as it lives; a new one may get its address and its id."""
    version: int
    address: int
    sums: tuple[float, float] | None = None
    """Of values that overwrote the parameter: they are known again in a copy, or when they are loaded back."""
    steps: int = 0
    """The version of the learned steps that it was made with."""

    def is_of(self, parameter: Tensor) -> bool:
        return self.of is not None and self.of() is parameter


class Weights:
    """The quantized weights of one model."""

    def __init__(self, model: nn.Module, keep: bool) -> None:
        owners = Counter(_storage(parameter) for _, parameter in _named(model))
        self.tied = frozenset(name for name, parameter in _named(model) if owners[_storage(parameter)] > 1)
        self.elsewhere = frozenset(name for name, parameter in _named(model) if parameter.is_meta)
        self.keep = keep
        self.folded: dict[tuple[Any, ...], _Folded] = {}
        self.moves: Counter[str] = Counter()
        self.uses: dict[str, set[str]] = {}
        """The layouts in which each weight was met: along two reduction axes it cannot be overwritten."""
        self.pinned: set[str] = set()
        """Weights that a transform has put on their grid: final, and not rounded again."""
        self.scales: dict[str, _Folded] = {}
        """Under which, where it said so."""
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Copies are made anew in a copied model; that a parameter itself was overwritten has to be remembered."""
        in_place = {key: replace(folded, of=None) for key, folded in self.folded.items() if folded.in_place}
        scales = {name: replace(folded, of=None) for name, folded in self.scales.items()}
        return {**self.__dict__, "folded": in_place, "moves": Counter(), "scales": scales, "lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock = threading.Lock()

    def met(self, weight: Weight, layout: Layout, module: nn.Module) -> None:
        """Note a use of a weight; an embedding's table is looked up too."""
        uses = self.uses.setdefault(weight.name, set())
        uses.add(layout.name)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            uses.add("looked up")

    def pin(self, name: str, parameter: Tensor, scales: Scales | None) -> None:
        """Take a weight for final: it lies on its grid, under scales of its rows [N, B] where it is known."""
        self.pinned.add(name)
        if scales is not None:
            state = weakref.ref(parameter), _version(parameter), parameter.data_ptr(), _sums(parameter.detach())
            self.scales[name] = _Folded(True, None, scales, None, *state)

    def _pinned_under(self, weight: Weight, rows: Tensor) -> Scales | None:
        """The scales of a pinned weight, if this is all of it, and nobody has changed it since."""
        known = self.scales.get(weight.name)
        if known is None or not weight.owned or not self._holds(known, weight.parameter):
            return None
        scales: Scales = known.lowered
        return scales if len(scales.scale) == len(rows) else None

    def overwritten(self, weight: Weight) -> bool:
        """Whether the parameter itself holds quantized values by now, so that the original is gone."""
        return any(key[0] == weight.name and folded.in_place for key, folded in self.folded.items())

    def quantized(
        self,
        weight: Weight,
        operand: Tensor,
        layout: Layout,
        quantizer: Quantizer,
        training: bool,
        form: Form | None = None,
    ) -> Tensor:
        """The operand quantized: made now where it trains, else from what was made before, in whatever form."""
        if weight.name in self.pinned:
            return operand
        learns = getattr(quantizer, "learns", False)
        differentiable = torch.is_grad_enabled() and (operand.requires_grad or learns)
        if differentiable and (training or learns):
            return layout.back(quantizer(layout.rows(operand)))
        with self.lock:
            value = self._value(self._fold(weight, operand, layout, quantizer, form), operand, layout)
        if differentiable:
            return layout.back(straight_through(layout.rows(operand), quantizer, layout.rows(value)))
        return value

    def lowered(
        self, weight: Weight, operand: Tensor, layout: Layout, quantizer: Quantizer, form: Form
    ) -> Lowered | None:
        """The operand's rows in another form, made once; None where that is not exact.

        Of a parameter that was overwritten it is made anew each time, from its values: there is no second copy.
        """
        if weight.name in self.pinned:
            rows = layout.rows(operand.detach())
            found: Lowered | None = form.pinned(rows, self._pinned_under(weight, rows))
            return found
        with self.lock:
            folded = self._fold(weight, operand, layout, quantizer, form)
            if not folded.in_place:
                if folded.form != form.key and (made := form.new(layout.rows(operand.detach()))) is not None:
                    folded.lowered, folded.form, folded.copy = made, form.key, None
                return folded.lowered if folded.form == form.key else None
        if folded.form is None or folded.form[0] != form.path:
            return None
        again: Lowered | None = form.again(layout.rows(operand.detach()), folded.lowered)
        return again

    @staticmethod
    def _value(folded: _Folded, operand: Tensor, layout: Layout) -> Tensor:
        """The operand's quantized values."""
        if folded.in_place:
            return operand
        if folded.copy is not None:
            return folded.copy
        value: Tensor = layout.back(folded.lowered.values())
        return value

    def _fold(
        self,
        weight: Weight,
        operand: Tensor,
        layout: Layout,
        quantizer: Quantizer,
        form: Form | None = None,
    ) -> _Folded:
        parameter = weight.parameter
        key = (weight.name, layout.name, operand.storage_offset(), tuple(operand.shape), operand.stride())
        folded = self.folded.get(key)
        if folded is None and self.overwritten(weight):
            raise QsimError(
                f"{weight.name} is multiplied along two axes and was overwritten for the first; keep its original "
                f"with keep=True, or give simulate an example, so that both uses are known beforehand"
            )
        steps = getattr(quantizer, "version", 0)
        if folded is not None and folded.steps == steps and self._holds(folded, parameter):
            return folded
        if folded is not None and not folded.is_of(parameter):
            self.moves[weight.name] += 1
        with torch.no_grad():
            rows = layout.rows(operand.detach())
            lowered = form.new(rows) if form is not None else None
            quantized: Any = quantizer.quantize(rows) if lowered is None else None
            alone = weight.name not in self.tied | self.elsewhere and len(self.uses[weight.name]) == 1
            in_place = not self.keep and weight.owned and alone
            if in_place:
                parameter.data.copy_(layout.back(quantized if lowered is None else lowered.values()))
                quantized = None
                _give_back()
                lowered = None if form is None or lowered is None else form.keep(lowered)
            copy = None if quantized is None else torch.empty_like(operand).copy_(layout.back(quantized))
        folded = _Folded(
            in_place,
            copy,
            lowered,
            None if form is None or lowered is None else form.key,
            weakref.ref(parameter),
            _version(parameter),
            parameter.data_ptr(),
            _sums(parameter.detach()) if in_place else None,
            steps,
        )
        self.folded[key] = folded
        if weight.name in self.elsewhere or self.moves[weight.name] > MOVES:
            del self.folded[key]
        return folded

    def folded_into(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """A model's state with the quantized weights in it, and the names of those that others need as they are."""
        copies = [(key, folded.copy) for key, folded in self.folded.items() if folded.copy is not None]
        left = {key[0] for key, _ in copies if key[0] in self.tied or len(self.uses[key[0]]) > 1}
        found = dict(state)
        for (name, _, offset, shape, stride), copy in copies:
            if name not in left:
                if found[name] is state[name]:
                    found[name] = state[name].clone()
                found[name].as_strided(shape, stride, offset - state[name].storage_offset()).copy_(copy)
        return found, sorted(left)

    @staticmethod
    def _holds(folded: _Folded, parameter: Tensor) -> bool:
        """Whether the parameter still is (a copy), or still holds (in place), what was quantized."""
        made_from = _version(parameter), parameter.data_ptr()
        if folded.is_of(parameter) and made_from == (folded.version, folded.address):
            return True
        held = folded.in_place and folded.sums == _sums(parameter.detach())
        if held:
            folded.of = weakref.ref(parameter)
            folded.version, folded.address = made_from
        return held


def _give_back() -> None:
    """Return to the system what was freed: glibc keeps it, for an allocation that does not come."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _sums(x: Tensor) -> tuple[float, float]:
    wide = x.double()
    return float(wide.sum()), float(wide.square().sum())


def _storage(parameter: Tensor) -> int:
    """What two parameters share that are tied; those that have no memory are known by themselves."""
    address = 0 if parameter.is_meta else parameter.untyped_storage().data_ptr()
    return address or id(parameter)


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version
