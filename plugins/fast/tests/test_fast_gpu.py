"""The kernels for GPUs give the reference's bits, and their products float32's: on a GPU, and in Triton's interpreter.

Without a GPU the interpreter takes tensors on the CPU for a GPU's; with one, the compiled kernels are tested, and what
only a GPU has.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from fast_cases import FORMATS, INT8, SCHEMES, Convolution, Layer, assert_same_bits, example, in_float64, ulps, values
from qsim_fast import int8, quantizing
from qsim_fast.bf16 import BF16Product
from qsim_fast.kernels import gpu, native
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.formats.quantizer import Quantizer

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton for this machine"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # the interpreter's numpy
]
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _kernels_for_all() -> Iterator[None]:
    with native.only(gpu.GpuKernels()):
        yield


def both(quantizer: Quantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    """The result of the kernels, and that of the reference on the CPU."""
    x = x.to(DEVICE)
    fast = quantizing.quantize(quantizer, x) if isinstance(quantizer, qsim.Scheme) else quantizing.cast(quantizer, x)  # type: ignore[arg-type]
    assert fast is not None
    with native.only(False):
        return fast.cpu(), quantizer.quantize(x.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("text", [*SCHEMES, *FORMATS])
def test_the_kernels_give_the_references_bits(text: str, dtype: torch.dtype) -> None:
    assert_same_bits(*both(qsim.parse(text), values(dtype)))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["token(int8)", "abfp(int4, n=64)", "mxfp4", "nvfp4"])
def test_no_tensor_of_sixteen_bits_is_rounded_differently(text: str) -> None:
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(512, 128)

    assert_same_bits(*both(qsim.parse(text), x))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["token(int8, symmetric=false)", "tensor(e4m3)", "abfp(int8, n=50000)"])
def test_rows_longer_than_a_program_holds(text: str) -> None:
    assert_same_bits(*both(qsim.parse(text), torch.randn(2, 40_000)))  # type: ignore[arg-type]


def test_long_blocks_within_longer_rows_are_left_to_the_reference() -> None:
    assert quantizing.quantize(qsim.parse("abfp(int8, n=20000)"), torch.randn(2, 40_000, device=DEVICE)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["token(int8)", "mxfp4", "nvfp4"])
def test_the_memory_layout_is_no_matter(text: str) -> None:
    assert_same_bits(*both(qsim.parse(text), values().view(4, 6, 200).transpose(0, 1)))  # type: ignore[arg-type]
    assert_same_bits(*both(qsim.parse(text), values().T))  # type: ignore[arg-type]


def test_static_scales_give_the_references_bits() -> None:
    x, scheme = values()[:7].to(DEVICE), qsim.parse("block(int8, n=32, symmetric=false)")
    scale, zero = scheme.fit(*scheme.static_blocks(x))  # type: ignore[attr-defined]

    fast = scheme.quantize_at(x, scale, zero)  # type: ignore[attr-defined]

    with native.only(False):
        assert_same_bits(fast.cpu(), scheme.quantize_at(x.cpu(), scale.cpu(), zero.cpu()))  # type: ignore[attr-defined]


def run(model: nn.Module, arithmetic: str, *inputs: Tensor, keep: bool = True, **parts: str) -> tuple[Tensor, set[str]]:
    """The output of the model, on the CPU, and the arithmetics of its sites."""
    recipe = qsim.Recipe(arithmetic=arithmetic, **parts)  # type: ignore[arg-type]
    model, inputs = copy.deepcopy(model).eval().to(DEVICE), tuple(x.to(DEVICE) for x in inputs)
    simulation = qsim.simulate(model, recipe, example=inputs[0] if len(inputs) == 1 else inputs, keep=keep)
    with torch.no_grad():
        y = model(*inputs)
    return y.cpu(), {site.arithmetic for site in simulation.sites.table.values()}


def exact_of(parts: dict[str, str], layer: Layer | None = None, x: Tensor | None = None) -> Tensor:
    """The product of the quantized values, in float64."""
    layer, x = Layer() if layer is None else layer, example() if x is None else x
    with native.only(False):
        weight = qsim.parse(parts["weights"]).quantize(layer.weight.detach())  # type: ignore[attr-defined]
        rows = qsim.parse(parts["activations"]).quantize(x)  # type: ignore[attr-defined]
    return F.linear(rows.double(), weight.double(), layer.bias.detach().double())  # type: ignore[union-attr]


BLOCKWISE = [
    ("abfp(int4)", "abfp(int8)"),
    ("abfp(int4, n=16)", "abfp(int8, n=32)"),
    ("channel(int8)", "abfp(int8, n=32)"),
    ("tensor(int8)", "token(int4)"),
    ("channel(int4, range=mse)", "token(int8)"),
    ("channel(uint8)", "token(uint8)"),
    ("channel(e4m3)", "token(e5m2)"),
    ("mxfp4", "abfp(e4m3, n=32)"),
    ("nvfp4", "nvfp4"),
]


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """float32's roundings, added up over the reduction axis, and no more."""
    error = (found.double() - wanted.double()).norm() / wanted.double().norm()
    assert torch.equal(found.isnan(), wanted.isnan()) and float(error) < 5e-7, float(error)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(("weights", "activations"), BLOCKWISE)
