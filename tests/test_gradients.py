"""The gradient of rounding: each choice against its derivation by hand and against its smooth surrogate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.quantizers.stacked import Stacked
from qsim_core.quantizers.static_scale import StaticScheme

SURROGATES: dict[str, Callable[[Tensor], Tensor]] = {
    "clipped": lambda units: units.clamp(-7.5, 7.5),
    "piecewise": lambda units: units.clamp(-7, 7),
    "identity": lambda units: units,
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def at(text: str, scale: float) -> StaticScheme:
    return StaticScheme(qsim.parse(text), torch.tensor([[scale]]), None, "here")


@pytest.mark.parametrize(
    ("gradient", "expected"),
    [
        ("clipped", [1.0, 2.0, 3.0, 4.0, 0.0, 0.0]),
        ("piecewise", [1.0, 2.0, 0.0, 0.0, 0.0, 0.0]),
        ("identity", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
    ],
)
def test_each_gradient_is_what_it_is_by_hand(gradient: str, expected: list[float]) -> None:
    x = torch.tensor([0.0, 14.0, -14.4, 15.0, 15.2, -18.0], requires_grad=True)

    at(f"tensor(int4, gradient={gradient})", 2.0)(x).backward(torch.arange(1.0, 7.0))

    assert torch.equal(x.grad, torch.tensor(expected))  # type: ignore[arg-type]


@pytest.mark.parametrize("gradient", SURROGATES)
def test_each_gradient_is_the_slope_of_its_surrogate(gradient: str) -> None:
    x, h, scale = (noise(500) * 3).double().requires_grad_(), 1e-6, 0.4
    surrogate = SURROGATES[gradient]

    at(f"tensor(int4, gradient={gradient})", scale)(x).sum().backward()

    up, down = (surrogate((x.detach() + step) / scale) * scale for step in (h, -h))
    assert 100 < int((x.detach().abs() > 7.5 * scale).sum()) < 400
    assert torch.allclose(x.grad, (up - down) / (2 * h), atol=1e-6)  # type: ignore[arg-type]


def test_the_gradient_changes_no_value_and_no_share_of_what_is_clipped() -> None:
    x = noise(8, 64)
    x[0, 0] = 1e4
    texts = [f"scaled(int4, 16, scale=e4m3, gradient={g})" for g in SURROGATES]

    schemes = [qsim.parse(text) for text in texts]

    assert all(torch.equal(scheme(x), schemes[0](x)) for scheme in schemes)
    assert all(torch.equal(scheme.passes(x), schemes[0].passes(x)) for scheme in schemes)
    assert not schemes[0].passes(x).all()


def test_the_largest_value_of_a_block_passes_where_its_scale_was_rounded_down_and_under_piecewise_does_not() -> None:
    x = torch.tensor([[1.0, 0.25]])
    assert qsim.parse("fp.bf16")(x[:, :1] / 7) < 1 / 7
    grads = []
    for gradient in ("clipped", "piecewise"):
        leaf = x.clone().requires_grad_()
        qsim.parse(f"abfp(int4, gradient={gradient})")(leaf).sum().backward()
        grads.append(leaf.grad)

    assert torch.equal(torch.cat(grads), torch.tensor([[1.0, 1.0], [0.0, 1.0]]))  # type: ignore[arg-type]


def test_the_text_says_a_gradient_only_where_it_is_not_the_usual_one() -> None:
    assert str(qsim.parse("abfp(int4, gradient=clipped)")) == "abfp(int4)"
    assert str(qsim.parse("channel(int4, gradient=identity)")) == "channel(int4, gradient=identity)"


def test_experts_take_the_gradient_of_their_scheme() -> None:
    x = torch.tensor([[[1.0, 1.0, 100.0]], [[1.0, 1.0, 1.0]]], requires_grad=True)

    grads = []
    for gradient in ("clipped", "identity"):
        experts = Stacked(each=qsim.parse(f"tensor(int4, range=percentile(60), gradient={gradient})"))
        grads += torch.autograd.grad(experts(x).sum(), x)

    assert torch.equal(grads[0], torch.tensor([[[1.0, 1.0, 0.0]], [[1.0, 1.0, 1.0]]]))
    assert torch.equal(grads[1], torch.ones_like(x))


def test_block_scales_are_recomputed_in_each_step_of_training() -> None:
    linear, x = nn.Linear(32, 4, bias=False), noise(3, 32)
    abfp = qsim.parse("abfp(int4, n=8)")
    qsim.simulate(linear, weights=abfp, activations=abfp)
    optimizer = torch.optim.SGD(linear.parameters(), lr=10.0)

    linear(x).square().sum().backward()
    optimizer.step()

    assert torch.equal(linear(x), F.linear(abfp(x), abfp(linear.weight)))
