"""`qsim search`: the groups, the integer program, the budgets, and the recipe that comes out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from families import make, tokens
from qsim_study.lists import split
from qsim_study.search import Budget, Found, search
from qsim_study.search.allotting import cheapest_loss
from qsim_study.search.choices import offered
from qsim_study.search.found import Uniform
from qsim_study.search.groups import groups_of
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.cli.main import main


class Net(nn.Module):
    """Two layers that read one input, a layer that hardly matters, and a layer that decides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.faint, self.strong = nn.Linear(16, 64, bias=False), nn.Linear(16, 64, bias=False)
        nn.init.normal_(self.faint.weight, std=0.01)

    def forward(self, x: Tensor) -> Any:
        y = torch.relu(self.left(x) * self.right(x))
        return SimpleNamespace(logits=self.faint(y) + self.strong(y + 0))


class Nets(qsim.Adapter):
    """An adapter of `Net`."""

    name = "net"

    def load(self, model: str, dtype: torch.dtype) -> qsim.LoadedModel:
        return qsim.LoadedModel(Net().to(dtype).eval())


class Distance(qsim.Evaluator):
    """The divergence of the predictions from those of an unquantized `Net`, plus one."""

    name = "distance"
    metric = "distance"

    def default_data(self) -> qsim.Data:
        return self.read("0")

    def read(self, source: str, split: str = "test") -> qsim.Data:
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(int(source)))
        return qsim.Data(f"vectors {source}", x, source)

    def example(self, loaded: qsim.LoadedModel, data: qsim.Data) -> dict[str, Tensor]:
        return {"x": data.content[:4]}

    def training(self, loaded: qsim.LoadedModel, data: qsim.Data, length: int | None) -> list[dict[str, Tensor]]:
        return [{"x": x} for x in data.content]

    def evaluate(self, loaded: qsim.LoadedModel, data: qsim.Data, run: qsim.Run) -> qsim.Metrics:
        with torch.no_grad():
            before, after = (model(data.content).logits.log_softmax(-1) for model in (Net(), loaded.model))
        return qsim.Metrics({"distance": (before.exp() * (before - after)).sum(1) + 1})


@pytest.fixture
def net(tmp_path: Path) -> Callable[..., Found]:
    """Search the formats of a `Net`; the samples are not those of the evaluation."""
    (tmp_path / "config.json").write_text('{"model_type": "net", "architectures": ["Net"]}')
    host = qsim.Host()
    host.register(Nets, Distance)

    def run(budget: dict[str, float], recipe: dict[str, Any] | None = None, **given: Any) -> Found:
        return search(
            str(tmp_path),
            budget=Budget(**budget),
            recipe=qsim.Recipe.of({"evaluate": "distance", **(recipe or {})}, host),
            host=host,
            calibration=qsim.Calibration("1", samples=32),
            **{"weights": ["int2", "int4", "int8"], **given},
        )

    run.host = host  # type: ignore[attr-defined]
    return run


def choices(found: Found, key: str = "weights") -> dict[str, str | None]:
    return {group.group: group.choice[key] for group in found.groups if key in group.choice}


def test_weights_that_read_one_input_in_one_module_share_a_choice() -> None:
    groups, _ = groups_of(
        make("llama"), qsim.Recipe(), offered({"weights": ["int4", "int8"], "activations": []}), tokens()
    )

    assert [group.name for group in groups[:4]] == [
        "model.layers.0.self_attn.{q_proj,k_proj,v_proj}",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.{gate_proj,up_proj}",
        "model.layers.0.mlp.down_proj",
    ]


def test_attention_and_mlp_of_one_norm_do_not_share_a_choice() -> None:
    several = offered({"weights": ["int4", "int8"], "activations": []})

    groups, _ = groups_of(make("codegen"), qsim.Recipe(), several, tokens())

    assert [group.name.rpartition("h.0.")[2] for group in groups[:4]] == [
        "attn.qkv_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out"
    ]  # fmt: skip


def test_products_of_activations_are_allotted_where_activations_are() -> None:
    several = offered({"weights": ["int4"], "activations": ["int4", "int8"]})

    groups, _ = groups_of(make("opt"), qsim.Recipe(), several, tokens())

    assert {group.name.rpartition(":")[2]: group.keys for group in groups if ":" in group.name} == {
        "{matmul.0,matmul.1}": ("activations",)
    }


def test_a_weight_that_is_tied_to_an_embedding_is_counted() -> None:
    _, elements = groups_of(
        make("opt"), qsim.Recipe(), offered({"weights": ["int4", "int8"], "activations": []}), tokens()
    )

    assert elements["lm_head.weight"] == 96 * 64


