"""Properties of every number format and scheme, on tensors that hypothesis generates."""

from __future__ import annotations

import functools
import os

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

import qsim_core as qsim
from qsim_core.formats.format import Format, table_of

FORMATS = [
    "int2", "int4", "int(8, narrow=false)", "uint4", "int(8, fraction=6)", "int16",
    "bf16", "fp16", "tf32", "e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz", "e3m4", "e3m2", "e2m3", "e2m1", "e1m2", "e3m0",
    "binary8p1", "binary8p3", "binary8p4f", "float(4, 3, subnormals=false)", "float(4, 3, bias=3)",
    "nf4", "codebook([-3, -0.5, 0, 0.7, 2])", "posit(8)", "posit(16)",
]  # fmt: skip
SYMMETRIC = [
    name for name in FORMATS if not name.startswith(("uint", "nf4", "codebook")) and name != "int(8, narrow=false)"
]
SCHEMES = [
    "tensor({})", "channel({})", "token({}, scale=bf16)", "block({}, 5)", "block({}, [2, 3])", "abfp({}, n=4, scale=none)",
    "mx({}, n=4)", "scaled({}, 4, scale=scaled(e4m3, tensor))",
]  # fmt: skip
FEW = settings(
    max_examples=int(os.environ.get("QSIM_EXAMPLES", "10")), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
"""Examples of each property; `tox run -e nightly` asks for many."""
NUMBER = st.floats(width=32, allow_nan=False, allow_infinity=False)
ORDINARY = st.floats(width=32, min_value=-1e4, max_value=1e4).filter(lambda v: v == 0 or abs(v) > 1e-4)
ROWS = st.lists(st.lists(ORDINARY, min_size=11, max_size=11), min_size=3, max_size=3).map(torch.tensor)


@functools.cache
def parsed(text: str) -> qsim.Quantizer:
    return qsim.parse(text)  # type: ignore[no-any-return]


def number_format(text: str) -> Format:
    found = parsed(text)
    assert isinstance(found, Format)
    return found


@pytest.mark.parametrize("name", FORMATS)
@FEW
@given(values=st.lists(NUMBER, min_size=1))
def test_rounding_twice_is_rounding_once(name: str, values: list[float]) -> None:
    y = parsed(name)(torch.tensor(values))

    assert torch.equal(parsed(name)(y), y)


@pytest.mark.parametrize("name", FORMATS)
@FEW
@given(values=st.lists(NUMBER, min_size=2))
def test_a_larger_value_never_rounds_lower(name: str, values: list[float]) -> None:
    y = parsed(name)(torch.tensor(sorted(values)))

    assert (y[1:] >= y[:-1]).all()


@pytest.mark.parametrize("name", SYMMETRIC)
@FEW
@given(values=st.lists(NUMBER, min_size=1))
def test_a_format_with_a_sign_is_odd(name: str, values: list[float]) -> None:
    x = torch.tensor(values)

    assert torch.equal(parsed(name)(-x), -parsed(name)(x))


@pytest.mark.parametrize("name", [name for name in FORMATS if not name.startswith("posit")])
@FEW
@given(value=NUMBER)
def test_no_value_of_the_format_is_nearer(name: str, value: float) -> None:
    number = number_format(name)
    y = float(number(torch.tensor(value)))
    inside = min(max(value, number.min), number.max)

    assert abs(y) == torch.inf or abs(y - inside) == (table_of(number).finite - inside).abs().min()


@pytest.mark.parametrize("rounding", ["even", "away", "zero", "stochastic"])
@pytest.mark.parametrize("name", FORMATS)
@FEW
@given(value=NUMBER)
def test_the_result_is_one_of_the_two_neighbours(name: str, rounding: str, value: float) -> None:
    number = number_format(name).replace(rounding=rounding)
    y = float(number(torch.tensor(value)))
    finite = table_of(number).finite

    assert y in finite[finite <= value][-1:].tolist() + finite[finite >= value][:1].tolist() or abs(y) == torch.inf


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("element", ["int4", "e4m3", "e2m1", "nf4"])
@FEW
@given(x=ROWS, exponent=st.integers(-20, 20))
def test_a_power_of_two_goes_through_a_scheme(scheme: str, element: str, x: Tensor, exponent: int) -> None:
    quantizer = parsed(scheme.format(element))

    assert torch.equal(quantizer(x * 2.0**exponent), quantizer(x) * 2.0**exponent)


@pytest.mark.parametrize("scheme", SCHEMES)
@FEW
@given(x=ROWS)
def test_a_scheme_is_odd(scheme: str, x: Tensor) -> None:
    quantizer = parsed(scheme.format("int8"))

    assert torch.equal(quantizer(-x), -quantizer(x))


@pytest.mark.parametrize(
    "text",
    [*(scheme.format(e) for scheme in SCHEMES for e in ("int8", "e2m1", "e5m2")), "channel(int4, symmetric=false)"],
)
@FEW
@given(x=ROWS)
def test_what_was_rounded_under_a_scale_stays_where_it_is_under_the_same_scale(text: str, x: Tensor) -> None:
    scheme = parsed(text)
    assert isinstance(scheme, qsim.Scheme)
    scale, zero = scheme.scale_map(x)

    once = scheme.round_at(x, scale, zero)

    assert torch.equal(scheme.round_at(once, scale, zero), once)


@pytest.mark.parametrize(
    "text", [*FORMATS, *(scheme.format("int4") for scheme in SCHEMES), "channel(int4, symmetric=false)"]
)
@FEW
@given(
    x=ROWS,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    transposed=st.booleans(),
)
def test_shape_dtype_and_strides_are_kept_and_the_input_too(
    text: str, x: Tensor, dtype: torch.dtype, transposed: bool
) -> None:
    x = (x.T if transposed else x).to(dtype)
    before = x.clone()

    y = parsed(text)(x)

    assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, x.stride())
    assert torch.equal(x, before)
    assert y.data_ptr() != x.data_ptr()
