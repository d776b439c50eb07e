"""The kernels give the reference's bits, whatever the scheme, the layout and the values."""

from __future__ import annotations

import os
import subprocess
import weakref
from pathlib import Path

import forked
import pytest
import torch
from fast_cases import FORMATS, SCHEMES, WITHOUT_KERNELS, assert_same_bits, values
from qsim_fast import quantizing
from qsim_fast.identity_cache import cached_by_identity
from qsim_fast.kernels import native
from torch import Tensor

import qsim_core as qsim
from qsim_core.errors import QsimError
from qsim_core.formats.quantizer import Function


def both(call: object) -> tuple[Tensor, Tensor]:
    """The result of the kernels, and that of the reference."""
    with native.only(True):
        fast = call()  # type: ignore[operator]
    with native.only(False):
        return fast, call()  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("text", [*SCHEMES, *FORMATS])
def test_the_kernels_give_the_references_bits(text: str, dtype: torch.dtype) -> None:
    quantizer, x = qsim.parse(text), values(dtype)

    assert_same_bits(*both(lambda: quantizer.quantize(x)))


@pytest.mark.parametrize("text", ["bf16", "fp16", "cast(bf16)", *SCHEMES, *FORMATS])
def test_a_tensor_may_be_rounded_into_itself(text: str) -> None:
    quantizer, x = qsim.parse(text), values()

    assert_same_bits(*both(lambda: quantizer.quantize_into(given := x.clone(), given)))


@pytest.mark.parametrize("text", ["bf16", "fp16", "cast(bf16)"])
def test_a_format_of_torch_needs_no_other_memory(text: str) -> None:
    x = values()

    assert qsim.parse(text).quantize_into(x, x) is x


@pytest.mark.parametrize("text", ["token(int8)", "abfp(int4, n=64)", "mxfp4", "nvfp4"])
def test_no_tensor_of_sixteen_bits_is_rounded_differently(text: str) -> None:
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(512, 128)

    assert_same_bits(*both(lambda: qsim.parse(text).quantize(x)))


@pytest.mark.parametrize("text", SCHEMES)
def test_it_is_the_kernels_that_do_it(text: str) -> None:
    with native.only(True):
        assert quantizing.quantize(qsim.parse(text), values()) is not None  # type: ignore[arg-type]


@pytest.mark.parametrize("text", FORMATS)
def test_it_is_the_kernels_that_cast(text: str) -> None:
    with native.only(True):
        assert quantizing.cast(qsim.parse(text), values()) is not None  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["if4", "razer_weights", "hif4", "nvfp4_adaptive"])
def test_a_choice_by_block_is_the_same_with_and_without_the_kernels(text: str) -> None:
    x = torch.randn(24, 200, generator=torch.Generator().manual_seed(0))

    assert_same_bits(*both(lambda: qsim.parse(text).quantize(x)))


@pytest.mark.parametrize("text", WITHOUT_KERNELS)
def test_what_the_kernels_do_not_know_is_left_to_the_reference(text: str) -> None:
    with native.only(True):
        assert quantizing.quantize(qsim.parse(text), values()) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T,
        lambda x: x.view(4, 6, 200).transpose(0, 1),
        lambda x: x.view(2, 3, 4, 200).permute(2, 0, 1, 3),
        lambda x: x[:, ::2],
        lambda x: x[::2],
        lambda x: x[:1].expand(5, 200),
        lambda x: x[0],
        lambda x: x[:, :1],
    ],
    ids=["transposed", "heads", "permuted", "every second column", "every second row", "expanded", "a row", "a column"],
)
@pytest.mark.parametrize("text", ["token(int8)", "tensor(e4m3)", "mxfp4", "nvfp4", "e4m3"])
def test_the_memory_layout_is_no_matter(text: str, view: object) -> None:
    quantizer, x = qsim.parse(text), view(values())  # type: ignore[operator]

    assert_same_bits(*both(lambda: quantizer.quantize(x)))