def test_blockwise_sums_are_those_of_the_quantized_values(weights: str, activations: str, keep: bool) -> None:
    parts = {"weights": weights, "activations": activations}

    y, arithmetics = run(Layer(), "blockwise", example(), keep=keep, **parts)

    assert arithmetics == {"blockwise"}
    assert_close(y, exact_of(parts))


@pytest.mark.parametrize("shape", [(1, 16), (3, 100), (70, 130)])
def test_any_number_of_rows_and_columns_will_do(shape: tuple[int, int]) -> None:
    rows, columns = shape
    layer, x = Layer(columns=columns, rows=rows), torch.randn(5, rows, columns)
    parts = {"weights": "channel(int8)", "activations": "token(int8)"}

    y, arithmetics = run(layer, "blockwise", x, **parts)

    assert arithmetics == {"blockwise"}
    assert_close(y, exact_of(parts, layer, x))


def test_blocks_too_short_for_a_matmul_take_float32() -> None:
    _, arithmetics = run(Layer(), "blockwise", example(), weights="abfp(int4, n=8)", activations="abfp(int8)")

    assert arithmetics == {"float32"}


def test_nan_spreads_as_in_float32() -> None:
    x = example()
    x[0, 0, 0] = torch.nan
    parts = {"weights": "abfp(int4)", "activations": "abfp(int8)"}

    y, _ = run(Layer(), "blockwise", x, **parts)
    with native.only(False):
        slow, _ = run(Layer(), "float32", x, **parts)

    assert torch.equal(y.isnan(), slow.isnan()) and bool(y[0, 0].isnan().all())


def test_weights_that_are_overwritten_hold_the_references_bits() -> None:
    quantizer, rows = qsim.parse("nvfp4"), torch.randn(40, 96).to(DEVICE)

    made = BF16Product([quantizer, quantizer], biased=False, rounds=False).new(rows)

    with native.only(False):
        assert_same_bits(made.values().cpu(), quantizer.quantize(rows.cpu()))  # type: ignore[attr-defined, union-attr]


@pytest.mark.parametrize("columns", [200, 17_000])
@pytest.mark.parametrize("text", ["nvfp4", "scaled(e2m1, scale=scaled(e4m3))", "channel(e2m1, scale=scaled(e4m3))"])
def test_values_without_the_scale_of_all_scales(text: str, columns: int) -> None:
    scheme, x = qsim.parse(text), torch.randn(3, columns).to(DEVICE)

    fast, second = quantizing.without_tensor_scale(scheme, x)  # type: ignore[arg-type]

    with native.only(False):
        slow, same = quantizing.without_tensor_scale(scheme, x.cpu())  # type: ignore[arg-type]
        assert_same_bits(fast.cpu(), slow)
        assert second.cpu() == same
        wanted = scheme.quantize(x.cpu())  # type: ignore[attr-defined]
        assert torch.allclose(slow.double() * same.double(), wanted.double(), rtol=2**-22, atol=0)


