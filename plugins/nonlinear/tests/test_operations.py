"""Operations between the products: softmax, norms, activation functions, sums, rotary and other embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from qsim_nonlinear.approximation import Approximation
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.testing.component import noise


class Halves(Approximation):
    """Functions of one number in float16."""

    name = "halves"

    def approximate(self, kind: str, exact: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return exact(x).half().to(x.dtype)


class EightBits(qsim.Operation):
    """A softmax whose shares are multiples of 1/255."""

    name = "eight_bits"
    computes = frozenset({"softmax"})

    def compute(self, call: qsim.OperationCall) -> Tensor:
        return (call.of(call.operands) * 255).round() / 255


class Block(nn.Module):
    """Attention, a residual addition, a norm and an activation function."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.norm, self.up, self.act = nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(inplace)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.scaled_dot_product_attention(x, x, x)
        x += self.act(self.up(self.norm(x)))
        return x


class Calls(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function, self.inner = function, nn.Identity()

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(*tensors)


def run(model: nn.Module, x: Tensor, operations: dict[str, Any], **recipe: Any) -> tuple[Tensor, qsim.Audit]:
    with torch.no_grad(), qsim.simulate(model, {"operations": operations, **recipe}, example=x.clone()) as simulation:
        return model(x.clone()), simulation.audit(x.clone())


X = noise(2, 5, 8)


def test_all_operations_of_a_model_are_listed_once_one_is_named() -> None:
    _, audit = run(Block(), X, {"softmax": EightBits()})

    assert [(found.site, found.kinds, found.calls) for found in audit.operations] == [
        (":softmax.0", ["softmax"], 1),
        (":add.0", ["add"], 1),
        ("norm:layer_norm.0", ["layer_norm", "norm"], 1),
        ("act:relu.0", ["relu", "activation"], 1),
        (":add.1", ["add"], 1),
    ]


def test_nothing_is_listed_and_no_bit_is_changed_unless_one_is_named() -> None:
    block = Block()

    simulated, audit = run(block, X, {}, weights=None)

    assert audit.operations == []
    assert torch.equal(simulated, block(X.clone()))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("pattern", ["relu", "activation", "act:relu.0", "act:*"])
def test_input_and_output_are_quantized_at_what_a_pattern_names(pattern: str, inplace: bool) -> None:
    torch.manual_seed(0)
    block = Block(inplace)
    grid = qsim.parse("token(int4)").quantize

    simulated, _ = run(block, X, {pattern: {"input": "int4", "output": "bf16"}})

    x = X + F.scaled_dot_product_attention(X, X, X)
    expected = x + F.relu(grid(block.up(block.norm(x)))).bfloat16().float()
    assert torch.allclose(simulated, expected, atol=1e-6)


def test_the_last_pattern_wins_and_keeps_what_it_does_not_name() -> None:
    _, audit = run(Block(), X, {"*:*": {"output": "bf16"}, "add": {"output": "e4m3"}, "relu": {"input": "int8"}})

    assert {found.site: (found.input, found.output) for found in audit.operations} == {
        ":softmax.0": (None, "cast(bf16)"),
        ":add.0": (None, "cast(e4m3)"),
        "norm:layer_norm.0": (None, "cast(bf16)"),
        "act:relu.0": ("token(int8)", "cast(bf16)"),
        ":add.1": (None, "cast(e4m3)"),
    }


def test_a_softmax_of_attention_is_computed_by_its_implementation() -> None:
    simulated, audit = run(Calls(lambda x: F.scaled_dot_product_attention(x, x, x)), X, {"softmax": EightBits()})

    shares = torch.softmax(X @ X.mT / 8**0.5, -1)
    assert torch.allclose(simulated, (shares * 255).round() / 255 @ X, atol=1e-6)
    assert audit.operations[0].measured["implementation"].sqnr_db == pytest.approx(45, abs=10)


@pytest.mark.parametrize(
    ("function", "part"),
    [
        (lambda x: F.softmax(x, -1), "exp"),
        (lambda x: x.softmax(1), "reciprocal"),
        (lambda x: torch.log_softmax(x, -1, dtype=torch.float64), "log"),
        (lambda x: F.layer_norm(x, (5, 8), torch.ones(5, 8), torch.ones(5, 8), 1e-3), "rsqrt"),
        (lambda x: F.rms_norm(x, (8,)), "rsqrt"),
        (lambda x: F.group_norm(x.unsqueeze(-1), 5, torch.full((5,), 2.0)), "rsqrt"),
    ],
)
def test_a_function_inside_an_operation_is_replaced_by_its_own_name(
    function: Callable[[Tensor], Tensor], part: str
) -> None:
    """The written-out form is torch's result, but for the function that is computed in float16."""
    simulated, audit = run(Calls(function), X, {part: Halves()})

    error = (simulated - function(X)).abs().max()
    assert simulated.dtype == function(X).dtype
    assert 1e-6 < error < 3e-3
    assert [found.site for found in audit.operations if found.implementation] == [f":{part}.0"]


def test_a_plain_call_of_such_a_function_is_replaced_too() -> None:
    simulated, _ = run(Calls(lambda x: x.exp() + torch.ones(())), X, {"exp": Halves()})

    assert torch.equal(simulated, X.exp().half().float() + 1)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


ANGLES = torch.arange(5.0).unsqueeze(-1) * torch.tensor([1.0, 0.1, 0.01, 0.001]).repeat(2)


def test_a_rotary_embedding_is_one_operation() -> None:
    model = Calls(lambda x: (x * ANGLES.cos()) + (rotate_half(x) * ANGLES.sin()))
    grid = qsim.parse("token(int8)").quantize

    simulated, audit = run(model, X, {"rotary": {"input": "int8", "output": "bf16"}})

    rotated = grid(X) * grid(ANGLES.cos()) + grid(rotate_half(X)) * grid(ANGLES.sin())
    assert torch.equal(simulated, rotated.bfloat16().float())
    assert [found.site for found in audit.operations][-1] == ":rotary.0"


@pytest.mark.parametrize(
    ("function", "sums"),
    [
        (lambda x: x + torch.ones(8), 0),
        (lambda x: x + 1, 0),
        (lambda x: torch.softmax(x @ x.mT + torch.zeros(2, 5, 5), -1), 0),
        (lambda x: x * (x > 0).float() + x * ANGLES, 0),
        (lambda x: x + x.sin(), 1),
    ],
    ids=["a bias", "a number", "a mask", "two products that turn nothing", "two activations"],
)
def test_sums_that_are_no_rotary_embedding(function: Callable[[Tensor], Tensor], sums: int) -> None:
    _, audit = run(Calls(lambda x: function(x).relu()), X, {"relu": {"output": "bf16"}})

    assert [found.kinds for found in audit.operations if found.kinds[0] in ("add", "rotary")] == [["add"]] * sums


def test_the_gradient_is_that_of_torchs_own_operation() -> None:
    model, x = Calls(lambda x: F.gelu(x)), X.clone().requires_grad_()
    with qsim.simulate(model, {"operations": {"gelu": Halves()}}):
        model(x).sum().backward()

    expected = X.clone().requires_grad_()
    F.gelu(expected).sum().backward()
    assert torch.equal(x.grad, expected.grad)


def test_an_embedding_has_an_output_alone() -> None:
    model = nn.Sequential(nn.Embedding(10, 8))
    ids = torch.arange(10)

    with qsim.simulate(model, {"operations": {"embedding": {"output": "token(int4)"}}}, example=ids):
        found = model(ids)
    assert torch.equal(found.detach(), qsim.parse("token(int4)").quantize(model[0].weight))

    with pytest.raises(qsim.RecipeError, match=r"0:embedding\.0: embedding reads no activation .* say output"):
        qsim.simulate(model, {"operations": {"embedding": {"input": "int8"}}}, example=ids)


class Wrong(qsim.Operation):
    """A result of another shape."""

    name = "wrong"

    def compute(self, call: qsim.OperationCall) -> Tensor:
        return call.input[..., :1]


@pytest.mark.parametrize(
    ("operations", "message"),
    [
        ({"sofmax": EightBits()}, "operations: 'sofmax' matches no operation; did you mean 'softmax'?"),
        ({"tanh": EightBits()}, "operations: 'tanh' matches no operation"),
        ({"relu": EightBits()}, "act:relu.0: eight_bits does not compute relu: eight_bits computes softmax"),
        ({"add": Halves()}, ":add.0: halves does not compute add: halves approximates functions of one number"),
        ({"relu": "token(int8)"}, "'token' is a quantizer, not an operation"),
        ({"relu": {"inptu": "int8"}}, "the operation 'relu' has no key 'inptu'; did you mean 'input'?"),
        ({"relu": {"input": "tensor(int8, static=true)"}}, "needs static scales, which operations do not have"),
    ],
)
def test_bad_input_is_one_line(operations: dict[str, Any], message: str) -> None:
    with pytest.raises(qsim.QsimError) as caught:
        qsim.simulate(Block(), {"operations": operations}, example=X.clone())

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_result_of_another_shape_is_an_error() -> None:
    block = Block()
    qsim.simulate(block, {"operations": {"softmax": Wrong()}}, example=X.clone())

    with pytest.raises(qsim.RecipeError, match=r":softmax\.0: wrong gave shape \(2, 5, 1\) for \(2, 5, 5\)"):
        block(X.clone())


def test_a_recipe_with_operations_is_written_and_read() -> None:
    host = qsim.Host()
    host.register(EightBits)
    recipe = qsim.Recipe.of({"operations": {"softmax": "eight_bits", "add": {"output": "bf16"}}}, host)

    assert qsim.Recipe.from_yaml(recipe.to_yaml(), host) == recipe
    assert recipe.record()["operations"] == {
        "softmax": {"implementation": "eight_bits"},
        "add": {"output": "cast(bf16)"},
    }


def cosines_and_sines(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> nn.Module:
    return Calls(lambda x: function(x.clone(), ANGLES.cos(), ANGLES.sin()).relu())


@pytest.mark.parametrize(
    "function",
    [
        lambda q, cos, sin: q.mul_(cos) + rotate_half(q).mul_(sin),
        lambda q, cos, sin: (q * cos).add_(rotate_half(q) * sin),
        lambda q, cos, sin: torch.add(q * cos, rotate_half(q) * sin, alpha=-1),
        lambda q, cos, sin: (q * cos).mul_(2) + rotate_half(q) * sin,
    ],
    ids=["factors in place", "a sum in place", "alpha", "a changed product"],
)
def test_a_rotary_embedding_is_not_read_into_other_code(function: Callable[..., Tensor]) -> None:
    model = cosines_and_sines(function)

    simulated, _ = run(model, X, {"relu": {"output": "bf16"}})

    assert torch.equal(simulated, model(X).bfloat16().float())


def test_masks_are_no_residual_additions() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    padding = torch.zeros(2, 5).masked_fill(torch.arange(5) > 3, -torch.inf)
    example = {"src": X, "src_mask": causal, "src_key_padding_mask": padding}

    with torch.no_grad(), qsim.simulate(layer, {"operations": {"add": {"output": "token(int8)"}}}, example=example):
        found = layer(**example)

    assert torch.allclose(found, layer(**example), atol=0.05)


@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float32).min])
def test_hidden_scores_count_for_no_scale(hidden: float) -> None:
    scores = X @ X.mT
    mask = torch.full((5, 5), hidden).triu(1)

    simulated, _ = run(Calls(lambda x: F.softmax(x, -1)), scores + mask, {"softmax": {"input": "token(int8)"}})

    quantized = qsim.parse("token(int8)").quantize(scores.tril()) + mask
    assert torch.equal(simulated, F.softmax(quantized, -1))