@pytest.mark.parametrize("text", ["tensor(int8, static=true)", "block(int4, n=50, static=true, symmetric=false)"])
def test_static_scales_give_the_references_bits(text: str) -> None:
    scheme, x = qsim.parse(text), values()
    scale, zero = scheme.fit(*scheme.static_blocks(x[16:]))  # type: ignore[attr-defined]

    assert_same_bits(*both(lambda: scheme.quantize_at(x, scale, zero)))  # type: ignore[attr-defined]


def test_a_gradient_is_the_references() -> None:
    x = values()[16:].requires_grad_()
    quantizer = qsim.parse("token(int4)")

    def gradient() -> Tensor:
        return torch.autograd.grad(quantizer(x).square().sum(), x)[0]

    assert_same_bits(*both(gradient))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_under_vmap_the_reference_does_it() -> None:
    quantizer, x = qsim.parse("token(int8)"), values()[16:]
    with native.only(True):
        assert torch.equal(torch.vmap(quantizer.quantize)(x), quantizer.quantize(x))


def test_many_threads_and_one_give_the_same() -> None:
    quantizer, x, threads = qsim.parse("abfp(int4)"), torch.randn(1000, 300), torch.get_num_threads()
    with native.only(True):
        many = quantizer.quantize(x)
        torch.set_num_threads(1)
        try:
            assert torch.equal(quantizer.quantize(x), many)
        finally:
            torch.set_num_threads(threads)


def run(program: str, **environment: str) -> str:
    completed = subprocess.run(
        [*forked.python(), "-c", program], capture_output=True, text=True, env={**os.environ, **environment}, check=True
    )
    return completed.stdout


PROGRAM = """
import torch
from qsim_fast.kernels import native
from qsim_int import Int
native.FLAGS[0] = "-O0"  # the compiler takes a second, not ten
for _ in range({times}):
    native.kernels_for(native.ELEMENTS_TO_BUILD // 2)
assert Int(bits=8).quantize(torch.tensor([[2.4, 300.0]])).tolist() == [[2.0, 127.0]]
print(native.kernels_for(0) is not None)
"""


@pytest.fixture
def cold(tmp_path: Path) -> dict[str, str]:
    """An environment whose cache has no kernels."""
    return {"QSIM_CACHE": str(tmp_path)}


def test_the_kernels_are_built_once_enough_was_quantized_and_loaded_by_the_next_run(
    tmp_path: Path, cold: dict[str, str]
) -> None:

    assert run(PROGRAM.format(times=1), **cold) == "False\n"
    assert run(PROGRAM.format(times=2), **cold) == "True\n"
    assert len(list((tmp_path / "kernels").glob("*.so"))) == 1
    assert run(PROGRAM.format(times=1), **cold) == "True\n"


def test_without_a_compiler_python_does_it(cold: dict[str, str]) -> None:
    assert run(PROGRAM.format(times=3), **cold, PATH="") == "False\n"


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    assert run(PROGRAM.format(times=3), QSIM_CACHE=str(tmp_path / "file")) == "False\n"


def test_processes_that_build_at_once_build_one(tmp_path: Path, cold: dict[str, str]) -> None:
    command, environment = [*forked.python(), "-c", PROGRAM.format(times=3)], {**os.environ, **cold}
    several = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]

    assert [process.communicate()[0] for process in several] == ["True\n"] * 3
    assert len(list((tmp_path / "kernels").glob("*.so"))) == 1


def test_nobodys_home_is_no_error() -> None:
    away = "from pathlib import Path\ndef home(): raise RuntimeError('no home')\nPath.home = home\n"

    assert run(away + PROGRAM.format(times=3), QSIM_CACHE="", XDG_CACHE_HOME="") == "False\n"


def test_they_can_be_switched_off() -> None:
    assert run(PROGRAM.format(times=3), QSIM_NATIVE="0") == "False\n"


def test_a_format_that_inherits_steps_and_rounds_in_its_own_way_is_left_alone() -> None:
    class Odd(type(qsim.parse("int8"))):  # type: ignore[misc]
        name = "odd"

        def round(self, x: Tensor) -> Tensor:
            return torch.full_like(x, 3.0)

    with native.only(True):
        assert Odd().quantize(torch.zeros(2, 2)).tolist() == [[3.0, 3.0], [3.0, 3.0]]


