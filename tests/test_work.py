"""The work of a site: elements, bits with scales, formats and roles of what a product reads and writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.cli.main import main
from qsim_core.cli.recipe_options import hardware_of


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class Bytes(qsim.Hardware):
    """Counts bytes, in units."""

    name = "traffic"
    unit: float = 1.0

    def cost(self, work: Sequence[qsim.SiteWork]) -> qsim.Cost:
        return qsim.Cost(totals={"bytes": sum(one.bytes for one in work) / self.unit}, assumptions=["no cache"])


def host() -> qsim.Host:
    found = qsim.Host()
    found.register(Bytes)
    return found


def test_bits_count_scales_and_an_operand_without_quantizer_has_the_models_dtype() -> None:
    layer = nn.Linear(256, 8).bfloat16()

    (work,) = qsim.simulate(layer, weights="block(int4, 64)").work(torch.ones(3, 256, dtype=torch.bfloat16))

    told = [(one.role, one.elements, one.bits) for one in (*work.operands, work.result)]
    assert told == [("input", 3 * 256, 16), ("weight", 8 * 256, 4 + 32 / 64), ("output", 3 * 8, 16)]


def test_the_bits_are_those_that_the_audit_measures() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4)), torch.randn(2, 3, 8, 8)
    simulation = qsim.simulate(model, weights="block(int4, 12)", activations="token(e4m3)", example=x)

    audit = {site.site: site.measured for site in simulation.audit().sites}

    for work in simulation.work():
        assert {one.role: one.bits for one in work.operands} == pytest.approx(
            {role: measured.bits for role, measured in audit[work.site].items()}
        )


def test_attention_names_its_operands_and_value_axis_turns_the_values() -> None:
    recipe = {"keys": "block(int8, 4)", "values": "token(int4)", "value_axis": "head"}

    qk, pv = qsim.simulate(Attention(), recipe).work(torch.ones(1, 2, 32, 8))

    assert [(one.role, one.bits) for one in (*qk.operands, *pv.operands)] == [
        ("queries", 32),
        ("keys", 8 + 32 / 4),
        ("probabilities", 32),
        ("values", 4 + 32 / 8),
    ]


def test_a_weight_is_read_once_and_an_input_in_each_call() -> None:
    layer = nn.Linear(4, 4, bias=False)

    (work,) = qsim.simulate(nn.Sequential(layer, layer)).work(torch.ones(3, 4))

    assert work.bytes == 4 * (16 + 2 * (12 + 12))


def test_attention_with_a_mask_has_work_without_memory() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, attn_mask=torch.zeros(4, 4, device=x.device))

    found = qsim.simulate(Masked(), activations="int8").work(torch.empty(1, 2, 4, 8, device="meta"))

    assert len(found) == 2


def test_the_audit_says_what_its_batch_costs_on_hardware() -> None:
    simulation = qsim.simulate(nn.Linear(4, 2, bias=False), weights="cast(int8)", example=torch.ones(1, 4))

    audit = simulation.audit(on=[Bytes()])

    assert audit.costs == {"traffic(1.0)": qsim.Cost(totals={"bytes": 4 * 4 + 8 + 2 * 4}, assumptions=["no cache"])}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("traffic: {unit: 2, units: 3}", "traffic has no option 'units'; did you mean 'unit'? There are: unit"),
        ("traffic: {unit: wide}", "unit should be a valid number, unable to parse string as a number, not 'wide'"),
        ("traffics: {}", "no hardware 'traffics'; did you mean 'traffic'?"),
        ("e4m3: {}", "'e4m3' is a format, not hardware"),
        ("[1, 2]", "is no hardware: expected one name and its options, like `NAME: {OPTION: VALUE}`"),
        ("", "is no hardware: expected one name and its options, like `NAME: {OPTION: VALUE}`"),
        ("a: {}\nb: {}", "is no hardware: expected one name and its options, like `NAME: {OPTION: VALUE}`"),
        ("traffic: [", "is not YAML"),
    ],
)
def test_a_file_that_describes_no_hardware(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "chip.yaml").write_text(text)

    with pytest.raises(qsim.QsimError) as error:
        hardware_of([str(tmp_path / "chip.yaml")], host())

    assert message in str(error.value) and "\n" not in str(error.value)


def test_hardware_is_named_by_text_or_described_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "chip.yaml").write_text("traffic: {unit: 1024}")

    assert hardware_of(["traffic(2.0)", str(tmp_path / "chip.yaml")], host()) == [Bytes(unit=2), Bytes(unit=1024)]


def test_evaluate_puts_cost_beside_accuracy_and_its_record_runs_again(tmp_path: Path) -> None:
    record = tmp_path / "result.json"
    arguments = ["evaluate", "vit-tiny", "--precision", "w4a8", "--limit", "4", "--on", "h100", "--json", str(record)]

    outcome = CliRunner().invoke(main, arguments)

    assert outcome.exit_code == 0, outcome.output
    assert "seconds of a batch, h100" in outcome.output
    assert "h100, for the audit's batch: roofline at 100% of peak" in " ".join(outcome.output.split())
    result = json.loads(record.read_text())
    assert list(result["audit"]["costs"]) == ["h100"] and "hardware" in result["plugins"]
    again = CliRunner().invoke(main, ["evaluate", "--from", str(record), "--json", "-"])
    assert json.loads(again.stdout)["audit"]["costs"] == result["audit"]["costs"]


def test_unknown_hardware_is_one_line() -> None:
    outcome = CliRunner().invoke(main, ["evaluate", "vit-tiny", "--precision", "w4a8", "--on", "h10"])

    assert outcome.exit_code == 1
    assert outcome.stderr.startswith("Error: no hardware 'h10'; did you mean 'h100'?")