def test_a_recurrence_is_no_residual_addition() -> None:
    _, audit = run(Calls(lambda x: (x * x.sigmoid() + x).relu()), X, {"relu": {"output": "bf16"}})

    assert "add" not in {found.kinds[0] for found in audit.operations}


@pytest.mark.parametrize("count", ["audit", "products", "work"])
def test_looking_at_a_model_changes_no_later_result(count: str) -> None:
    stochastic = "token(int(4, rounding=stochastic))"
    recipe = {"activations": stochastic, "operations": {"relu": {"output": stochastic}}}
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    with torch.no_grad(), qsim.simulate(model, recipe):
        expected = model(X)
    with torch.no_grad(), qsim.simulate(model, recipe, example=X) as simulation:
        getattr(simulation, count)(X)

        assert torch.equal(model(X), expected)
        assert simulation.state_dict()["1:relu.0:calls"] == 1


def test_there_is_nothing_to_count_without_an_example() -> None:
    with pytest.raises(qsim.QsimError, match="there is nothing to count: give an example"):
        qsim.simulate(nn.Linear(2, 2)).products()


@pytest.mark.parametrize("shape", [(4,), (3, 5), (2, 3, 5), (2, 3, 4, 5)])
def test_a_softmax_has_torchs_own_axis_where_none_is_given(shape: tuple[int, ...]) -> None:
    x = noise(*shape)

    with pytest.warns(UserWarning, match="Implicit dimension"):
        simulated, _ = run(Calls(F.softmax), x, {"exp": Halves()})

        assert torch.allclose(simulated, F.softmax(x), atol=1e-3)