def test_a_scheme_that_rounds_in_its_own_way_is_left_alone() -> None:
    class Twice(type(qsim.parse("token(int8)"))):  # type: ignore[misc]
        name = "twice"

        def quantize(self, x: Tensor) -> Tensor:
            return 2 * super().quantize(x)

    x, scheme = values()[16:], Twice(element="int8")
    simulation = qsim.simulate(torch.nn.Linear(200, 3).eval(), activations=scheme, weights="int8", example=x)
    with native.only(True):
        assert torch.equal(scheme.quantize(x), 2 * qsim.parse("token(int8)").quantize(x))  # type: ignore[attr-defined]
        assert simulation.audit().sites[0].arithmetic == "float32"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", ["tensor(int4)", "nvfp4", "token(int8)"])
def test_torchs_default_dtype_is_no_matter(text: str, dtype: torch.dtype) -> None:
    x = values()
    with native.only(True):
        before = qsim.parse(text).quantize(x)  # type: ignore[attr-defined]
        torch.set_default_dtype(dtype)
        try:
            assert_same_bits(qsim.parse(text).quantize(x), before)  # type: ignore[attr-defined]
        finally:
            torch.set_default_dtype(torch.float32)


def test_static_scales_found_in_float64_are_used_in_float32() -> None:
    scheme, x = qsim.parse("tensor(int8, static=true, symmetric=false)"), values()[16:]
    scale, zero = scheme.fit(*scheme.static_blocks(x.double()))  # type: ignore[attr-defined]

    assert_same_bits(*both(lambda: scheme.quantize_at(x, scale, zero)))  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore")
def test_a_trace_holds_the_references_operators() -> None:
    x = values()[16:]
    with native.only(True):
        traced = torch.jit.trace(lambda x: qsim.parse("token(int8)").quantize(x), x)  # type: ignore[attr-defined]
        assert torch.equal(traced(x + 1), qsim.parse("token(int8)").quantize(x + 1))  # type: ignore[attr-defined]


def test_integers_are_still_refused() -> None:
    with native.only(True), pytest.raises(QsimError, match="floating-point tensors, not torch.int64"):
        qsim.parse("token(int8)").quantize(torch.arange(4))  # type: ignore[attr-defined]


def test_what_was_found_out_about_a_quantizer_goes_with_it() -> None:
    ask = cached_by_identity(lambda quantizer: str(quantizer))
    quantizer = Function(call=lambda x: x)
    gone = weakref.ref(quantizer)

    assert ask(quantizer) == ask(quantizer) == "function(<lambda>)" and ask(None) == "None"
    del quantizer
    assert gone() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("text", [*SCHEMES, "cast(bf16)", "cast(e4m3)"])
def test_the_errors_of_an_audit_are_counted_in_one_pass(text: str, dtype: torch.dtype) -> None:
    quantizer, x = qsim.parse(text), values(dtype)
    y = quantizer.quantize(x)
    with native.only(True):
        fast = quantizing.errors(quantizer, x, y)

    wide, passes = x.double(), quantizer.passes(x)
    expected = (
        float(wide.square().sum()),
        float((wide - y.double()).square().sum()),
        int(((x != 0) & (y == 0)).sum()),
        int((~passes).sum()),
    )
    assert fast == pytest.approx(expected, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("columns", [1, 7, 63, 64, 65, 200])
def test_errors_of_rows_of_any_length_are_added_up(columns: int) -> None:
    quantizer, x = qsim.parse("abfp(int2, n=50)"), torch.randn(3, columns, generator=torch.Generator().manual_seed(0))
    y = quantizer.quantize(x)
    with native.only(True):
        fast = quantizing.errors(quantizer, x, y)

    assert fast is not None
    assert fast[1] == pytest.approx(float((x.double() - y.double()).square().sum()), rel=1e-12)