class Attention(nn.Module):
    """Attention without a mask, or a causal one."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=self.causal, enable_gqa=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("activations", ["abfp(int8, n=16)", "nvfp4", "token(int8)", "token(e4m3)"])
def test_products_of_attention_are_blockwise_too(activations: str, causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 40, 32, generator=generator) for heads in (4, 2, 2))

    y, arithmetics = run(Attention(causal), "blockwise", q, k, v, activations=activations)
    with native.only(False):
        slow, _ = run(Attention(causal), "float32", q, k, v, activations=activations)

    assert arithmetics == {"blockwise"}
    assert_close(y, slow)


@pytest.mark.parametrize("tokens", [32, 40])
def test_values_that_share_scales_along_the_head_are_multiplied_in_float32(tokens: int) -> None:
    q, k, v = torch.randn(3, 2, 4, tokens, 32, generator=torch.Generator().manual_seed(0))
    parts = {"activations": "token(int8)", "value_axis": "head"}

    y, arithmetics = run(Attention(False), "blockwise", q, k, v, **parts)
    with native.only(False):
        slow, _ = run(Attention(False), "float32", q, k, v, **parts)

    assert arithmetics == {"blockwise", "float32"}
    assert_close(y, slow)


@pytest.mark.parametrize("weights", ["channel(int4, range=mse)", "abfp(int4, n=32)", "channel(e4m3)"])
def test_a_transposed_weight(weights: str) -> None:
    layer = Layer(transposed=True)
    parts = {"weights": weights, "activations": "token(int8)"}

    y, arithmetics = run(layer, "blockwise", example(), **parts)

    with native.only(False):
        weight = qsim.parse(weights).quantize(layer.weight.detach().T)  # type: ignore[attr-defined]
        rows = qsim.parse("token(int8)").quantize(example())  # type: ignore[attr-defined]
        codes, _ = int8.encode_matrix(qsim.parse(weights), layer.weight.detach().T, None, 0.0, torch.bfloat16)  # type: ignore[arg-type]
    assert arithmetics == {"blockwise"} and codes.is_contiguous()
    assert_close(y, F.linear(rows.double(), weight.double(), layer.bias.detach().double()))  # type: ignore[union-attr]


@pytest.mark.parametrize(("n", "wanted"), [(48, "blockwise"), (96, "blockwise"), (200, "blockwise"), (20, "float32")])
def test_blocks_are_multiples_of_sixteen_or_as_long_as_a_row(n: int, wanted: str) -> None:
    parts = {"weights": f"abfp(int4, n={n})", "activations": f"abfp(int8, n={n})"}

    y, arithmetics = run(Layer(), "blockwise", example(), **parts)

    assert arithmetics == {wanted}
    assert_close(y, exact_of(parts))


def test_a_product_of_two_scales_need_not_be_finite() -> None:
    layer, x = Layer(bias=False), example() * 2.0**80
    layer.weight.data *= 2.0**-80
    layer.weight.data[0] *= 2.0**150
    parts = {"weights": "channel(int8)", "activations": "token(int8)"}

    y, _ = run(layer, "blockwise", x, **parts)
    with native.only(False):
        slow, _ = run(layer, "float32", x, **parts)

    assert torch.equal(y.isfinite(), slow.isfinite())


@pytest.mark.parametrize(("weights", "activations"), INT8)
def test_int8_is_within_two_ulps_of_float64(weights: str, activations: str) -> None:
    parts = {"weights": weights, "activations": activations}

    y, arithmetics = run(Layer(), "int8", example(), **parts)

    layer = Layer()
    with native.only(False):
        wanted = in_float64(activations, example()) @ in_float64(weights, layer.weight.detach()).T
    assert arithmetics == {"int8"}
    assert ulps(y, (wanted + layer.bias.detach().double()).view(y.shape)) <= 2  # type: ignore[union-attr]


@on_a_gpu
@pytest.mark.parametrize("outputs", ["none", "bf16"])
@pytest.mark.parametrize(
    "text", ["mxfp8_e4m3", "mxfp4", "mxint8", "abfp(e2m1, n=16, scale=e4m3)", "cast(e4m3)", "nvfp4"]
)
def test_bf16_sums_are_float32s(text: str, outputs: str) -> None:
    parts = {"weights": text, "activations": text} | ({"outputs": outputs} if outputs != "none" else {})

    y, arithmetics = run(Layer(), "auto", example(), **parts)

    wanted = exact_of({"weights": text, "activations": text})
    assert arithmetics == {"bf16"}
    if outputs == "none":
        assert_close(y, wanted)
    else:
        assert float((y.double() - wanted).abs().max() / wanted.abs().max()) <= 2**-8


@on_a_gpu
@pytest.mark.parametrize(
    ("text", "wanted"),
    [("token(int8)", "int8"), ("abfp(int8)", "blockwise"), ("nvfp4", "bf16"), ("posit(8, es=1)", "float32")],
)
def test_auto_takes_what_is_exact_and_fastest(text: str, wanted: str) -> None:
    weights = text.replace("token", "channel")

    assert run(Layer(), "auto", example(), weights=weights, activations=text)[1] == {wanted}


@on_a_gpu
@pytest.mark.parametrize(
    ("arithmetic", "text", "error"),
    [
        ("tf32", "abfp(int4)", 1e-6),
        ("tf32", "cast(fp16)", 1e-6),
        ("fp8", "cast(e4m3)", 1e-3),
        ("fp8", "token(e4m3)", 1e-3),
    ],
)
def test_what_is_named_is_taken_and_recorded(arithmetic: str, text: str, error: float) -> None:
    parts = {"weights": text.replace("token", "channel"), "activations": text}
    layer = Layer(rows=48)

    y, arithmetics = run(layer, arithmetic, example(), **parts)

    wanted = exact_of(parts, layer)
    assert arithmetics == {arithmetic}
    assert 0 < float((y.double() - wanted).norm() / wanted.norm()) < error


@on_a_gpu
@pytest.mark.parametrize("arithmetic", ["tf32", "fp8"])
def test_what_does_not_fit_a_named_arithmetic_takes_float32(arithmetic: str) -> None:
    assert run(Layer(), arithmetic, example(), weights="channel(int8)", activations="token(int8)")[1] == {"float32"}


@on_a_gpu
def test_stored_weights_are_nvfp4s_bits() -> None:
    layer = Layer().cuda()
    wanted = qsim.parse("nvfp4").quantize(layer.weight.detach())  # type: ignore[attr-defined]
    recipe = qsim.Recipe(weights="nvfp4", activations="nvfp4")  # type: ignore[arg-type]
    qsim.simulate(layer, recipe, example=example().cuda(), keep=False)

    with torch.no_grad():
        layer(example().cuda())

    assert torch.equal(layer.weight, wanted)


@on_a_gpu
@pytest.mark.parametrize("magnitude", [1e-14, 1.0, 1e15])
def test_nvfp4_at_any_magnitude(magnitude: float) -> None:
    parts, layer = {"weights": "nvfp4", "activations": "nvfp4"}, Layer(bias=False)
    layer.weight.data *= magnitude

    y, arithmetics = run(layer, "auto", example() * magnitude, **parts)
    with native.only(False):
        slow, _ = run(layer, "float32", example() * magnitude, **parts)

    assert arithmetics == {"bf16"}
    assert_close(y, slow)


@on_a_gpu
def test_no_kernel_is_compiled_for_each_length() -> None:
    from qsim_fast.kernels import products_triton, quantizers_triton

    compiled = [quantizers_triton.extremes, quantizers_triton.round_blocks, products_triton.multiply_blocks]
    counts = []
    for length in (*range(65, 68), *range(72, 120)):
        q, k, v = torch.randn(3, 1, 2, length, 64)
        run(Attention(False), "blockwise", q, k, v, activations="token(int8)")
        counts.append(sum(len(cache[0]) for kernel in compiled for cache in kernel.device_caches.values()))

    assert counts[-1] - counts[8] <= 6, counts  # lengths that sixteen divides have their own


@on_a_gpu
def test_more_matrices_than_a_grid_has_places() -> None:
    q, k, v = torch.randn(3, 70_000, 1, 2, 16)

    y, arithmetics = run(Attention(False), "blockwise", q, k, v, activations="token(int8)")
    with native.only(False):
        slow, _ = run(Attention(False), "float32", q, k, v, activations="token(int8)")

    assert arithmetics == {"blockwise"}
    assert_close(y, slow)


@on_a_gpu
@pytest.mark.parametrize("outputs", ["bf16"])
def test_convolutions_in_bf16(outputs: str) -> None:
    model, x = Convolution(2, padding=1), torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    parts = {"weights": "mx(e4m3, n=8)", "activations": "mx(e4m3, n=8)", "outputs": outputs}

    y, arithmetics = run(model, "auto", x, **parts)
    slow, _ = run(model, "float32", x, **parts)

    assert arithmetics == {"bf16"}
    assert float((y != slow).double().mean()) < 0.01 and torch.allclose(y, slow, rtol=2**-7, atol=1e-3)


@on_a_gpu
def test_the_reference_gives_the_same_bits_on_the_gpu() -> None:
    texts = [
        *SCHEMES,
        *FORMATS,
        "token(int8(rounding=stochastic))",
        "e4m3(rounding=stochastic)",
        "posit(8, es=1)",
        "nf4",
    ]
    with native.only(False):
        for quantizer in map(qsim.parse, texts):
            here, there = quantizer.quantize(values()), quantizer.quantize(values().cuda())  # type: ignore[attr-defined]
            assert_same_bits(there.cpu(), here)
