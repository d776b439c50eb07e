"""The structure as qsim's transforms and its command use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from families import make, tokens
from qsim_structure import Structure, Use, WeightPair
from qsim_structure.command import structure as command
from qsim_structure.for_transforms import permute_rows, structure_of, trace_example
from torch import Tensor, nn

import qsim_core as qsim


class Look(qsim.Transform):
    """Asks twice for the structure, and changes nothing."""

    name = "look"

    def apply(self, model: nn.Module, context: qsim.Context) -> None:
        found.extend([structure_of(context), structure_of(context)])


found: list[Structure] = []
EXAMPLE = torch.arange(16.0).view(2, 8)


class Counted(nn.Module):
    """A model that counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.runs = nn.LayerNorm(8), nn.Linear(8, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        y: Tensor = self.linear(self.norm(x))
        return y


def look(model: nn.Module, example: Any, structure: Mapping[str, list[str]] | None = None) -> Structure:
    """Run `Look` on a model, which is an error since it changes nothing; return the structure it saw."""
    with pytest.raises(
        qsim.RecipeError, match=r"^look changed nothing in this model: it found nothing to do; `qsim str"
    ):
        qsim.simulate(model, weights="int8", transforms=[Look()], example=example, structure=structure)
    return found[-1]


def test_a_transform_that_asks_twice_gets_one_structure_of_one_trace() -> None:
    twice, once = Counted().eval(), Counted().eval()
    trace_example(once, EXAMPLE)

    structure = look(twice, EXAMPLE)

    assert structure is found[-2]
    assert [group.weights for group in structure.groups] == [["linear.weight"]]
    assert twice.runs == once.runs + 1, "and one run that finds the sites"


def test_a_transform_that_changes_nothing_is_told_where_to_look() -> None:
    with pytest.raises(qsim.RecipeError) as error:
        qsim.simulate(Counted().eval(), weights="int8", transforms=[Look()], example=EXAMPLE)

    assert str(error.value) == (
        "look changed nothing in this model: it found nothing to do; `qsim structure` shows what tracing found, "
        "simulate(…, structure={norm: [weights]}) declares the rest"
    )


def test_the_transform_of_the_readme_folds_the_norm() -> None:
    code = (Path(__file__).parent.parent / "README.md").read_text().split("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {"__name__": "readme"}
    exec(code, names)
    model = Counted().eval()
    nn.init.uniform_(model.norm.weight, 0.5, 2)
    expected = model(EXAMPLE)

    simulation = qsim.simulate(model, outputs="token(int16)", transforms=[names["Spread"]()], example=EXAMPLE)

    assert [report.layer for report in simulation.reports] == ["norm"]
    assert torch.equal(model.norm.weight, torch.ones(8))
    torch.testing.assert_close(model(EXAMPLE), expected, rtol=1e-3, atol=1e-3)


def test_a_declaration_that_does_not_fit_is_an_error_of_qsim() -> None:
    with pytest.raises(qsim.ModelError, match=r"^'nonsense' is declared as a norm, and the model does not run"):
        qsim.simulate(
            Counted().eval(), weights="int8", transforms=[Look()], example=EXAMPLE, structure={"nonsense": []}
        )


def test_an_order_that_does_not_fit_is_an_error_of_qsim() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2))
    first_is_read_twice = Use("1.weight", 1, torch.tensor([0, 0, 1]), scales=True)
    pair = WeightPair("0.weight", 0, (), 2, (first_is_read_twice,), scales=True)

    with pytest.raises(qsim.ModelError, match=r"^1.weight reads some channels more often than those that would"):
        permute_rows(model, pair, torch.tensor([1, 0]))


class Noisy(nn.Module):
    """A model that draws noise from a generator that it is given, as a pipeline that makes images does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor, generator: torch.Generator) -> Any:
        return self.linear(self.norm(x + torch.randn(x.shape, generator=generator)))


def test_every_run_draws_the_same_from_the_generator_of_the_batch() -> None:
    model, generator = Noisy().eval(), torch.Generator().manual_seed(5)
    before = generator.get_state()

    structure = trace_example(model, {"x": torch.ones(2, 8), "generator": generator})

    assert [group.norm for group in structure.groups] == ["norm"]
    assert torch.equal(before, generator.get_state())


def test_a_declaration_takes_the_place_of_the_trace_and_agrees_with_it() -> None:
    model, example = make("opt"), {"input_ids": tokens()}
    declared = qsim.parse("opt").structure(model)

    by_trace, by_declaration = trace_example(model, example), trace_example(model, example, declared)

    assert [(g.norm, g.weights) for g in by_trace.groups] == [(g.norm, g.weights) for g in by_declaration.groups]
    assert {g.norm for g in by_declaration.groups} == set(declared)


def test_of_the_adapters_only_opts_declares_anything() -> None:
    """Another adapter that declares a structure gets a test like the one above."""
    adapters = {name: a for name, of_plugins in qsim.Host().components(qsim.Adapter).items() for _, a in of_plugins}

    declaring = {name for name, a in adapters.items() if a.structure is not qsim.Adapter.structure}  # type: ignore[union-attr]

    assert declaring == {"opt"}


def test_the_command_shows_what_was_found_and_what_was_refused() -> None:
    shown = CliRunner().invoke(command, ["opt-tiny"]).stdout

    assert shown.startswith("opt-tiny: 4 blocks, model.decoder.layers.0 to model.decoder.layers.3\n")
    assert "  model.decoder.layers.0.final_layer_norm -> fc1 (declared)\n" in shown
    assert "  model.decoder.layers.0.fc1 -> fc2 (scaled too)\n" in shown
    assert "  model.decoder.layers.0.self_attn: 4 heads of 64; q q_proj, k k_proj, v v_proj -> out_proj\n" in shown
    assert "refused\n  model.decoder.final_layer_norm: model.decoder.embed_tokens.weight is also read by" in shown


def test_the_command_prints_json() -> None:
    data = json.loads(CliRunner().invoke(command, ["--json"]).stdout)

    assert data["attention"][0]["outputs"] == ["model.decoder.layers.0.self_attn.out_proj.weight"]
    assert data["ordered"] == []
    assert (len(data["blocks"]), len(data["groups"]), len(data["pairs"]), len(data["refused"])) == (4, 8, 8, 1)
