"""The audit measures each tensor in float64, some rows at a time, and out of sight of dispatch modes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.matmuls.dispatch import OperatorWatcher, operator_name
from qsim_core.simulation.audit import PART, SiteAudit

X = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(1))


def audited(recipe: dict[str, Any], x: Tensor = X) -> SiteAudit:
    model = nn.Sequential(nn.Linear(96, 4)).eval()
    return qsim.simulate(model, recipe, example=x).audit().sites[0]


@pytest.mark.parametrize("rows_at_a_time", [1, 4, 1000])
@pytest.mark.parametrize("activations", ["token(int4)", "tensor(int4)", "channel(int3)", "abfp(int4, n=64)"])
def test_sums_are_those_of_the_whole_tensor(
    activations: str, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PART, "cpu", rows_at_a_time * 96)
    quantizer = qsim.parse(activations)
    y = quantizer.quantize(X)

    measured = audited({"activations": activations}).measured["input"]

    error = (X.double() - y).square().sum()
    assert measured.sqnr_db == pytest.approx(10 * math.log10(X.double().square().sum() / error), rel=1e-12)
    assert measured.flushed == float(((X != 0) & (y == 0)).float().mean(dtype=torch.float64))
    assert measured.clipped == float((~quantizer.passes(X)).float().mean(dtype=torch.float64))


def test_a_mode_sees_the_model_and_not_the_sums() -> None:
    class Seen(OperatorWatcher):
        names: set[str] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.add(operator_name(func))
            return func(*args, **(kwargs or {}))

    with Seen() as seen:
        audited({"weights": "int4", "activations": "token(int8)"})

    assert "addmm" in seen.names
    assert not seen.names & {"dot", "count_nonzero"}


def test_an_input_that_layers_share_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(96, 4), nn.Linear(96, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) + self.k(x)

    quantizer = qsim.parse("token(int4)")
    looks, passes = list[Tensor](), type(quantizer).passes
    monkeypatch.setattr(type(quantizer), "passes", lambda self, x: looks.append(x) or passes(self, x))

    q, k = qsim.simulate(Both().eval(), weights="int4", activations=quantizer, example=X).audit().sites

    assert q.measured["input"] == k.measured["input"]
    assert len(looks) == 1
