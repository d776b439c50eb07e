"""Models that are hard to follow: what is right is found, the rest is refused with what was seen, nothing ends a trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from qsim_structure import Structure, permute_rows, permute_scores, trace
from torch import Tensor, nn
from torch.nn import functional as F


class Parts(nn.Module):
    """A norm and some linears of 16 channels, put together by a function."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.norm, self.mlp, self.joined = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(40, 16)
        self.q, self.gate, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.k, self.v = nn.Linear(16, 8), nn.Linear(16, 8)
        self.register_buffer("calls", torch.zeros(()))
        self.put_together = forward

    def forward(self, x: Tensor) -> Any:
        return self.put_together(self, x)


X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 4)).transpose(1, 2)


def structure_of(forward: Callable[[Any, Tensor], Any]) -> tuple[Parts, Structure]:
    torch.manual_seed(0)
    model = Parts(forward).eval()
    return model, trace(model, lambda: model(X))


def why(found: Structure, name: str) -> str:
    return "; ".join(reason for refused in found.refused if refused.name == name for reason in refused.reasons)


def test_values_that_heads_share_are_reordered_with_the_gates_that_they_meet() -> None:
    def gated(m: Any, x: Tensor) -> Tensor:
        h = m.norm(x)
        k, v = (heads(t).repeat_interleave(2, 1) for t in (m.k(h), m.v(h)))
        y = torch.softmax(heads(m.q(h)) @ k.mT, -1) @ v
        result: Tensor = m.out(y.transpose(1, 2).flatten(2) * torch.sigmoid(m.gate(h)))
        return result

    model, found = structure_of(gated)
    expected, gates = model(X), model.gate.weight.clone()
    (attention,) = found.attention
    permute_rows(model, attention.value, torch.tensor([1, 0, 3, 2, 7, 6, 5, 4]))
    permute_scores(model, attention, [torch.tensor([3, 2, 1, 0])] * 2)

    assert [(group.norm, group.weights[-1]) for group in found.groups] == [("norm", "gate.weight")]
    assert found.why_ordered(":pv") == ""
    assert torch.equal(model.gate.weight, gates[[1, 0, 3, 2, 5, 4, 7, 6, 11, 10, 9, 8, 15, 14, 13, 12]])
    torch.testing.assert_close(model(X), expected)


def test_values_beside_others_in_one_projection_are_no_partners_of_these() -> None:
    def beside(m: Any, x: Tensor) -> Any:
        h = m.norm(x)
        y = F.scaled_dot_product_attention(heads(m.q(h)), heads(m.k(h)), heads(m.v(h)), enable_gqa=True)
        return m.joined(torch.cat([y.transpose(1, 2).flatten(2), F.gelu(m.mlp(h))], -1))

    _, found = structure_of(beside)

    pairs = {pair.producer: (pair.weights, pair.scales, pair.partners) for pair in found.pairs}
    assert pairs == {
        "v.weight": (["joined.weight"], True, ()),
        "mlp.weight": (["joined.weight"], False, ()),
    }
    assert found.ordered == []


def test_windows_that_overlap_in_memory_are_followed() -> None:
    _, found = structure_of(lambda m, x: m.out(m.q(m.norm(x)).as_strided((2, 2, 4, 16), (96, 32, 16, 1))))

    assert [(pair.producer, pair.weights) for pair in found.pairs] == [("q.weight", ["out.weight"])]


def test_views_that_are_made_in_place_are_followed() -> None:
    def in_place(m: Any, x: Tensor) -> Any:
        y = m.q(m.norm(x))
        y.unsqueeze_(1).transpose_(1, 2)
        return m.out(torch.cat([y, y * 2], 2))

    _, found = structure_of(in_place)

    assert [(pair.producer, pair.scales) for pair in found.pairs] == [("q.weight", True)]


def test_a_norm_of_heads_is_scaled_and_keeps_its_order() -> None:
    class HeadNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(16) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, (4,)).flatten(-2) * self.weight

    model = nn.Sequential(nn.Linear(16, 16), nn.Unflatten(-1, (4, 4)), HeadNorm(), nn.Linear(16, 3)).eval()

    found = trace(model, lambda: model(X))

    assert [(group.norm, group.weights) for group in found.groups] == [("2", ["3.weight"])]
    assert found.why_ordered("2") == "the norm's input has 4 channels on its last axis, not 16"


@pytest.mark.parametrize(
    ("operator", "reason"),
    [
        (lambda y: y.cumsum(1), "enters cumsum in the model"),
        (lambda y: y.topk(16).values, "enters topk in the model"),
        (lambda y: (y > 1).float(), "enters gt in the model"),
        (lambda y: torch.fft.fft(y).real, "enters _fft_r2c in the model"),
        (
            lambda y: y[:, 4:].as_strided((2, 3, 16), (96, 16, 1), 0),
            "cannot be followed through as_strided in the model: it reads memory outside of its tensor",
        ),
    ],
)
def test_an_operator_that_cannot_be_followed_is_named(operator: Callable[[Tensor], Tensor], reason: str) -> None:
    def also(m: Any, x: Tensor) -> Any:
        y = m.q(m.norm(x))
        return m.out(y), operator(y)

    _, found = structure_of(also)

    assert [group.norm for group in found.groups] == ["norm"]
    assert reason in why(found, "q.weight").split("; ")


@dataclass
class Output:
    hidden: Tensor


@pytest.mark.parametrize("wrap", [lambda h: Output(h), lambda h: {"a": [(h,)]}, lambda h: {h}])
def test_an_output_is_found_in_whatever_holds_it(wrap: Callable[[Tensor], Any]) -> None:
    def returned(m: Any, x: Tensor) -> Any:
        hidden = m.norm(x)
        return m.out(hidden), wrap(hidden)

    _, found = structure_of(returned)

    assert why(found, "norm") == "is an output of the model"


def test_a_norm_that_returns_more_than_its_output_is_not_followed() -> None:
    class AddNorm(nn.LayerNorm):
        def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
            return super().forward(x), x

    def added(m: Any, x: Tensor) -> Any:
        y = m.q(x)
        return m.mlp(m.norm(y)[0]), m.out(y)

    model = Parts(added)
    model.norm = AddNorm(16)

    found = trace(model.eval(), lambda: model(X))

    assert why(found, "q.weight") == "feeds the norm norm"


def test_a_weight_that_is_looked_up_too_is_tied() -> None:
    _, found = structure_of(lambda m, x: m.out(m.norm(x)) @ m.out.weight[torch.arange(16)])

    assert why(found, "norm") == "out.weight is also read by index: it is tied"


def test_a_partner_that_is_an_output_too_keeps_its_order() -> None:
    def returned(m: Any, x: Tensor) -> Any:
        gate, up = m.gate(x), m.q(x)
        return m.out(gate * up), gate

    _, found = structure_of(returned)

    assert found.why_ordered("q.weight") == "is an output of the model"


def test_a_model_that_counts_its_calls_is_left_as_it_was() -> None:
    def counting(m: Any, x: Tensor) -> Any:
        m.calls += 1
        return m.out(m.norm(x) * m.calls)

    model, found = structure_of(counting)

    assert [group.norm for group in found.groups] == ["norm"]
    assert float(model.calls) == 0
