"""Queries, keys, probabilities and values of attention have quantizers of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.cli.main import main

ROLES = ("queries", "keys", "probabilities", "values")


class Attention(nn.Module):
    """Attention of 4 heads, written in several ways; keys and values have 2 heads in `gqa`."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.way in ("fused", "gqa"):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=self.way == "gqa")
        if self.way == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
            return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        return torch.matmul(scores.softmax(-1), v)


WAYS = ("fused", "gqa", "eager", "einsum")


def operands(way: str) -> tuple[Tensor, Tensor, Tensor]:
    heads = (4, 2, 2) if way == "gqa" else (4, 4, 4)
    q, k, v = (torch.randn(2, n, 6, 8, generator=torch.Generator().manual_seed(seed)) for seed, n in enumerate(heads))
    return q, k, v


def quantized(x: Tensor) -> Tensor:
    """A coarse quantizer of single elements."""
    return (2 * x).round() / 2


def by_hand(way: str, *roles: str) -> Tensor:
    """Attention with these operands quantized."""
    q, k, v = operands(way)
    if way == "gqa":
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    q, k, v = (quantized(x) if role in roles else x for role, x in (("queries", q), ("keys", k), ("values", v)))
    p = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1)
    return (quantized(p) if "probabilities" in roles else p) @ v


