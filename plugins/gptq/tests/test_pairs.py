"""Calls of a block are paired with those of the block as it was."""

from __future__ import annotations

import torch
from qsim_gptq.pairs import observe_beside
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.sites.site import Site


class Routed(nn.Module):
    """A block that sends a row to one of two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 2, bias=False)
        self.experts = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])

    def forward(self, x: Tensor) -> Tensor:
        to = self.gate(x).argmax(-1)
        parts = [expert(x[to == place]) for place, expert in enumerate(self.experts)]
        return torch.cat(parts)


class Paired(qsim.Transform):
    """Turns the gate of each block around, and notes which of its calls have a partner in the block as it was."""

    name = "paired"

    def apply(self, model: nn.Module, context: qsim.Context) -> None:
        for block in context.blocks(originals=True):
            gate = block.module.get_parameter("gate.weight")
            gate.copy_(gate.flip(0))

            def note(site: Site, call: object, original: object) -> None:
                context.report(site.name, note="alone" if original is None else "paired")

            observe_beside(block, note)


def test_rows_that_are_routed_otherwise_are_not_paired() -> None:
    model = nn.Sequential(Routed())
    with torch.no_grad():
        model.get_parameter("0.gate.weight").copy_(torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]))
    x = torch.tensor([[1.0, 2, 3, 4], [1, 0, 0, 0], [-1, 2, 3, 4]])

    reports = qsim.simulate(model, weights="int8", transforms=[Paired()], calibration=[(x,)]).reports

    assert {report.layer: report.note for report in reports} == {
        "0.gate": "paired",
        "0.experts.0": "alone",
        "0.experts.1": "alone",
    }