def test_the_integer_program_finds_the_best_of_all_selections() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        rises, costs = (torch.rand(5, 3, generator=draw).tolist() for _ in range(2))

        found = cheapest_loss(rises, [costs], [2.0])

        within = [one for one in itertools.product(range(3), repeat=5) if total(costs, one) <= 2.0]
        best = min((total(rises, one) for one in within), default=None)
        assert (None if found is None else total(rises, found)) == pytest.approx(best)


def total(rows: list[list[float]], chosen: Any) -> float:
    return sum(row[place] for row, place in zip(rows, chosen, strict=True))


def test_a_choice_without_a_finite_loss_is_never_taken() -> None:
    assert cheapest_loss([[float("inf"), 1.0]], [[[1.0, 2.0]]], [3.0]) == [1]
    assert cheapest_loss([[float("inf"), 1.0]], [[[1.0, 2.0]]], [1.5]) is None


def test_the_layer_that_hardly_matters_gets_fewest_bits(net: Any) -> None:
    found = choices(net({"bits": 6.0}))

    assert [group for group, choice in found.items() if choice == "channel(int2)"] == ["faint"]


def test_it_finds_the_best_of_all_allotments_that_keep_the_budget(net: Any) -> None:
    found = net({"bits": 7.0})

    bench, losses = qsim.Bench(found.result.model, host=net.host), []
    for both, faint, strong in itertools.product(["int2", "int4", "int8"], repeat=3):
        others = {"faint": {"weights": faint}, "strong": {"weights": strong}}
        recipe = qsim.Recipe.of({"weights": both, "overrides": others, "evaluate": "distance"}, net.host)
        measured = bench.measure(recipe, "1").result
        if measured.audit.bits_per_weight <= 7.0:
            losses.append(measured.simulated["distance"])
    assert found.losses["found"] == pytest.approx(min(losses) - 1, rel=1e-3)


def test_the_budget_is_kept_as_the_audit_counts_it(net: Any) -> None:
    found = net({"bits": 7.0})

    assert found.costs["bits"] == found.result.audit.bits_per_weight
    assert found.costs["bits"] <= 7.0
    assert found.costs["bytes"] == found.costs["bits"] * (2 * 16 * 16 + 2 * 16 * 64) / 8


def test_the_recipe_gives_the_same_numbers_again(net: Any) -> None:
    found = net({"bits": 7.0})

    again = qsim.evaluate(qsim.Recipe.from_yaml(found.recipe, net.host), host=net.host)

    assert again.simulated == found.result.simulated


def test_it_is_compared_with_the_uniform_recipes_around_the_budget(net: Any) -> None:
    found = net({"bits": 7.0})

    assert [(one.choice["weights"], one.fits) for one in found.uniform] == [
        ("channel(int4)", True),
        ("channel(int8)", False),
    ]
    assert found.uniform[0].verdict(found.higher_is_better) == "better"
    assert found.uniform[0].value > found.value


def test_the_allotment_that_is_kept_is_the_best_of_those_that_were_tried(net: Any) -> None:
    found = net({"bits": 7.0})

    assert found.losses["found"] == min(found.losses["uniform"], *(one.loss for one in found.rounds))


def test_bit_operations_are_multiplications_times_the_bits_of_both_operands(net: Any) -> None:
    each = 4 * (2 * 16 * 16 + 2 * 16 * 64)

    found = net({"bops": each * 4 * 8}, weights=["int4", "int8"], activations=["int4", "int8"])

    assert found.costs["bops"] <= each * 4 * 8
    assert found.uniform[-1].costs["bops"] == each * 8 * 8
    assert {*choices(found, "activations").values()} <= {"token(int4)", "token(int8)"}


def test_milliseconds_are_those_of_the_hardware(net: Any) -> None:
    chip = net.host.parse("roofline([[int8, 1e9]], bandwidth=1e6, float32=1e9)", qsim.Hardware)

    found = net({"ms": 12.0}, on=[chip])

    assert found.costs[f"ms on {chip}"] == pytest.approx(found.result.audit.costs[str(chip)].totals["seconds"] * 1e3)
    assert found.costs[f"ms on {chip}"] <= 12.0


def test_what_overrides_and_skipped_sites_say_is_not_allotted(net: Any) -> None:
    found = net({"bits": 7.0}, {"overrides": {"strong": {"weights": "int3"}}, "skip": ["faint"]})

    assert [*choices(found)] == ["{left,right}"]
    assert qsim.Recipe.from_yaml(found.recipe, net.host).plan(["strong"]).weight == qsim.parse("channel(int3)")


def test_samples_of_the_reported_data_are_a_warning(net: Any) -> None:
    found = net({"bits": 7.0}, data="1")

    assert "the search looked at the data that are reported, vectors 1" in found.warnings


def test_a_record_is_read_back(net: Any, tmp_path: Path) -> None:
    found = net({"bits": 7.0}, rounds=0)

    found.write(tmp_path / "found.json")

    assert Found.model_validate_json((tmp_path / "found.json").read_text()) == found