class WrittenNorm(nn.Module):
    """An RMS norm as models write it out; `more` is added to its parameter."""

    def __init__(self, more: float = 0.0) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.more = nn.Parameter(torch.linspace(0.5, 1.5, 8) - more), 1e-6, more

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight + self.more) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


class Softened(WrittenNorm):
    """The same parameter and number, and no norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.abs() + self.variance_epsilon)


@pytest.mark.parametrize("more", [0.0, 1.0])
def test_a_norm_that_a_module_writes_out_is_a_norm(more: float) -> None:
    model, grid = nn.Sequential(WrittenNorm(more)), qsim.parse("token(int8)").quantize

    simulated, audit = run(model, X, {"norm": {"input": "int8", "output": "bf16"}})

    assert torch.equal(simulated, model(grid(X)).bfloat16().float())
    assert [(found.site, found.kinds) for found in audit.operations] == [("0:rms_norm.0", ["rms_norm", "norm"])]


@pytest.mark.parametrize("more", [0.0, 1.0])
def test_a_norm_that_is_written_out_takes_an_implementation(more: float) -> None:
    model = nn.Sequential(WrittenNorm(more))

    simulated, _ = run(model, X, {"norm": Halves()})

    assert 1e-6 < (simulated - model(X)).abs().max() < 3e-3


def test_the_function_inside_a_norm_that_is_written_out_is_named_by_itself() -> None:
    model = nn.Sequential(WrittenNorm())

    simulated, audit = run(model, X, {"rsqrt": Halves()})

    assert 1e-6 < (simulated - model(X)).abs().max() < 3e-3
    assert [found.site for found in audit.operations] == ["0:rms_norm.0", "0:rsqrt.0"]


def test_a_module_that_computes_something_else_is_no_norm() -> None:
    _, audit = run(nn.Sequential(Softened(), nn.ReLU()), X, {"relu": {"output": "bf16"}})

    assert [found.site for found in audit.operations] == ["0:rsqrt.0", "1:relu.0"]


def split_rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def test_a_rotary_embedding_of_two_halves_is_one_operation() -> None:
    cosine, sine = ANGLES[:, :4].cos(), ANGLES[:, :4].sin()
    grid = qsim.parse("token(int8)").quantize

    simulated, audit = run(
        Calls(lambda x: split_rotary(x, cosine, sine)), X, {"rotary": {"input": "int8", "output": "bf16"}}
    )

    first, second = map(grid, X.chunk(2, -1))
    turned = (first * grid(cosine) - second * grid(sine), second * grid(cosine) + first * grid(sine))
    assert torch.equal(simulated, torch.cat(turned, -1).bfloat16().float())
    assert [found.site for found in audit.operations] == [":rotary.0"]


def test_halves_that_turn_nothing_are_no_rotary_embedding() -> None:
    _, audit = run(
        Calls(lambda x: split_rotary(x, ANGLES[:, :4], ANGLES[:, :4]).relu()), X, {"relu": {"output": "bf16"}}
    )

    assert [found.site for found in audit.operations] == [":relu.0"]
