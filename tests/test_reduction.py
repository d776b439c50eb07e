"""docs/numerics.md names every operator that is met. A quantizer sees the axis of its sum last."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import qsim_core as qsim
from qsim_core.matmuls.attention import EXPLICIT
from qsim_core.matmuls.operators import OPS

PAGE = (Path(__file__).parent.parent / "docs" / "numerics.md").read_text()
K = 5
x, w, batched, other = torch.randn(3, K), torch.randn(7, K), torch.randn(2, 3, K), torch.randn(2, K, 7)
image, kernel = torch.randn(2, 4, 6), torch.randn(7, 4, 3)
CALLS: dict[str, tuple[Callable[[], Any], list[tuple[int, ...]]]] = {
    "linear": (lambda: F.linear(x, w), [(3, K), (7, K)]),
    "matmul": (lambda: batched @ other, [(2, 3, K), (2, 7, K)]),
    "mm": (lambda: x.mm(w.T), [(3, K), (7, K)]),
    "bmm": (lambda: torch.bmm(batched, other), [(2, 3, K), (2, 7, K)]),
    "mv": (lambda: torch.mv(x, w[0]), [(3, K), (K,)]),
    "addmv": (lambda: torch.addmv(torch.ones(3), x, w[0]), [(3, K), (K,)]),
    "dot": (lambda: torch.dot(x[0], w[0]), [(K,), (K,)]),
    "inner": (lambda: torch.inner(x, w), [(3, K), (7, K)]),
    "vecdot": (lambda: torch.linalg.vecdot(x, x), [(3, K), (3, K)]),
    "addmm": (lambda: torch.addmm(torch.ones(7), x, w.T), [(3, K), (7, K)]),
    "baddbmm": (lambda: torch.baddbmm(torch.ones(2, 3, 7), batched, other), [(2, 3, K), (2, 7, K)]),
    "addbmm": (lambda: torch.addbmm(torch.ones(3, 7), batched, other), [(3, 2 * K), (7, 2 * K)]),
    "einsum": (lambda: torch.einsum("akb,kc->abc", batched.mT, w.T), [(2, 3, K), (7, K)]),
    "tensordot": (lambda: torch.tensordot(x, w, dims=([1], [1])), [(3, K), (7, K)]),
    "multi_dot": (lambda: torch.linalg.multi_dot([x[0], w.T, w]), [(K,), (7, K), (7,), (K, 7)]),
    "chain_matmul": (lambda: torch.chain_matmul(x, w.T), [(3, K), (7, K)]),
    "vdot": (lambda: torch.vdot(x[0], w[0]), [(K,), (K,)]),
    "conv_tbc": (lambda: torch.conv_tbc(image.permute(2, 0, 1), kernel.permute(2, 1, 0), torch.zeros(7)),
                 [(2, 1, 6, 4), (1, 7, 12)]),
    "conv1d": (lambda: F.conv1d(image, kernel), [(2, 1, 6, 4), (1, 7, 12)]),
    "conv2d": (lambda: F.conv2d(image[..., None], kernel[..., None], groups=1), [(2, 1, 6, 1, 4), (1, 7, 12)]),
    "conv3d": (lambda: F.conv3d(torch.ones(2, 4, 6, 1, 1), torch.ones(6, 2, 3, 1, 1), groups=2),
               [(2, 2, 12), (2, 3, 6)]),
    "conv_transpose1d": (lambda: F.conv_transpose1d(image, torch.ones(4, 7, 3)), [(2, 1, 6, 4), (1, 7, 12)]),
    "conv_transpose2d": (lambda: F.conv_transpose2d(image[..., None], torch.ones(4, 7, 3, 1)),
                         [(2, 1, 6, 1, 4), (1, 7, 12)]),
    "conv_transpose3d": (lambda: F.conv_transpose3d(torch.ones(2, 4, 6, 1, 1), torch.ones(4, 3, 3, 1, 1), groups=2),
                         [(2, 2, 12), (2, 3, 6)]),
    "scaled_dot_product_attention": (
        lambda: F.scaled_dot_product_attention(batched, torch.ones(2, 4, K), torch.ones(2, 4, 9)),
        [(2, 3, K), (2, 4, K), (2, 3, 4), (2, 9, 4)]),
}  # fmt: skip
ELSEWHERE = {"grouped_mm": "test_sites: experts", "multi_head_attention_forward": "test_sites: MultiheadAttention"}


class Calls(torch.nn.Module):
    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self) -> Any:
        return self.function()


@pytest.mark.parametrize("name", CALLS)
def test_the_axis_that_is_summed_over_comes_last(name: str) -> None:
    function, expected = CALLS[name]
    seen: list[tuple[int, ...]] = []

    def watch(operand: Tensor) -> Tensor:
        seen.append(tuple(operand.shape))
        return operand

    model = Calls(function)
    qsim.simulate(model, activations=watch)
    model()

    assert seen == expected


def test_the_page_names_every_op_that_is_met() -> None:
    (section,) = re.findall(r"^## The reduction axis\n(.*?)^## ", PAGE, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
    met = {f.__name__.strip("_").removeprefix("linalg_").replace("rmatmul", "matmul") for f in (*OPS, *EXPLICIT)}

    named = {re.sub(r"\(.*", "", name) for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert named == {*met, "einsum", "@"} == {*CALLS, *ELSEWHERE, "@"}
