"""`qsim.materialize(simulation)` gives a plain model with the simulation's bits, which torch exports and compiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import make, tokens
from torch import Tensor, nn

import qsim_core as qsim

X = torch.randn(6, 5, 32, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))
STATIC = {"weights": "int4", "activations": "tensor(int8, symmetric=false, static=true)", "outputs": "cast(bf16)"}


class Scores(nn.Module):
    """A product of activations between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 32), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        scores: Tensor = self.last((y @ y.transpose(-1, -2)).softmax(-1))
        return scores


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 8)).eval()


def images() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


def experts(implementation: str) -> Any:
    """A language model of one layer with four experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    moe = {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = Qwen3MoeConfig(**sizes, **moe, experts_implementation=implementation)
    return Qwen3MoeForCausalLM(config).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def simulated(model: nn.Module, recipe: dict[str, Any], x: Tensor = X) -> qsim.Simulation:
    """A simulation whose sums are float32's own, in torch's order."""
    return qsim.simulate(model, {"arithmetic": "float32", **recipe}, calibration=[x])


def outputs(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(x)
    return found


@pytest.mark.parametrize(
    "recipe",
    [
        STATIC,
        {"weights": "channel(int4)", "activations": "token(int8)"},
        pytest.param(
            {"weights": "int8", "activations": "block(int8, 12, scale=bf16)", "outputs": "tensor(int8)"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"weights": "scaled(e2m1, 16, scale=scaled(e4m3))", "activations": "scaled(e2m1, 16, scale=scaled(e4m3))"},
            marks=pytest.mark.slow,
        ),
        {"activations": "token(e4m3, rule=ceil, scale=e8m0)"},
        {"weights": "int4", "overrides": {"2": {"weights": None}}},
        {"activations": lambda x: x.bfloat16().float()},
    ],
)
def test_it_has_the_bits_of_the_simulation_for_any_batch(recipe: dict[str, Any]) -> None:
    model = linear()
    simulation = simulated(model, recipe)

    plain = qsim.materialize(simulation)

    for x in (X, X[:1] * 3, X[:4, :2]):
        assert torch.equal(outputs(plain, x), outputs(model, x))


def test_convolutions_too() -> None:
    model, x = images(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    plain = qsim.materialize(simulated(model, {"weights": "int4", "activations": "int8"}, x))

    assert torch.equal(outputs(plain, x[:1]), outputs(model, x[:1]))


def test_export_gives_a_graph_of_torchs_operators() -> None:
    model = linear()
    plain = qsim.materialize(simulated(model, STATIC))

    program = torch.export.export(plain, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)

    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {name.partition(".")[0] for name in called} == {"aten"}
    assert {"aten.round.default", "aten.linear.default"} <= called
    assert torch.equal(outputs(program.module(), X[:2]), outputs(model, X[:2]))


def test_it_compiles_without_a_break() -> None:
    model = linear()
    plain = qsim.materialize(simulated(model, STATIC))

    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)

    assert torch.equal(outputs(compiled, X), outputs(model, X))
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_inductor_gives_the_same_bits() -> None:
    model = linear()
    plain = qsim.materialize(simulated(model, {"weights": "int4", "activations": "tensor(int8, static=true)"}))

    compiled = torch.compile(plain, fullgraph=True)

    assert torch.equal(outputs(compiled, X), outputs(model, X))
    torch.compiler.reset()


@pytest.mark.parametrize(
    "activations", ["int8", "tensor(int8, static=true)", pytest.param("block(int8, 4)", marks=pytest.mark.slow)]
)
def test_quantized_products_of_activations_make_the_model_one_graph(activations: str) -> None:
    model = Scores().eval()
    simulation = simulated(model, {"weights": "int4", "activations": activations})

    plain = qsim.materialize(simulation)

    for x in (X, X[:3] * 2):
        assert torch.equal(outputs(plain, x), outputs(model, x))
    program = torch.export.export(plain, (X,), strict=False)
    assert torch.equal(outputs(program.module(), X), outputs(model, X))
    assert outputs(simulation.restore(), X).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_of_a_language_model_in_any_batch_and_length(attention: str) -> None:
    model, ids = make("llama", attention), tokens()
    recipe = {"weights": "int4", "activations": "int8", "kv_cache": "token(int4)", "arithmetic": "float32"}
    simulation = qsim.simulate(model, qsim.Recipe.of(recipe), example={"input_ids": ids[:1]})

    plain = qsim.materialize(simulation)

    with torch.no_grad():
        for x in (ids, ids[:1, :9]):
            assert torch.equal(plain(input_ids=x, use_cache=False).logits, model(x, use_cache=False).logits)


@pytest.mark.parametrize("size", [pytest.param("whole", marks=pytest.mark.slow), "16"])
def test_rotations_of_inputs_are_in_it(size: str) -> None:
    pytest.importorskip("qsim_hadamard")
    model = linear()
    recipe = {"weights": "int4", "activations": "int8", "transforms": [f"hadamard(size={size})"]}

    plain = qsim.materialize(simulated(model, recipe))

    assert torch.equal(outputs(plain, X), outputs(model, X))


def test_operations_between_products_are_in_it() -> None:
    pytest.importorskip("qsim_nonlinear")
    model = linear()
    operations = {"gelu": {"input": "tensor(int8)", "implementation": "table(64)", "output": "bf16"}}

    plain = qsim.materialize(simulated(model, {"weights": "int4", "activations": "int8", "operations": operations}))

    for x in (X, X[:3] * 2):
        assert torch.equal(outputs(plain, x), outputs(model, x))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_a_stack_of_experts_is_a_parameter_with_quantized_values(implementation: str) -> None:
    model = experts(implementation)
    recipe = {"weights": "block(int4, 16)", "skip": "*self_attn*", "arithmetic": "float32"}
    simulation = qsim.simulate(model, recipe, example={"input_ids": IDS[:1, :2]})  # some experts see no token

    plain = qsim.materialize(simulation)

    assert torch.equal(logits(plain), logits(model))


@pytest.mark.slow
def test_quantized_inputs_of_experts_are_in_one_graph() -> None:
    model = experts("grouped_mm").bfloat16()
    recipe = {"weights": "int4", "activations": "int8", "arithmetic": "float32"}

    plain = qsim.materialize(qsim.simulate(model, recipe, example={"input_ids": IDS}))

    assert torch.equal(logits(plain), logits(model))


@pytest.mark.slow
def test_quantized_inputs_of_experts_in_float32_are_refused_as_torch_exports_no_such_product() -> None:
    simulation = qsim.simulate(experts("grouped_mm"), weights="int4", activations="int8", example={"input_ids": IDS})

    with pytest.raises(qsim.RecipeError, match=r"the model is not one graph: Expected inputs of BF16 type"):
        qsim.materialize(simulation)


def test_a_weight_that_was_overwritten_is_in_it() -> None:
    model = linear()
    simulation = qsim.simulate(model, weights="int4", activations="int8", arithmetic="float32", example=X, keep=False)

    assert torch.equal(outputs(qsim.materialize(simulation), X), outputs(model, X))


def test_factors_beside_a_weight_are_in_it() -> None:
    pytest.importorskip("qsim_branches")
    model = linear()

    plain = qsim.materialize(
        simulated(model, {"weights": "int4", "transforms": ["svdquant(rank=4)"]}, X.repeat(2, 1, 1))
    )

    assert torch.equal(outputs(plain, X[:3]), outputs(model, X[:3]))


def test_tied_layers_and_layers_that_are_used_twice() -> None:
    layer, other = nn.Linear(32, 32), nn.Linear(32, 32)
    other.weight = layer.weight
    model = nn.Sequential(layer, nn.ReLU(), layer, other)

    plain = qsim.materialize(simulated(model, {"weights": "int4", "activations": "int8"}))

    assert torch.equal(outputs(plain, X), outputs(model, X))


def test_weights_that_transforms_have_rounded_are_in_it() -> None:
    pytest.importorskip("qsim_gptq")
    model = linear()

    plain = qsim.materialize(
        simulated(model, {"weights": "int4", "transforms": ["gptq(act_order=true)"]}, X.repeat(4, 1, 1))
    )

    assert torch.equal(outputs(plain, X), outputs(model, X))


def test_the_simulation_stays_as_it_was() -> None:
    model = linear()
    exact, simulation = outputs(model, X), simulated(model, STATIC)
    before = outputs(model, X)

    plain = qsim.materialize(simulation)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()

    assert torch.equal(outputs(model, X), before)
    assert torch.equal(outputs(simulation.restore(), X), exact)


@pytest.mark.parametrize(
    ("make", "recipe", "message"),
    [
        (
            linear,
            {"activations": "int8(rounding=stochastic)"},
            "^0: its quantizers draw random numbers in each forward",
        ),
        (
            linear,
            {"weights": "int4", "operations": {"gelu": {"output": "bf16(rounding=stochastic)"}}},
            "^1:gelu.0: its quantizers draw",
        ),
        (
            linear,
            {"weights": "int4", "activations": "int8", "arithmetic": "int16(overflow=saturate)"},
            "is not an operator of torch",
        ),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(32, 4)),
            {"weights": "int4"},
            "is not its weight, which is computed of it in each forward",
        ),
    ],
)
def test_what_no_graph_holds_is_refused_by_name(make: Any, recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(qsim.RecipeError, match=message):
        qsim.materialize(simulated(make(), recipe))


def test_without_an_example_it_is_one_line() -> None:
    with pytest.raises(qsim.QsimError, match="^give simulate an example"):
        qsim.materialize(qsim.simulate(linear(), weights="int4"))