@pytest.mark.parametrize(
    ("budget", "given", "message"),
    [
        ({"bits": 2.0}, {}, "a budget of 2 bits is too small: the least that these choices allow is 4; raise it"),
        ({"bits": 4.0}, {"weights": ["int4"]}, r"two choices at least, found channel\(int4\); name more"),
        ({"bits": 4.0}, {"weights": ["int4", "channel(int4)"]}, "two choices at least"),
        ({}, {}, "a search needs a budget: say bits, bytes, bops"),
        ({"ms": 1.0}, {}, "a budget of 1 ms needs hardware; name it with --on"),
        ({"bits": 4.0}, {"weights": [], "activations": ["int4", "int8"]}, "no weight is quantized"),
        ({"bits": 4.0}, {"recipe": {"skip": ["*"]}}, "reached no site of this model"),
    ],
)
def test_a_search_that_cannot_be_done_is_told_in_one_line(
    net: Any, budget: dict[str, float], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(qsim.QsimError, match=message):
        net(budget, **given)


def test_a_quantizer_of_unknown_bits_cannot_be_priced(net: Any) -> None:
    class Halves(qsim.Quantizer):
        """Rounds to halves."""

        name = "halves"

        def quantize(self, x: Tensor) -> Tensor:
            return (2 * x).round() / 2

    with pytest.raises(qsim.RecipeError, match="halves does not say how many bits an element takes"):
        net({"bits": 4.0}, weights=[Halves(), "int8"])


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [((0.9, 0.95), "better"), ((0.9, 1.1), "a tie"), ((1.1, 1.2), "worse"), (None, "not decided: too few samples")],
)
def test_an_interval_that_holds_one_is_a_tie(ratio: tuple[float, float] | None, verdict: str) -> None:
    uniform = Uniform(choice={"weights": "int4"}, fits=True, costs={}, value=1.0, ratio=ratio)

    assert uniform.verdict(higher_is_better=False) == verdict


def test_commas_inside_brackets_do_not_separate_choices() -> None:
    assert split("int3, block(int4, n=64),scaled(e2m1, 16, scale=[1, 2])") == [
        "int3", "block(int4, n=64)", "scaled(e2m1, 16, scale=[1, 2])"
    ]  # fmt: skip


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "int4", "--bits", "4"], "a search needs two choices at least, found channel(int4)"),
        (["--weights", "int4,int5x", "--bits", "4"], "int5x"),
        (["--weights", "int4,int8", "--ms", "1", "--on", "h1000"], "h1000"),
        (["--weights", "int4,int8", "--bits", "4", "--output", "."], "cannot write .: it is a directory"),
        (["--weights", "int4,int8", "--bits", "-1"], "-1"),
    ],
)
def test_the_command_tells_what_is_wrong_in_one_line(arguments: list[str], message: str) -> None:
    outcome = run("search", "opt-tiny", *arguments)

    assert outcome.exit_code != 0
    assert message in outcome.output.splitlines()[-1]


def test_the_command_writes_a_recipe_that_evaluates_to_the_same_numbers(tmp_path: Path) -> None:
    seen, reported = tmp_path / "seen.txt", tmp_path / "reported.txt"
    seen.write_text("All animals are equal. " * 40)
    reported.write_text("But some animals are more equal than others. " * 60)
    recipe = tmp_path / "found.yaml"

    outcome = run(
        "search", "opt-tiny", "--weights", "int3,int8", "--bits", "5", "--skip", "*.layers.[0-2].*", "--skip", "lm_head",
        "--data", reported, "--calibration-data", seen, "--calibration-samples", 2, "--calibration-seqlen", 16,
        "--rounds", 0, "--limit", 1, "--json", "-", "--output", recipe,
    )  # fmt: skip

    assert outcome.exit_code == 0, outcome.output
    found = json.loads(outcome.stdout)
    again = json.loads(run("evaluate", "--recipe", recipe, "--data", reported, "--limit", 1, "--json", "-").stdout)
    assert found["result"]["simulated"] == again["simulated"]
    assert len(found["groups"]) == 4


@pytest.mark.slow
def test_the_recipe_that_is_found_for_bert_beats_uniform_int4(tmp_path: Path) -> None:
    zoo = pytest.importorskip("qsim_zoo.text")
    (tmp_path / "unseen.txt").write_text(zoo.text("valid"), encoding="utf-8")

    found = search(
        "bert-tiny",
        weights=["int2", "int3", "int4", "int5", "int6", "int8"],
        budget=Budget(bits=4.2039),
        calibration=qsim.Calibration(str(tmp_path / "unseen.txt"), samples=128),
        run=qsim.Run(batch_size=32),
        rounds=1,
    )

    best = next(uniform for uniform in found.uniform if uniform.fits)
    assert best.choice["weights"] == "channel(int4)"
    assert best.verdict(found.higher_is_better) == "better"
