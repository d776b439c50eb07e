"""int8_blocks: exact sums of each block, scaled and added in float32; kernels and Python give the same bits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fast_cases import Layer, example, ulps
from qsim_fast import int8
from qsim_fast.accelerator import Fast
from qsim_fast.integer_blocks import unit_of
from qsim_fast.kernels import block_products, native
from qsim_fast.kernels.block_products import PORTABLE, SMALL, WIDE, Packed, Range, Rows, Terms
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.formats.accelerator import accelerated_by

PAIRS = [
    ("abfp(int4)", "abfp(int8)"),
    ("abfp(int8)", "abfp(int8)"),
    ("abfp(int4, n=16)", "abfp(int8, n=64)"),
    ("mxint8", "mxint8"),
    ("mxfp4", "mxfp4"),
    ("nvfp4", "nvfp4"),
    ("mxfp6_e2m3", "mx(e3m0)"),
    ("block(int4, n=32)", "token(int8)"),
    ("channel(int8)", "token(int8)"),
    ("tensor(int5)", "abfp(int7, n=12)"),
]
SHAPES = [((3, 17, 96), 40), ((1, 1, 100), 7), ((5, 66), 33), ((2, 3, 200), 70)]


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with native.only(True):
        yield


def simulated(
    model: nn.Module, x: Tensor, weights: str, activations: str, arithmetic: str = "int8_blocks", keep: bool = True
) -> Tensor:
    """The second output of the model for `x`; its first matmul is computed by `int8_blocks`, if that is asked for."""
    recipe = qsim.Recipe(weights=weights, activations=activations, arithmetic=arithmetic)  # type: ignore[arg-type]
    simulation = qsim.simulate(copy.deepcopy(model), recipe, example=x, keep=keep)
    with torch.no_grad():
        simulation.model(x)
        y: Tensor = simulation.model(x)
    assert simulation.audit().sites[0].arithmetic == arithmetic
    return y


def in_python(*arguments: Any) -> Tensor:
    with native.only(False):
        return simulated(*arguments)


@pytest.mark.parametrize(("shape", "outputs"), SHAPES)
@pytest.mark.parametrize(("weights", "activations"), PAIRS)
def test_kernels_and_python_give_the_same_bits(
    weights: str, activations: str, shape: tuple[int, ...], outputs: int
) -> None:
    layer, x = Layer(shape[-1], outputs), torch.randn(shape, generator=torch.Generator().manual_seed(0))

    found = simulated(layer, x, weights, activations)

    assert torch.equal(found, in_python(layer, x, weights, activations))


@pytest.mark.parametrize(("weights", "activations"), PAIRS)
def test_the_product_is_float32s_but_for_roundings(weights: str, activations: str) -> None:
    layer, x = Layer(), example()

    found = simulated(layer, x, weights, activations)

    plain = simulated(layer, x, weights, activations, "float32")
    assert torch.allclose(found, plain, rtol=1e-5, atol=1e-6 * float(plain.abs().max()))


@pytest.mark.parametrize(("weights", "activations"), PAIRS)
def test_an_overwritten_weight_gives_the_same_bits(weights: str, activations: str) -> None:
    found = simulated(Layer(), example(), weights, activations, keep=False)

    assert torch.equal(found, simulated(Layer(), example(), weights, activations))


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "addmm"])
def test_one_block_is_within_two_ulps_of_float64(transposed: bool) -> None:
    layer, x = Layer(bias=True, transposed=transposed), example()
    with torch.no_grad():
        layer.bias.zero_()  # type: ignore[union-attr]
    rows = (layer.weight.T if transposed else layer.weight).detach()
    a, b = int8.encode_rows(qsim.parse("token(int8)"), x), int8.encode_rows(qsim.parse("channel(int4)"), rows)
    assert a is not None and b is not None
    sums = (a.codes.long() @ b.codes.long().T).double()
    exact = (sums * a.scale.double().unsqueeze(-1) * b.scale.double()).view(3, 17, 40)

    found = simulated(layer, x, "channel(int4)", "token(int8)")

    assert ulps(found, exact) <= 2


def drawn(left: Range, right: Range, inner: int, block: int) -> tuple[Rows, Packed, Terms, Tensor]:
    """Random codes of two matrices each, [2, 19, inner] and [2, 37, inner], their scales, and memory for the product."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(0, left.high - left.low + 1, (2, 19, inner), generator=generator).to(torch.uint8)
    columns = torch.randint(right.low, right.high + 1, (2, 37, inner), generator=generator).to(torch.int8)
    rows[0, 0], columns[0, 0] = left.high - left.low, right.low
    scales = [torch.rand(2, n, -(-inner // block), generator=generator) for n in (19, 37)]
    packed = Packed(columns, scales[1], None, block, 37, inner)
    return Rows(rows.view(torch.int8), scales[0], block), packed, Terms(block, left, right), torch.empty(2, 19, 37)


@pytest.mark.parametrize("block", [16, 32, 64, 96, 256])
@pytest.mark.parametrize(
    ("left", "right"),
    [
        (Range(-12, 12), Range(-12, 12)),
        (Range(-128, 127), Range(-8, 7)),
        (Range(0, 127), Range(-127, 127)),
        (Range(-128, 127), Range(-128, 127)),
    ],
    ids=["fp4", "w4a8", "unsigned", "int8"],
)
@pytest.mark.parametrize("kind", [SMALL, WIDE, PORTABLE])
def test_each_kernel_gives_the_references_bits_for_the_largest_codes_too(
    kind: int, left: Range, right: Range, block: int
) -> None:
    kernels = block_products.kernels_for(1)
    assert kernels is not None
    rows, columns, terms, y = drawn(left, right, 256, block)
    if kind == SMALL and kernels.kind_for(terms) != SMALL:
        kind = WIDE  # 16 bits do not hold these sums

    found = kernels.multiply(rows, kernels.pack(columns, terms, kind), terms, None, y)

    assert torch.equal(found, block_products.multiply(rows, columns, terms, None, torch.empty_like(y)))


def test_a_block_is_scaled_by_the_column_and_then_by_the_row() -> None:
    rows, columns, terms, y = drawn(Range(-7, 7), Range(-7, 7), 32, 16)

    found = block_products.multiply(rows, columns, terms, None, y)

    units = rows.codes.view(torch.uint8).long() - 7
    first, second = (units[1, 4, at] @ columns.codes[1, 5, at].long() for at in (slice(16), slice(16, 32)))
    scaled = [
        (total.float() * columns.scale[1, 5, block]) * rows.scale[1, 4, block]
        for block, total in enumerate((first, second))
    ]
    assert found[1, 4, 5] == scaled[0] + scaled[1]


@pytest.mark.parametrize(
    ("element", "unit"),
    [("e2m1", 2), ("e1m2", 2), ("e3m0", 4), ("e2m3", 8), ("int8", 1), ("nf4", None), ("e4m3", None)],
)
def test_a_format_is_whole_numbers_of_its_smallest_value(element: str, unit: float | None) -> None:
    assert unit_of(qsim.parse(element)) == unit  # type: ignore[arg-type]


@pytest.mark.parametrize(("where", "value"), [("input", torch.nan), ("input", torch.inf), ("weight", torch.nan)])
@pytest.mark.parametrize(
    ("weights", "activations"), [("abfp(int4)", "abfp(int8)"), ("nvfp4", "nvfp4"), ("mxfp4", "mxfp4")]
)
def test_what_is_not_finite_spreads_as_in_float32(weights: str, activations: str, where: str, value: float) -> None:
    layer, x = Layer(), example()
    with torch.no_grad():
        (x[0, 0] if where == "input" else layer.weight[3])[7] = value

    found = simulated(layer, x, weights, activations)

    plain = simulated(layer, x, weights, activations, "float32")
    assert bool(plain.isnan().any()) and torch.equal(found.isnan(), plain.isnan())


def test_a_static_scale_hides_no_nan() -> None:
    x = example()
    simulation = qsim.simulate(
        Layer(), weights="int4", activations="tensor(int8, static=true)", arithmetic="int8_blocks", calibration=[x]
    )
    x[0, 0, 0] = torch.nan

    with torch.no_grad():
        y = simulation.model(x)

    assert y.isnan().sum() == 40 and bool(y[0, 0].isnan().all())


def test_a_scale_that_may_overflow_takes_float32() -> None:
    layer, x = Layer(bias=False), example() * 2.0**-100
    with torch.no_grad():
        layer.weight.mul_(2.0**100)
    recipe = qsim.Recipe(weights="mxfp4", activations="mxfp4", arithmetic="int8_blocks")  # type: ignore[arg-type]
    simulation = qsim.simulate(layer, recipe, example=x)

    with torch.no_grad():
        simulation.model(x)

    assert simulation.audit().sites[0].arithmetic == "float32"


class Attention(nn.Module):
    """Causal self-attention of [B, N, 32]: four heads of queries, and two of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("queries", [128, 96], ids=["tiles", "tiles that no sum of codes fits"])
@pytest.mark.parametrize("activations", ["token(int8)", "tensor(int8)", "mxfp4", "nvfp4", "abfp(int8, n=32)"])
def test_attention_by_tiles_gives_float32s_numbers(activations: str, queries: int) -> None:
    x = torch.randn(2, 300, 32, generator=torch.Generator().manual_seed(1))
    outputs = []
    for arithmetic in ("int8_blocks", "float32"):
        model = Attention()
        qsim.simulate(model, weights="int8", activations=activations, arithmetic=arithmetic, example=x)
        with accelerated_by(Fast(queries=queries)), torch.no_grad():
            outputs.append(model(x))

    step = 1e-6 if queries == 128 else 1e-5  # the same codes, but for those that a rounding of scores moves
    different = (outputs[0] - outputs[1]).abs() > step * outputs[1].abs().max()
    assert different.float().mean() < 0.02


@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_attention_with_an_operand_that_only_float32_takes_gives_float32s_numbers(which: str) -> None:
    generator = torch.Generator().manual_seed(0)
    heads = {name: torch.randn(2, 4, 300, 8, generator=generator) for name in ("query", "key", "value")}
    heads[which][1, 2, 200, 3] = torch.nan if which == "query" else 2.0**80

    class Heads(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    outputs = []
    for arithmetic in ("int8_blocks", "float32"):
        model = Heads().eval()
        qsim.simulate(model, activations="tensor(int8)", arithmetic=arithmetic, example=heads)
        with torch.no_grad():
            outputs.append(model(**heads))

    assert torch.allclose(*outputs, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("rows", [1, 64])
def test_auto_takes_it_for_products_of_some_size(rows: int) -> None:
    layer, x = Layer(256, 256), torch.randn(rows, 256, generator=torch.Generator().manual_seed(0))
    simulation = qsim.simulate(layer, weights="mxfp4", activations="mxfp4", example=x)

    with torch.no_grad():
        simulation.model(x)

    faster = rows > 1 and torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    assert simulation.audit().sites[0].arithmetic == ("int8_blocks" if faster else "float32")


def test_a_matrix_times_a_vector_takes_float32() -> None:
    class Products(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.mv(x, x[0])

    simulation = qsim.simulate(Products(), activations="token(int8)", example=torch.randn(1024, 1024))

    with torch.no_grad():
        simulation.model(torch.randn(1024, 1024))

    assert simulation.audit().sites[0].arithmetic == "float32"
