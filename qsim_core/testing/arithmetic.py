"""The suite of hook `qsim_arithmetics`: how a product is multiplied and added up."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from qsim_core.components.component import Component
from qsim_core.components.host import installed
from qsim_core.formats.quantizer import Quantizer
from qsim_core.formats.random_bits import at
from qsim_core.simulation.simulation import simulate
from qsim_core.sites.arithmetic import Arithmetic, QuantizedRows
from qsim_core.testing.component import ComponentSuite, global_randomness_untouched, identical, noise
from qsim_core.testing.model import batches, gradients, language_model, scaled

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


class Product(nn.Module):
    """A product with a weight, which may be empty."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class ArithmeticSuite(ComponentSuite):
    """`multiply(left, right)` gives the products of rows, in their dtype, and leaves them alone."""

    base: ClassVar[type[Component]] = Arithmetic
    weights: ClassVar[str] = ""
    """The text of a quantizer of weights that it takes; empty: integers of 8 bits under a scale for each row."""
    activations: ClassVar[str] = ""
    """The same of activations."""
    shapes: ClassVar[Sequence[tuple[tuple[int, ...], tuple[int, ...]]]] = (
        ((6, 40), (5, 40)),
        ((1, 33), (1, 33)),
        ((3, 6, 40), (5, 40)),
        ((2, 1, 6, 40), (3, 5, 40)),
    )
    """Of rows [.., M, K] and [.., N, K]; leading axes are broadcast."""

    def quantizers(self) -> tuple[Quantizer, Quantizer]:
        """The quantizers of activations and of weights."""
        texts = {"token": self.activations, "channel": self.weights}
        found = (installed().parse(text, Quantizer) if text else scaled(8, block) for block, text in texts.items())  # type: ignore[arg-type]
        activations, weights = found
        return activations, weights

    def operands(self, *tensors: Tensor) -> list[QuantizedRows]:
        """Quantize rows of activations and of a weight."""
        return [QuantizedRows.of(*pair) for pair in zip(self.quantizers(), tensors, strict=True)]

    def product(self, component: Any, left: Tensor, right: Tensor, step: int = 0) -> Tensor:
        """The product of rows, as the call of this count draws random numbers."""
        with at("suite", step):
            product: Tensor = component.multiply(*self.operands(left, right))
        return product

    def test_it_takes_these_quantizers(self, component: Any) -> None:
        try:
            component.check(self.quantizers())
        except Exception as error:
            stand = " and ".join(map(str, self.quantizers()))
            say = "say activations and weights that it takes"
            pytest.fail(f"{component} refuses {stand}: {error}; {say}", pytrace=False)

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
    def test_rows_by_rows_are_a_matrix_in_their_dtype(self, component: Any, dtype: torch.dtype) -> None:
        for left, right in self.shapes:
            expected = (*torch.broadcast_shapes(left[:-2], right[:-2]), left[-2], right[-2])

            y = self.product(component, noise(*left, dtype=dtype), noise(*right, seed=1, dtype=dtype))

            found = f"{component} made {tuple(y.shape)} {y.dtype} of {left} and {right} {dtype}"
            assert (tuple(y.shape), y.dtype) == (expected, dtype), f"{found}; expected {expected} {dtype}"

    def test_the_operands_are_left_alone(self, component: Any) -> None:
        operands = self.operands(noise(6, 40), noise(5, 40, seed=1))
        before = [operand.values.clone() for operand in operands]

        component.multiply(*operands)

        same = [identical(operand.values, values) for operand, values in zip(operands, before, strict=True)]
        assert all(same), f"{component} changed its operands; multiply(left, right) leaves them alone"

    def test_it_gives_the_same_each_time_and_draws_no_global_random_numbers(self, component: Any) -> None:
        x, w = noise(6, 40), noise(5, 40, seed=1)

        with global_randomness_untouched(component, "multiplies"):
            first, again = self.product(component, x, w), self.product(component, x, w)

        assert identical(first, again), f"{component} gives something else the second time"

    def test_rows_that_are_not_contiguous_are_multiplied_like_their_copy(self, component: Any) -> None:
        x, w = noise(6, 80)[:, ::2], noise(40, 5, seed=1).T

        y, copied = self.product(component, x, w), self.product(component, x.contiguous(), w.contiguous())

        assert torch.allclose(y, copied, rtol=1e-5, atol=1e-5), (
            f"{component} multiplies rows that are not contiguous differently"
        )

    def test_batches_are_multiplied_one_by_one(self, component: Any) -> None:
        """The same to a relative 10^-5, as a sum may be taken in another order."""
        x, w = noise(3, 6, 40), noise(3, 5, 40, seed=1)
        if not identical(self.product(component, x, w), self.product(component, x, w, step=1)):
            pytest.skip("it draws random numbers, which depend on the place in a batch")

        together = self.product(component, x, w)

        apart = torch.stack([self.product(component, *pair) for pair in zip(x, w, strict=True)])
        assert torch.allclose(together, apart, rtol=1e-5, atol=1e-5), f"{component}: a batch depends on the others"

    def test_nan_shows(self, component: Any) -> None:
        x = noise(6, 40)
        x[1, 2] = torch.nan

        y = self.product(component, x, noise(5, 40, seed=1))

        assert y[1].isnan().all(), f"{component} made {y[1].tolist()} of a row with NaN; a simulation must show it"

    @pytest.mark.parametrize("sizes", [(0, 5, 40), (6, 0, 40), (6, 5, 0)], ids=str)
    def test_a_product_of_nothing_is_computed(self, component: Any, sizes: tuple[int, int, int]) -> None:
        rows, columns, length = sizes
        model = Product(torch.ones(columns, length))
        self._simulate(model, component)

        with torch.no_grad():
            y = model(torch.ones(rows, length))

        assert torch.equal(y, torch.zeros(rows, columns)), f"{component} made {y.tolist()} of {sizes}"

    def test_its_gradient_is_that_of_the_float32_product(self, component: Any) -> None:
        found = []
        for arithmetic in ("float32", component):
            model, x = Product(noise(8, 40, seed=1)).train(), noise(6, 40).requires_grad_()
            self._simulate(model, arithmetic)
            model(x).backward(noise(6, 8, seed=2))
            found.append((x.grad, model.weight.grad))

        same = [torch.equal(plain, through) for plain, through in zip(*found, strict=True)]
        assert all(same), f"the gradient under {component} is not that of the float32 product"

    def test_a_simulated_model_pickles_recomputes_and_is_restored(self, component: Any) -> None:
        """A copy computes the same, gradient checkpointing has the same gradients, the audit names the arithmetic."""
        model, batch = language_model(blocks=1), batches(1, length=5)[0]
        with torch.no_grad():
            exact = model(**batch).logits
        simulation = self._simulate(model, component, example=batch)
        copied, recomputing = (pickle.loads(pickle.dumps(model)) for _ in range(2))
        recomputing.checkpointing = True

        with torch.no_grad():
            y, again = model(**batch).logits, copied(**batch).logits
        named = {site.arithmetic for site in simulation.audit().sites}
        plain, recomputed = gradients(copied, batch), gradients(self._ahead(recomputing, batch), batch)
        simulation.restore()
        with torch.no_grad():
            restored = model(**batch).logits

        assert y.isfinite().all(), f"a model under {component} gives NaN or Inf"
        assert identical(again, y), f"a pickled model under {component} computes something else"
        assert not component.simulates or named == {str(component)}, f"under {component} the audit says {named}"
        assert plain.keys() == recomputed.keys() and all(identical(recomputed[n], g) for n, g in plain.items()), (
            f"gradient checkpointing changes the gradients under {component}"
        )
        assert identical(restored, exact), f"a model is not what it was after {component} was taken away"

    @staticmethod
    def _ahead(model: nn.Module, batch: Any) -> nn.Module:
        """The model after one call, as random numbers depend on the count of calls."""
        with torch.no_grad():
            model(**batch)
        return model

    def _simulate(self, model: nn.Module, arithmetic: Any, **options: Any) -> Any:
        activations, weights = self.quantizers()
        return simulate(model, weights=weights, activations=activations, arithmetic=arithmetic, **options)