def simulated(way: str, recipe: dict[str, Any], **options: Any) -> tuple[Tensor, qsim.Simulation]:
    model, x = Attention(way), operands(way)
    simulation = qsim.simulate(model, recipe, example=x, **options)
    with torch.no_grad():
        return model(*x), simulation


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("role", ROLES)
def test_each_role_reaches_its_operand_and_no_other(way: str, role: str) -> None:
    y, _ = simulated(way, {role: quantized})

    assert torch.allclose(y, by_hand(way, role), atol=1e-6)
    assert not torch.allclose(y, by_hand(way), atol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_kv_cache_is_keys_and_values(way: str) -> None:
    y, simulation = simulated(way, {"kv_cache": quantized})

    assert torch.allclose(y, by_hand(way, "keys", "values"), atol=1e-6)
    assert simulation.recipe.keys == simulation.recipe.values


@pytest.mark.parametrize("role", ROLES)
def test_what_is_not_said_is_that_of_activations_and_none_leaves_alone(role: str) -> None:
    others = [other for other in ROLES if other != role]

    all_four, _ = simulated("fused", {"activations": quantized})
    but_one, _ = simulated("fused", {"activations": quantized, role: None})

    assert torch.allclose(all_four, by_hand("fused", *ROLES), atol=1e-6)
    assert torch.allclose(but_one, by_hand("fused", *others), atol=1e-6)


class Blocks(nn.Module):
    """Two attentions, `a` and `b`, between matrices."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Linear(8, 8)
        self.a, self.b = Attention("fused"), Attention("eager")

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).unsqueeze(1)
        return self.b(y, y, self.a(y, y, y))


X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


def formats(simulation: qsim.Simulation) -> dict[str, list[str | None]]:
    """The quantizers of both operands, by the site's last alias or name."""
    planned = {(site.aliases or [site.name])[-1]: site for site in simulation.sites.table.values()}
    return {
        name: [None if (q := site.planned(role)) is None else str(q) for role in site.input_roles]
        for name, site in planned.items()
    }


def test_overrides_say_roles_too() -> None:
    recipe = {
        "activations": "int8",
        "keys": "int4",
        "overrides": {"b:qk": {"keys": None, "queries": "int6"}, "a:*": {"kv_cache": "e4m3"}},
    }
    simulation = qsim.simulate(Blocks(), recipe, example=X)

    assert formats(simulation) == {
        "first": ["token(int8)"],
        "a:qk": ["token(int8)", "token(e4m3)"],
        "a:pv": ["token(int8)", "token(e4m3)"],
        "b:qk": ["token(int6)", None],
        "b:pv": ["token(int8)", "token(int8)"],
    }


def test_a_role_of_an_override_wins_over_the_recipes_and_its_activations_do_not() -> None:
    """A key that an override leaves out stays as it was."""
    recipe = {"activations": "int8", "keys": "int4", "overrides": {"*:qk": {"activations": "int6"}}}

    found = formats(qsim.simulate(Blocks(), recipe, example=X))

    assert found["a:qk"] == ["token(int6)", "token(int4)"]
    assert found["a:pv"] == ["token(int8)", "token(int8)"]


def test_the_audit_measures_each_role_by_name() -> None:
    recipe = {"queries": "int8", "keys": "int4", "probabilities": "int6", "values": "int3"}
    simulation = qsim.simulate(Blocks(), recipe, example=X)

    audit = {(site.aliases or [site.site])[-1]: site for site in simulation.audit().sites}

    assert audit["a:qk"].measured.keys() == {"input", "queries", "keys"}
    assert audit["a:pv"].measured.keys() == {"input", "probabilities", "values"}
    assert audit["first"].measured.keys() == set()
    assert audit["a:qk"].measured["queries"].sqnr_db > audit["a:qk"].measured["keys"].sqnr_db + 15  # type: ignore[operator]
    assert audit["a:pv"].input == "token(int6), token(int3)"


def test_static_scales_for_keys_alone() -> None:
    recipe = {"activations": "int8", "keys": "tensor(int8, static=true)"}
    simulation = qsim.simulate(Blocks(), recipe, calibration=[X, 2 * X])

    held = {name: set(site.fixed) for name, site in simulation.sites.table.items() if site.fixed}

    assert held == {"a:matmul.0": {"input2"}, "b:matmul.0": {"input2"}}


def test_saved_scales_of_keys_are_loaded_under_the_same_recipe_and_no_other() -> None:
    recipe = {"keys": "tensor(int8, static=true)"}
    model = Blocks()
    simulation = qsim.simulate(model, recipe, calibration=[X])
    state = simulation.state_dict()
    with torch.no_grad():
        y = model(X)
    simulation.restore()

    qsim.simulate(model, recipe, example=X, state=state)

    with torch.no_grad():
        assert torch.equal(model(X), y)
    with pytest.raises(qsim.QsimError, match="^the saved state lacks a:matmul.1:input2; it was saved under another"):
        qsim.simulate(Blocks(), {"kv_cache": "tensor(int8, static=true)"}, example=X, state=state)


@pytest.mark.parametrize(
    "recipe",
    [
        {"activations": "int8", "keys": "int4"},
        {"activations": "int8", "values": None},
        {"activations": "int8", "kv_cache": None},
        {"queries": "int8", "overrides": {"a:qk": {"queries": None}, "*:pv": {"kv_cache": "int4"}}},
    ],
)
def test_a_recipe_in_text_and_in_a_record_plans_the_same(recipe: dict[str, Any]) -> None:
    said = qsim.Recipe.of(recipe)
    names = ["first"], ["a:matmul.0", "a:qk"], ["a:matmul.1", "a:pv"], ["b:matmul.1", "b:pv"]

    for again in (qsim.Recipe.from_yaml(said.to_yaml()), qsim.Recipe.of(json.loads(json.dumps(said.record())))):
        assert [again.plan(name) for name in names] == [said.plan(name) for name in names]


@pytest.mark.parametrize("key", ["keys", "values"])
def test_kv_cache_beside_one_of_its_two_is_an_error(key: str) -> None:
    for where in ({}, {"overrides": {"*": {"kv_cache": "int4", key: "int8"}}}):
        recipe = where or {"kv_cache": "int4", key: None}
        with pytest.raises(qsim.RecipeError, match=f"kv_cache says keys and values; leave {key} out$"):
            qsim.Recipe.of(recipe)


def test_a_role_that_no_site_has_is_an_error() -> None:
    with pytest.raises(qsim.RecipeError, match=r"^keys: token\(int8\) reached no site of this model$"):
        qsim.simulate(nn.Linear(4, 4), {"keys": "int8"}, example=torch.ones(1, 4))


@pytest.mark.parametrize("recipe", [{"keys": "int8"}, {"queries": "int8"}])
def test_eager_attention_without_an_example_is_one_line(recipe: dict[str, str]) -> None:
    model, x = Attention("eager"), operands("eager")
    qsim.simulate(model, recipe)

    with pytest.raises(qsim.RecipeError) as error:
        model(*x)

    assert str(error.value) == (
        "the recipe names ':qk', which is only known after a forward pass; give simulate an example"
    )


def test_one_quantizer_for_all_needs_no_example() -> None:
    model, x = Attention("eager"), operands("eager")
    qsim.simulate(model, {"activations": quantized})

    with torch.no_grad():
        assert torch.allclose(model(*x), by_hand("eager", *ROLES), atol=1e-6)


def test_qsim_evaluate_takes_and_shows_them(tmp_path: Path) -> None:
    """The command, its table, its JSON, and the same run from its own record."""
    command = ["evaluate", "opt-tiny", "--precision", "w8a8", "--kv-cache", "int4", "--limit", "1"]
    file = tmp_path / "result.json"

    outcome = CliRunner().invoke(main, [*command, "--json", str(file)])
    again = CliRunner().invoke(main, ["evaluate", "--from", str(file), "--json", "-", "--quiet"])

    assert (outcome.exit_code, again.exit_code) == (0, 0), outcome.output + again.output
    result = qsim.Result.model_validate_json(file.read_text())
    assert (result.recipe["keys"], result.recipe["values"]) == ("token(int4)", "token(int4)")
    assert "queries" not in result.recipe
    products = [site for site in result.audit.sites if site.aliases and site.aliases[0].endswith(":qk")]
    assert {role: site.measured[role].bits for site in products for role in ("queries", "keys")} == {
        "queries": pytest.approx(8 + 32 / 32, abs=2),
        "keys": pytest.approx(4 + 32 / 32, abs=2),
    }
    rows = [row.replace("│", " ").split() for row in outcome.stdout.splitlines()]
    assert [row for row in rows if row[:1] in (["keys"], ["values"], ["queries"])] == [
        ["keys", "token(int4)"],
        ["values", "token(int4)"],
    ]
    assert json.loads(again.stdout)["simulated"] == result.simulated
