"""The weights of a model as codes and scales, which decode to the values that the sites multiply, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qsim_core.errors import QsimError
from qsim_core.formats.codes import Encoded
from qsim_core.formats.random_bits import at
from qsim_core.matmuls.call import Call
from qsim_core.matmuls.layout import Layout, holds_experts, layout_of
from qsim_core.quantizers.stacked import Stacked
from qsim_core.sites.operand import operands_of
from qsim_core.sites.quantized_weights import Weight
from qsim_core.sites.site import Site
from qsim_core.sites.sites import Sites


@dataclass(frozen=True)
class EncodedWeight:
    """A weight as it would be stored, or the reason why it has no stored form."""

    name: str
    """The parameter's full name."""
    quantizer: Any = None
    """The quantizer, with the number format (`rounds_to`) and the elements that share a scale (`granularity`)."""
    layout: Layout | None = None
    """The view of the parameter as rows [..., K], whose columns share scales; codes and scales are those of rows."""
    stored: Encoded | None = None
    why_not: str = ""
    """The reason why the weight cannot be encoded; empty if it can."""
    scales: Any = None
    """Of a weight that is given as final, the `Scales` of the parameter's rows; None: unknown."""

    @property
    def encoded(self) -> Encoded:
        """The codes, the scales and the zero points. Raises `QsimError` with the reason if there are none."""
        if self.stored is None:
            raise QsimError(f"{self.name} cannot be encoded: {self.why_not}")
        return self.stored

    def decode(self) -> Tensor:
        """Compute the weight that the site multiplies, in the parameter's shape and dtype. Raises `QsimError`."""
        encoded = self.encoded
        rows: Tensor = self.quantizer.decode(encoded)
        return rows if self.layout is None else self.layout.back(rows)


@dataclass
class WeightEncoder:
    """Encodes every weight of a forward. It is the watcher and the observer of the sites meanwhile."""

    model: nn.Module
    sites: Sites
    found: dict[str, EncodedWeight] = field(default_factory=dict)
    """The weights met so far, by name."""
    observed: tuple[Site, Tensor, Tensor, Any] | None = None
    """The last weight that was observed: its site, its rows before and after, and its quantizer."""

    def watch(self, site: Site, call: Call) -> None:
        """Encode the weight of a call that was computed."""
        if self.observed is not None and self.observed[0] is site:
            self._note(site, call, *self.observed[1:])

    def meet(self, site: Site, call: Call) -> None:
        """Encode the weight of a call in which nothing is quantized, as its site would quantize it."""
        if call.weight is None or site.weight is None:
            return
        weight = Weight(site.weight, call.operands[call.weight], owned=True, computed=site.computed)
        met = [weight if place == call.weight else None for place in range(len(call.operands))]
        for operand in operands_of(site, call, met, lambda role: site.quantizer(role) if role == "weight" else None):
            if operand.quantizer is not None:
                rows, final = operand.rows.detach(), site.weight in self.sites.weights.pinned
                with at(f"{site.name}:weight", 0):
                    after = rows if final else operand.quantizer.quantize(rows)
                self._note(site, call, rows, after, operand.quantizer)

    def __call__(self, site: Site, role: str, before: Tensor, after: Tensor, quantizer: Any) -> None:
        """Keep a weight for `watch`, which is shown its call."""
        if role == "weight" and quantizer is not None and site.weight is not None:
            self.observed = site, before, after, quantizer

    def _note(self, site: Site, call: Call, before: Tensor, after: Tensor, quantizer: Any) -> None:
        """Encode a weight when it is met first; each time, compare what it decodes to with the rows `after`."""
        known = self.found.get(name := str(site.weight))
        if known is not None and known.why_not:
            return
        try:
            self.found[name] = self._checked(known, site, call, before, after, quantizer)
        except QsimError as error:
            self.found[name] = EncodedWeight(name, why_not=str(error))

    def _checked(
        self, known: EncodedWeight | None, site: Site, call: Call, before: Tensor, after: Tensor, quantizer: Any
    ) -> EncodedWeight:
        assert call.weight is not None and site.weight is not None
        operand, layout = call.operands[call.weight].detach(), call.layouts[call.weight]
        parameter = self.model.get_parameter(site.weight).detach()
        whole = None if site.computed or "weight" in site.rotations else layout_of(parameter, operand, layout)
        if whole is None:
            raise QsimError("it is computed from the parameter in each forward, or a part of its columns is multiplied")
        if operand.numel() < parameter.numel():
            before = whole.rows(parameter)
            if not quantizer.by_rows and not isinstance(quantizer, Stacked) and holds_experts(parameter, whole):
                quantizer = Stacked(each=quantizer)
        stored: EncodedWeight | None = self.sites.weights.stored(site.weight)
        if stored is not None:
            known = stored
        elif known is None:
            with at(f"{site.name}:weight", 0):
                rows = before.reshape(whole.rows(parameter).shape)
                known = EncodedWeight(site.weight, quantizer, whole, self._encoded(site.weight, rows, quantizer))
        elif known.layout is None or (known.layout.name, known.quantizer) != (whole.name, quantizer):
            raise QsimError("it is multiplied along two axes, or under two quantizers")
        decoded = torch.empty_like(parameter).copy_(known.decode())
        part = decoded.as_strided(
            operand.shape, operand.stride(), operand.storage_offset() - parameter.storage_offset()
        )
        if not torch.equal(layout.rows(part), after):
            raise QsimError("no codes give its values: other scales gave them, or keep=False has overwritten them")
        return known

    def _encoded(self, name: str, rows: Tensor, quantizer: Any) -> Encoded:
        if name not in self.sites.weights.pinned:
            encoded: Encoded = quantizer.encode(rows)
            return encoded
        scales, of_scales = self.sites.weights.known(name)
        if scales is None and quantizer.granularity != "element":
            raise QsimError("it was quantized before, and its scales are not known")
        if scales is not None and len(scales.scale) not in (1, rows.shape[:-1].numel()):
            raise QsimError("a transform has quantized it in parts of its columns")
        found: Encoded = quantizer.encode(rows) if scales is None else quantizer.encode_at(rows, scales, of_scales)
        return found
