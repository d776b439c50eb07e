"""Each question about a quantizer has one property, and a preset answers as the component that it stands for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.formats.quantizer import SiteQuantizer
from qsim_core.quantizers.stacked import Stacked

ROOT = Path(__file__).parent.parent
QUESTIONS = ("draws", "learns", "by_rows", "granularity", "sharing", "rounds_to", "unscaled")
HOST = qsim.Host()
HOST.register(
    qsim.Preset("sr4", "int(4, rounding=stochastic)"),
    qsim.Preset("fixed8", "tensor(int8, static=true)"),
    qsim.Preset("trained8", "tensor(int8, gradient=lsq)"),
)
SPELLED_OUT = {
    "sr4": "int(4, rounding=stochastic)",
    "token(sr4)": "token(int(4, rounding=stochastic))",
    "cast(sr4)": "cast(int(4, rounding=stochastic))",
    "block(int4, 8, scale=cast(e4m3(rounding=stochastic)))": "block(int(4), 8, scale=cast(e4m3(rounding=stochastic)))",
    "fixed8": "tensor(int8, static=true)",
    "trained8": "tensor(int8, gradient=lsq)",
}


def answers(quantizer: SiteQuantizer) -> dict[str, object]:
    held = {role: quantizer.needs_held_scales(role) for role in ("input", "weight", "output")}
    return held | {question: getattr(quantizer, question) for question in QUESTIONS if hasattr(quantizer, question)}


@pytest.mark.parametrize("preset", SPELLED_OUT)
def test_a_preset_answers_as_the_component_that_it_stands_for(preset: str) -> None:
    assert answers(HOST.parse(preset)) == answers(HOST.parse(SPELLED_OUT[preset]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("token(sr4)", {"draws": True, "learns": False, "by_rows": True, "input": False}),
        ("block(int4, 8, scale=cast(e4m3(rounding=stochastic)))", {"draws": True, "by_rows": True}),
        ("fixed8", {"draws": False, "input": True, "weight": False, "by_rows": False}),
        ("trained8", {"learns": True, "input": True, "weight": True}),
    ],
)
def test_the_answers(text: str, expected: dict[str, object]) -> None:
    found = answers(HOST.parse(text))

    assert {question: found[question] for question in expected} == expected


def test_experts_answer_for_each_of_them() -> None:
    each = HOST.parse("tensor(sr4)")
    stacked = Stacked(each=each)

    assert (stacked.draws, stacked.granularity, stacked.rounds_to) == (True, "tensor", each.element)


class Attention(nn.Module):
    """Fused attention, large enough to be computed by tiles."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


@pytest.mark.parametrize("text", ["token(sr4)", "cast(sr4)"])
def test_attention_under_a_preset_is_that_under_what_it_stands_for(text: str) -> None:
    x = 4 * torch.randn(2, 4, 160, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for activations in (text, SPELLED_OUT[text]):
        model = Attention()
        qsim.simulate(model, activations=HOST.parse(activations), example=x)
        with torch.no_grad():
            found += [model(x), model(x)]

    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])  # each call draws anew


LOOKING = frozenset({"startswith", "endswith", "find", "index", "count"})
OTHER_TEXTS = frozenset({"equation", "error", "spec.origin", "array.dtype"})
"""Arguments of `str` that are not components."""


def decisions(tree: ast.AST) -> Iterator[ast.Call]:
    """Give each `str(…)` that is compared, or looked into."""
    for node in ast.walk(tree):
        looked_at: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            looked_at = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOOKING:
            looked_at = [node.func.value]
        for part in looked_at:
            if isinstance(part, ast.Call) and ast.unparse(part.func) in ("str", "repr"):
                yield part


def sources() -> list[Path]:
    """The modules of the core and of the plugins, without the suites, whose subject is a component's text."""
    found = [*(ROOT / "qsim_core").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]
    return [path for path in found if not {"testing", "tests"} & set(path.relative_to(ROOT).parts)]


def test_no_module_decides_on_the_text_of_a_component() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}"
        for path in sources()
        for call in decisions(ast.parse(path.read_text(encoding="utf-8")))
        if not call.args or ast.unparse(call.args[0]) not in OTHER_TEXTS
    ]

    assert found == []


@pytest.mark.parametrize(
    "source", ['"stochastic" in str(scheme)', "str(site.quantizer) == other", 'str(scheme).startswith("abfp")']
)
def test_such_a_decision_is_found(source: str) -> None:
    assert len(list(decisions(ast.parse(source)))) == 1
