"""The suite of hook `qsim_quantizers`: number formats and schemes."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from qsim_core.components.component import Component
from qsim_core.formats.format import Format
from qsim_core.formats.quantizer import Quantizer
from qsim_core.simulation.simulation import simulate
from qsim_core.testing.both_ways import WAYS, computed
from qsim_core.testing.component import ComponentSuite, global_randomness_untouched, identical, noise
from qsim_core.testing.model import batches, gradients, language_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class QuantizerSuite(ComponentSuite):
    """`quantize(x)` gives a tensor like `x`, for whatever may come in, and leaves `x` alone."""

    base: ClassVar[type[Component]] = Quantizer
    shapes: ClassVar[Sequence[tuple[int, ...]]] = ((), (33,), (6, 40), (3, 5, 33), (2, 2, 3, 8))
    """Of tensors that it takes, the reduction axis last."""

    @pytest.fixture(params=WAYS)
    def both_ways(self, request: pytest.FixtureRequest) -> Iterator[str]:
        """Run the test with the installed accelerators, and from the reference; the arithmetic."""
        with computed(request.param) as arithmetic:
            yield arithmetic

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
    @pytest.mark.usefixtures("both_ways")
    def test_shape_dtype_and_device_are_kept_and_the_input_too(
        self, component: Any, dtype: torch.dtype, device: str
    ) -> None:
        for shape in self.shapes:
            x = noise(*shape, dtype=dtype).to(device)
            before = x.clone()

            y = component.quantize(x)

            expected, found = ((tuple(t.shape), t.dtype, t.device) for t in (x, y))
            assert found == expected, f"{component} made {found} of {expected}"
            assert identical(x, before), f"{component} changed its input; quantize(x) leaves x alone"

    @pytest.mark.usefixtures("both_ways")
    def test_the_order_in_memory_is_kept(self, component: Any) -> None:
        x = noise(40, 6).T

        y = component.quantize(x)

        assert y.stride() == x.stride(), f"{component} made strides {y.stride()} of {x.stride()}"

    @pytest.mark.parametrize("steps", [(2, 1), (1, 3)], ids=["rows", "columns"])
    @pytest.mark.usefixtures("both_ways")
    def test_a_view_is_rounded_like_its_copy(self, component: Any, steps: tuple[int, int]) -> None:
        x = noise(8, 60)[:: steps[0], :: steps[1]]

        assert identical(component.quantize(x), component.quantize(x.clone())), (
            f"{component} rounds a tensor that is not contiguous differently"
        )

    @pytest.mark.usefixtures("both_ways")
    def test_it_gives_the_same_each_time_and_draws_no_global_random_numbers(self, component: Any) -> None:
        x = noise(6, 40)

        with global_randomness_untouched(component, "rounds"):
            first, again = component.quantize(x), component.quantize(x)

        assert identical(first, again), f"{component} gives something else the second time"

    @pytest.mark.usefixtures("both_ways")
    def test_bfloat16_is_rounded_by_its_value(self, component: Any) -> None:
        """The arithmetic is float32's; what comes in and goes out may be narrower."""
        x = noise(6, 40, dtype=torch.bfloat16)

        y = component.quantize(x)

        assert identical(y, component.quantize(x.float()).to(torch.bfloat16)), (
            f"{component} computes in bfloat16; start from x.float() and end in .to(x.dtype)"
        )

    @pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)], ids=str)
    def test_an_empty_tensor_stays_empty(self, component: Any, shape: tuple[int, ...]) -> None:
        y = component.quantize(torch.empty(shape))

        assert y.shape == shape, f"{component} made {tuple(y.shape)} of an empty tensor {shape}"

    @pytest.mark.usefixtures("both_ways")
    def test_zeros_stay_zeros(self, component: Any) -> None:
        if _only_for_scales(component):
            pytest.skip("this format holds no zero")

        y = component.quantize(torch.zeros(4, 33))

        assert torch.equal(y, torch.zeros(4, 33)), f"{component} made {y.unique().tolist()} of zeros"

    @pytest.mark.usefixtures("both_ways")
    def test_nan_stays_nan(self, component: Any) -> None:
        x = noise(4, 33)
        x[1, 2] = torch.nan

        y = component.quantize(x)

        assert y[1, 2].isnan(), f"{component} made {y[1, 2].item()} of NaN; a simulation must show it"

    @pytest.mark.usefixtures("both_ways")
    def test_infinity_does_not_become_small(self, component: Any) -> None:
        x = noise(4, 33)
        x[1, 2] = torch.inf

        y = component.quantize(x)[1, 2]

        assert y.isnan() or y > 0, f"{component} made {y.item()} of Inf; saturate, or show it as Inf or NaN"

    @pytest.mark.usefixtures("both_ways")
    def test_rows_that_it_says_are_apart_are_apart(self, component: Any) -> None:
        if not component.by_rows:
            pytest.skip("it does not promise to round row by row")
        x = noise(6, 40)

        apart = torch.cat([component.quantize(row) for row in x.split(1)])

        assert identical(component.quantize(x), apart), f"{component}.by_rows is true, and a row depends on the others"

    def test_bits_are_counted_or_unknown(self, component: Any) -> None:
        bits = component.bits_per_element(torch.Size([6, 40]))

        assert bits is None or 0 < bits < 100, f"{component}.bits_per_element gave {bits}; None means unknown"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    @pytest.mark.usefixtures("both_ways")
    def test_codes_stand_for_what_it_rounds_to(self, component: Any, dtype: torch.dtype) -> None:
        if type(component).encode is Quantizer.encode:
            pytest.skip("it has no codes")
        x = noise(6, 40)
        if isinstance(component, Format):
            x = x.clamp(component.min, component.max)
        x = x.to(dtype)

        encoded = component.encode(x)

        assert identical(component.decode(encoded), component.quantize(x)), (
            f"{component}.decode(encode(x)) is not what quantize(x) gives"
        )

    @pytest.mark.usefixtures("both_ways")
    def test_the_gradient_passes_straight_through(self, component: Any) -> None:
        """One where `passes`, zero elsewhere (Bengio et al., arXiv 1308.3432)."""
        x, gradient = noise(6, 40).requires_grad_(), noise(6, 40, seed=1)

        y = component(x)
        y.backward(gradient)

        passes = component.passes(x.detach())
        expected = gradient if passes is None else torch.where(passes, gradient, 0.0)
        assert identical(y.detach(), component.quantize(x.detach())), f"{component} rounds otherwise under a gradient"
        assert isinstance(x.grad, Tensor) and identical(x.grad, expected), (
            f"the gradient through {component} is not one where passes(x) and zero elsewhere"
        )

    def test_a_simulated_model_pickles_recomputes_and_is_restored(self, component: Any, both_ways: str) -> None:
        """Weights and activations: a copy computes the same, gradient checkpointing has the same gradients."""
        if _only_for_scales(component):
            pytest.skip("this format holds no zero: it is for scales")
        model, batch = language_model(blocks=1), batches(1)[0]
        with torch.no_grad():
            exact = model(**batch).logits

        parts = {"weights": component, "activations": component, "arithmetic": both_ways}
        simulation = simulate(model, **parts, example=batch)

        with torch.no_grad():
            y, copied = model(**batch).logits, pickle.loads(pickle.dumps(model))(**batch).logits
        plain = gradients(model, batch)
        model.checkpointing = True
        recomputed = gradients(model, batch)
        simulation.restore()
        with torch.no_grad():
            restored = model(**batch).logits
        assert identical(copied, y), f"a pickled model with {component} computes something else"
        assert plain.keys() == recomputed.keys() and all(identical(recomputed[n], g) for n, g in plain.items()), (
            f"gradient checkpointing changes the gradients under {component}"
        )
        assert identical(restored, exact), f"a model is not what it was after {component} was taken away"


def _only_for_scales(component: Quantizer) -> bool:
    return isinstance(component, Format) and component.min > 0
