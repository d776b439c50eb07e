"""In every family, every matmul is met exactly once, and the products that cannot be met are listed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FAMILIES, build
from coverage_page import audit_of, page
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import qsim_core as qsim
from qsim_core.simulation.audit import PRODUCTS
from qsim_core.transforms.forward import as_in_evaluation, call

COUNTED = {op.__name__ for op in flop_registry if hasattr(op, "overloads") and "backward" not in op.__name__}
"""torch's own list of its operators that multiply matrices.

`UNCOUNTED` has more: operators that run only on a CPU, or are not in the list.
"""
UNCOUNTED = {"_grouped_mm", "_scaled_dot_product_flash_attention_for_cpu", "dot", "mv"}


class Products(TorchDispatchMode):
    """Counts the matrix products that torch computes, by the path of the module that is running."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.found: Counter[str] = Counter()
        for path, module in model.named_modules():
            module.register_forward_pre_hook(lambda module, args, path=path: self.stack.append(path))
            module.register_forward_hook(lambda module, args, output: self.stack.pop() and None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in COUNTED | UNCOUNTED:
            self.found[self.stack[-1]] += 2 if "attention" in name else 1
        return func(*args, **(kwargs or {}))


@contextmanager
def no_fused_layers() -> Iterator[None]:
    """Make `nn.TransformerEncoderLayer` compute its parts one by one; in evaluation it is one operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def leaves(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of an output: in dictionaries, lists and tuples."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict | list | tuple):
        for item in output.values() if isinstance(output, dict) else output:
            yield from leaves(item)


def outputs(model: nn.Module, name: str) -> list[Tensor]:
    with as_in_evaluation(model):
        return [t.clone() for t in leaves(call(model, FAMILIES[name].example)) if t.is_floating_point()]


def identity(x: Tensor) -> Tensor:
    return x


def test_there_are_more_than_thirty() -> None:
    assert len(FAMILIES) > 50


def test_the_audit_knows_all_that_torch_counts() -> None:
    assert set() == COUNTED - PRODUCTS


@pytest.mark.parametrize("name", FAMILIES)
def test_every_product_is_met_exactly_once(name: str) -> None:
    plain, model, met = build(name), build(name), Counter[str]()
    with no_fused_layers(), as_in_evaluation(plain), Products(plain) as products:
        call(plain, FAMILIES[name].example)
    simulation = qsim.simulate(model)
    simulation.sites.watcher = lambda site, product: met.update([simulation.sites.stack.frames[-1].path])

    outputs(model, name)

    assert met == products.found
    assert sum(site.calls for site in simulation.sites.table.values()) == met.total()


@pytest.mark.parametrize("name", FAMILIES)
def test_identity_changes_nothing_and_int8_does(name: str) -> None:
    model = build(name)
    exact = outputs(model, name)

    with qsim.simulate(model, weights=identity, activations=identity, outputs=identity):
        same = outputs(model, name)
    with qsim.simulate(model, weights="int8", activations="int8"):
        rounded = outputs(model, name)

    assert all((x - y).abs().max() <= 1e-5 * y.abs().max() for x, y in zip(same, exact, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(rounded, exact, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_cannot_be_met_is_listed(name: str) -> None:
    audit = audit_of(name)

    assert audit.uncovered == list(FAMILIES[name].uncovered)
    assert audit.covered == audit.found - len(audit.uncovered)


def test_the_page_says_what_is_so() -> None:
    path = Path(__file__).parent.parent / "docs" / "coverage.md"

    assert path.read_text() == page(), "python tests/coverage_page.py > docs/coverage.md"
