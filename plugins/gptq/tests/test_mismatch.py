"""GPTAQ and Qronos against their formulas, on layers whose inputs have drifted from those of the original model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.testing import TransformSuite
from qsim_core.transforms.report import LayerReport

METHODS = ["gptaq", "qronos"]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layers(*weights: Tensor) -> nn.Sequential:
    made = nn.Sequential(*(nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype) for w in weights))
    with torch.no_grad():
        for layer, weight in zip(made, weights, strict=True):
            layer.weight.copy_(weight)
    return made


def rounded(model: nn.Module, x: Tensor, weights: str, text: str, **more: Any) -> list[LayerReport]:
    recipe = {"weights": weights, "transforms": [text], **more}
    return qsim.simulate(model, recipe, calibration=[(batch,) for batch in x.split(100)]).reports


def on_the_grid(quantizer: Any, weight: Tensor) -> Any:
    """Round column j of values as the grid of `weight` says."""
    scales = quantizer.scale_map(weight)[0] if isinstance(quantizer, qsim.Scheme) else None
    if scales is None:
        return lambda column, j: quantizer.quantize(column)
    return lambda column, j: quantizer.round_at(column, scales[:, j], None)


def gptaq(weight: Tensor, x: Tensor, seen: Tensor, text: str, act_order: bool, alpha: float) -> Tensor:
    """Algorithm 1 of arXiv 2504.02692, one column after another: each step updates all later columns."""
    w, h, drift = weight.clone(), seen.T @ seen, (x - seen).T @ seen
    grid = on_the_grid(qsim.parse(text), weight)
    order = h.diagonal().argsort(descending=True) if act_order else torch.arange(len(h))
    w, h, drift = w[:, order], h[order][:, order], drift[order][:, order]
    h += torch.eye(len(h)) * 0.01 * h.diagonal().mean()
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    pull = alpha * (drift @ upper.T).triu(1) @ upper
    q = torch.zeros_like(w)
    for j in range(len(h)):
        now = w[:, j].clone()
        q[:, j] = grid(now, int(order[j]))
        w[:, j:] -= torch.outer((now - q[:, j]) / upper[j, j], upper[j, j:]) - torch.outer(now, pull[j, j:])
    return q[:, order.argsort()]


def qronos(weight: Tensor, x: Tensor, seen: Tensor, text: str) -> Tensor:
    """The definition in arXiv 2505.11695: round where a column is best with the others as they are, refit the others."""
    w, target = weight.clone(), x @ weight.T
    grid = on_the_grid(qsim.parse(text), weight)
    for j in range(w.shape[1]):
        others = [k for k in range(w.shape[1]) if k != j]
        left = target - seen[:, others] @ w[:, others].T
        w[:, j] = grid(seen[:, j] @ left / seen[:, j].square().sum(), j)
        left = target - seen[:, : j + 1] @ w[:, : j + 1].T
        if j + 1 < w.shape[1]:
            w[:, j + 1 :] = torch.linalg.lstsq(seen[:, j + 1 :], left).solution.T
    return w


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("weights", ["channel(int4)", "cast(e2m1)", "block(int4, [8, 8])"])
def test_gptaq_is_the_algorithm_written_out(weights: str, act_order: bool) -> None:
    first, second, z = noise(24, 16), noise(20, 24, seed=1), noise(300, 16, seed=2)
    model = layers(first, second)

    rounded(model, z, weights, f"gptaq(act_order={str(act_order).lower()}, alpha=0.7)")

    seen = z @ model.get_parameter("0.weight").T
    expected = gptaq(second, z @ first.T, seen, weights, act_order, 0.7)
    assert torch.equal(model.get_parameter("1.weight"), expected)


@pytest.mark.parametrize("weights", ["channel(int4)", "cast(e2m1)", "block(int4, [8, 8])"])
def test_qronos_is_its_definition(weights: str) -> None:
    first, second, z = noise(24, 32), noise(20, 24, seed=1), noise(300, 32, seed=2)
    model = layers(first, second)

    rounded(model, z, weights, "qronos(percdamp=0)")

    seen = z @ model.get_parameter("0.weight").T
    assert torch.allclose(model.get_parameter("1.weight"), qronos(second, z @ first.T, seen, weights))


def test_qronos_damps_towards_the_weights() -> None:
    first, second, z = noise(24, 16), noise(20, 24, seed=1), noise(300, 16, seed=2)
    model = layers(first, second)

    rounded(model, z, "cast(e2m1)", "qronos(percdamp=0.1)")

    x, seen = z @ first.T, z @ model.get_parameter("0.weight").T
    share = (0.1 * torch.linalg.matrix_norm(seen.T @ seen, 2)).sqrt()  # as many more rows that have not drifted
    more = share * torch.eye(24, dtype=torch.float64)
    expected = qronos(second, torch.cat([x, more]), torch.cat([seen, more]), "cast(e2m1)")
    assert torch.equal(model.get_parameter("1.weight")[:, 1:], expected[:, 1:])


@pytest.mark.parametrize(
    ("method", "second"), [("gptq", [1.0, 0.0]), ("gptaq(0, alpha=1)", [1, 1]), ("qronos(0)", [1, 1])]
)
def test_by_hand(method: str, second: list[float]) -> None:
    """The first layer rounds 0.5 to 0: of the rows (1, 0) and (0.5, 1) it makes (1, 0) and (0, 1).

    So H = I, C = (0, 0.5; 0, 0). The second column starts from 0.2 + 0.5 * 1, and the first from 1.
    """
    model = layers(torch.tensor([[1.0, 0.5], [0.0, 1.0]]), torch.tensor([[1.0, 0.2]]))

    rounded(model, torch.eye(2), "cast(int8)", method)

    assert model.get_parameter("1.weight").tolist() == [second]


@pytest.mark.parametrize("method", METHODS)
def test_without_drift_it_is_gptq(method: str) -> None:
    weight, z = noise(24, 40), noise(200, 40, seed=1)
    one, other = layers(weight), layers(weight)

    rounded(one, z, "abfp(int4, n=16)", f"{method}(0.01)")
    rounded(other, z, "abfp(int4, n=16)", "gptq(0.01)" if method == "gptaq" else f"gptq({_of_mean(z):.17g})")

    assert torch.allclose(one.get_parameter("0.weight"), other.get_parameter("0.weight"), rtol=1e-9)


def _of_mean(z: Tensor) -> float:
    """A hundredth of the largest eigenvalue, as a share of the mean diagonal."""
    h = z.T @ z
    return float(0.01 * torch.linalg.matrix_norm(h, 2) / h.diagonal().mean())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weights", ["channel(int4)", "mx(e2m1, 16)", "scaled(e2m1, 16, scale=scaled(e4m3, tensor))"])
def test_it_brings_the_outputs_nearer_to_those_of_the_original(weights: str, method: str) -> None:
    first, second, z = noise(32, 16), noise(20, 32, seed=1), noise(400, 16, seed=2)
    plain, model = layers(first, second), layers(first, second)

    rounded(plain, z, weights, "gptq")
    reports = rounded(model, z, weights, method)

    exact = z @ first.T @ second.T
    error = float((model(z) - exact).norm().detach() / exact.norm())
    assert error < float((plain(z) - exact).norm().detach() / exact.norm())
    assert reports[1].after == pytest.approx(error)


@pytest.mark.parametrize("method", METHODS)
def test_errors_of_rounded_inputs_are_compensated_too(method: str) -> None:
    weight, z = noise(20, 16), noise(400, 16, seed=2) @ noise(16, 16, seed=3)
    blind, model = layers(weight), layers(weight)

    rounded(blind, z, "int8", f"{method}(activations=false)", activations="token(int3)")
    rounded(model, z, "int8", method, activations="token(int3)")

    exact = z @ weight.T
    assert (model(z) - exact).norm() < (blind(z) - exact).norm()


def test_gptq_can_see_rounded_inputs() -> None:
    weight, z = noise(20, 16), noise(400, 16, seed=2) @ noise(16, 16, seed=3)
    model = layers(weight)

    reports = rounded(model, z, "int4", "gptq(activations=true)", activations="token(int3)")

    x = qsim.parse("token(int3)")(z)
    exact, found = x @ weight.T, x @ model.get_parameter("0.weight").detach().T
    assert reports[0].after == pytest.approx(float((found - exact).norm() / exact.norm()))


@pytest.mark.parametrize("method", METHODS)
def test_a_static_scale_of_an_input_is_refused(method: str) -> None:
    with pytest.raises(qsim.RecipeError, match=r"before the static scale of 0 is known; set activations=false"):
        rounded(layers(noise(4, 4)), noise(8, 4), "int4", method, activations="tensor(int8, static=true)")


@pytest.mark.parametrize("order", [["gptq", "gptq"], ["gptq", "qronos"], ["qronos", "gptaq"], ["imatrix", "gptq"]])
def test_a_second_rounding_is_refused(order: list[str]) -> None:
    pytest.importorskip("qsim_imatrix")
    recipe = {"weights": "int3", "transforms": order}

    message = rf"^{order[1]}\(.*\) changed nothing in this model: left alone: it lies on its grid already$"
    with pytest.raises(qsim.RecipeError, match=message):
        qsim.simulate(layers(noise(24, 16), noise(20, 24, seed=1)), recipe, calibration=[(noise(64, 16),)])


@pytest.mark.parametrize("method", ["gptq", "signround(1)", "imatrix"])
def test_a_recipe_that_quantizes_no_weight_is_named(method: str) -> None:
    for plugin in ("imatrix", "rounding"):
        pytest.importorskip(f"qsim_{plugin}")
    recipe = {"activations": "int8", "transforms": [method]}

    with pytest.raises(qsim.RecipeError, match="it found nothing to do; the recipe quantizes no weight$"):
        qsim.simulate(layers(noise(24, 16)), recipe, calibration=[(noise(64, 16),)])


class Routed(nn.Module):
    """Two layers of which the second gets the rows that the first makes positive."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        found: Tensor = self.second(x[x[:, 0] > 0])
        return found


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_gets_other_rows_is_rounded_as_gptq_does(method: str) -> None:
    model = nn.Sequential(Routed())
    with torch.no_grad():
        model.get_parameter("0.first.weight").copy_(torch.eye(4) + 0.3 * noise(4, 4, seed=1))

    reports = rounded(model, noise(100, 4).float(), "cast(int4)", method)

    assert [r.note for r in reports if r.layer == "0.second"] == [
        "inputs of the original model unknown: rounded as gptq does"
    ]


class TestGptaq(TransformSuite):
    text = ("gptaq", "gptaq(act_order=true, true_sequential=false)")


class TestQronos(TransformSuite):
    text = ("qronos", "qronos(act_order=true, true_sequential=false)")
