"""torch.compile leaves quantizers and simulated models as they are written, and says so in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import qsim_core as qsim

RECIPE = {"weights": "int3", "activations": "block(int4, 64)", "outputs": "bf16"}
INPUT = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
graphs: list[Any] = []


def backend(graph: Any, example: Any) -> Any:
    """A compiler that counts its graphs."""
    graphs.append(graph)
    return graph


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    graphs.clear()
    yield
    torch.compiler.reset()


def made() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


def leaf(model: Any) -> nn.Module:
    model[2] = torch.compile(model[2], backend=backend)
    return model  # type: ignore[no-any-return]


def in_place(model: Any) -> nn.Module:
    model[2].compile(backend=backend)
    return model  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:torch.compile leaves")
@pytest.mark.parametrize("compiled", [lambda m: torch.compile(m, backend=backend), leaf, in_place])
@pytest.mark.parametrize("before", [True, False])
def test_a_compiled_simulated_model_gives_the_bits_of_eager(compiled: Callable[[Any], Any], before: bool) -> None:
    with torch.no_grad(), qsim.simulate(plain := made(), RECIPE, example=INPUT):
        expected = plain(INPUT)
    model = compiled(made()) if before else made()
    qsim.simulate(model, RECIPE, example=INPUT)

    with torch.no_grad():
        found = (model if before else compiled(model))(INPUT)

    assert torch.equal(found, expected)
    assert graphs == []


class Calls(nn.Module):
    """Computes its first layer by a function."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.function = nn.Linear(96, 32), nn.Linear(32, 4), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(self.function(x, self.first.weight, self.first.bias))
        return result


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_function_runs_uncompiled_in_a_simulated_model(fullgraph: bool) -> None:
    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, weight, bias).relu()

    with torch.no_grad(), qsim.simulate(plain := Calls(product).eval(), RECIPE, example=INPUT):
        expected = plain(INPUT)
    model = Calls(torch.compile(product, backend=backend, fullgraph=fullgraph)).eval()
    simulation = qsim.simulate(model, RECIPE, example=INPUT)

    with torch.no_grad():
        assert torch.equal(model(INPUT), expected)
    assert simulation.audit().covered == 2
    assert graphs == []
    with torch.no_grad():
        simulation.restore()(INPUT)
    assert len(graphs) == 1


def test_one_line_says_so_once() -> None:
    model = made()
    qsim.simulate(model, RECIPE, example=INPUT)
    compiled = torch.compile(model, backend=backend)

    with pytest.warns(UserWarning) as lines:
        compiled(INPUT)
        compiled(INPUT)

    assert [str(line.message) for line in lines] == [
        "torch.compile leaves a simulated model as it is: it runs uncompiled"
    ]


def test_a_refusal_says_what_to_leave_out() -> None:
    model = made()
    qsim.simulate(model, RECIPE, example=INPUT)

    with pytest.raises(RuntimeError, match="qsim computes to the bit, without a compiler; leave fullgraph=True out"):
        torch.compile(model, backend=backend, fullgraph=True)(INPUT)


@pytest.mark.filterwarnings("ignore:torch.compile leaves")
def test_after_it_other_code_is_compiled_as_before() -> None:
    model = made()
    qsim.simulate(model, RECIPE, example=INPUT)
    torch.compile(model, backend=backend)(INPUT)

    torch.compile(lambda x: x * 2, backend=backend)(INPUT)

    assert len(graphs) == 1


def test_a_restored_model_compiles() -> None:
    model = made()
    qsim.simulate(model, RECIPE, example=INPUT).restore()

    torch.compile(model, backend=backend)(INPUT)

    assert len(graphs) == 1


@pytest.mark.parametrize(
    "text", ["cast(bf16)", "bf16", "block(int8, 32, scale=bf16)", "block(int8, 64)", "token(int8)", "nvfp4"]
)
def test_a_compiled_quantizer_gives_its_own_bits(text: str) -> None:
    quantizer = qsim.parse(text)

    found = torch.compile(lambda x: quantizer.quantize(x), backend=backend)(INPUT)

    assert torch.equal(found, quantizer(INPUT))
    assert graphs == []
