"""`qsim finetune`: a model trained under a recipe, its directory, and the mistakes of a user."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import families
import pytest
import torch
from click.testing import CliRunner
from qsim_finetune.finetuning import finetune
from qsim_finetune.loss_curve import loss_curve
from qsim_finetune.trained import Trained, read_state
from qsim_finetune.training import Finetuned, Training
from transformers import AutoModelForCausalLM, OPTForCausalLM, ViTForImageClassification

import qsim_core as qsim
from qsim_core.cli.main import main

ROOT = Path(__file__).parents[3]
WINDOWS = ["--limit", "2", "--seqlen", "32", "--batch-size", "2"]
QUICK = [*WINDOWS, "--evaluator", "perplexity(seqlen=32)", "--eval-data", ROOT / "README.md"]
SHORT = [*QUICK, "--data", ROOT / "CHANGELOG.md"]
"""Options of a training on one small text, measured on another."""
FEW = ["--calibration-samples", "4", "--calibration-seqlen", "32", "--calibration-data", ROOT / "CHANGELOG.md"]
LSQ = ["--weights", "channel(int4, gradient=lsq)", "--activations", "abfp(int8, gradient=lsq)", *FEW]


def qsim_(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def result(*arguments: Any) -> Finetuned:
    outcome = qsim_("finetune", *arguments, "--json", "-")
    assert outcome.exit_code == 0, outcome.output
    return Finetuned.model_validate_json(outcome.stdout)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save_small(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def trained(small: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finetuned]:
    """Train a small model for three steps with learned step sizes, and fold it too."""
    output = tmp_path_factory.mktemp("run") / "opt"
    return output, result(small, *LSQ, *SHORT, "--steps", 3, "--fold", "--output", output)


def test_a_trained_directory_is_evaluated_to_the_last_digit(trained: tuple[Path, Finetuned]) -> None:
    output, finetuned = trained

    again = qsim_("evaluate", output, "--limit", 2, "--json", "-")

    assert qsim.Result.model_validate_json(again.stdout).simulated == finetuned.after.simulated
    assert finetuned.after.simulated != finetuned.before.simulated
    assert finetuned.after.baseline != finetuned.before.baseline


def test_it_holds_the_float32_model_and_what_its_sites_learned(trained: tuple[Path, Finetuned]) -> None:
    output, _ = trained
    model = AutoModelForCausalLM.from_pretrained(output)
    held = read_state(output / "sites.safetensors")

    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any("qsim" in name for name in model.state_dict())
    assert held["model.decoder.layers.0.fc1:weight.scale"].shape == (96, 1, 1)
    assert held["model.decoder.layers.0.fc1:input.scale"].shape == (1, 1)
    assert sorted(path.name for path in output.iterdir()) == sorted(
        [
            "after.json", "before.json", "checkpoints", "config.json", "folded", "generation_config.json", "loss.svg",
            "model.safetensors", "qsim.json", "sha256.json", "sites.safetensors", "tokenizer.json", "tokenizer_config.json",
            "training.json",
        ]
    )  # fmt: skip


def test_transformers_loads_it_with_its_quantizers(trained: tuple[Path, Finetuned]) -> None:
    output, _ = trained
    host, ids = qsim.Host(), torch.arange(4, 36).unsqueeze(0)
    record, plain = Trained.of(output), host.parse("opt.opt").load(str(output), torch.float32).model
    assert record is not None
    state = read_state(output / "sites.safetensors")
    qsim.simulate(plain, record.simulated(host), example={"input_ids": ids}, state=state)

    model = AutoModelForCausalLM.from_pretrained(output)

    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_what_is_folded_are_the_quantized_weights(trained: tuple[Path, Finetuned]) -> None:
    output, _ = trained
    held = read_state(output / "sites.safetensors")
    masters, folded = (
        OPTForCausalLM.from_pretrained(path).model.decoder.layers[1].fc2.weight for path in (output, output / "folded")
    )

    expected = qsim.parse("channel(int4)").quantize_at(
        masters.detach(), held["model.decoder.layers.1.fc2:weight.scale"], None
    )

    assert torch.equal(folded, expected)
    assert not torch.equal(folded, masters)
    assert (
        qsim_(
            "evaluate", output / "folded", "--activations", "int8", "--limit", 2, "--data", ROOT / "README.md"
        ).exit_code
        == 0
    )


def test_the_loss_is_drawn_beside_it(trained: tuple[Path, Finetuned]) -> None:
    output, finetuned = trained

    drawing = ElementTree.parse(output / "loss.svg").getroot()

    lines = drawing.findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [3, 3]
    assert [entry.step for entry in finetuned.log] == [1, 2, 3]


def test_a_curve_has_its_highest_loss_on_top_and_its_steps_from_left_to_right() -> None:
    drawing = ElementTree.fromstring(loss_curve([10, 20, 30], [4.0, 1.0, 2.5], "a < b"))

    line = drawing.find("{http://www.w3.org/2000/svg}polyline")
    assert line is not None
    assert line.attrib["points"] == "48.0,48.0 320.0,312.0 592.0,180.0"
    assert "a < b" in [text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.slow
def test_training_recovers_what_quantization_lost(tmp_path: Path) -> None:
    finetuned = result(
        "vit-tiny", "--plugin", "abfp", "--precision", "w2a4", "--steps", 60, "--lr", "1e-3", "--batch-size", 16,
        "--output", tmp_path / "vit",
    )  # fmt: skip

    before, after = (run.simulated["nll"] for run in (finetuned.before, finetuned.after))
    assert after < before / 2
    assert ViTForImageClassification.from_pretrained(tmp_path / "vit").num_labels == 10


def test_a_control_is_trained_as_no_recipe_was_there(small: Path, tmp_path: Path) -> None:
    few = [*SHORT, "--steps", 3, "--control"]

    coarse, fine = (
        result(small, "--plugin", "abfp", "--precision", precision, *few, "--output", tmp_path / precision)
        for precision in ("w2a4", "w8a8")
    )

    assert coarse.log == fine.log
    assert coarse.after.baseline == fine.after.baseline != fine.before.baseline
    assert coarse.after.simulated != fine.after.simulated


def test_the_table_says_what_a_reader_needs(tmp_path: Path) -> None:
    outcome = qsim_(
        "finetune",
        "vit-tiny",
        "--plugin",
        "abfp",
        "--steps",
        2,
        "--limit",
        8,
        "--batch-size",
        8,
        "--output",
        tmp_path / "vit",
    )

    assert outcome.exit_code == 0, outcome.output
    for row in ("float32 accuracy", "quantized", "trained under it", "the same weights in float32", "training loss"):
        assert row in outcome.stdout
    assert "2 steps of 8 samples, lr 0.0001" in " ".join(outcome.stdout.split())
    assert "trained on zoo: scikit-learn's digits, train split" in " ".join(outcome.stdout.split())


def test_transforms_come_before_the_training_and_are_in_the_weights_after_it(tmp_path: Path) -> None:
    finetuned = result(
        "opt-tiny-outliers", "--plugin", "abfp", "--plugin", "smoothquant", *SHORT, "--steps", 2,
        "--calibration-samples", 4, "--calibration-seqlen", 64, "--output", tmp_path / "run",
    )  # fmt: skip

    assert finetuned.before.recipe["transforms"] == ["smoothquant(0.5)"]
    assert finetuned.after.recipe["transforms"] == []
    without = qsim_("evaluate", "opt-tiny-outliers", "--plugin", "abfp", "--evaluator", "perplexity(seqlen=32)",
                    "--limit", 2, "--data", ROOT / "README.md", "--json", "-")  # fmt: skip
    assert finetuned.after.simulated["nll"] < qsim.Result.model_validate_json(without.stdout).simulated["nll"] - 0.5


START = ["finetune", "vit-tiny", "--precision", "w4a8", "--steps", 1, "--limit", 2, "--batch-size", 2]


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of a training that was refused after its first evaluation, and the message."""
    output = tmp_path_factory.mktemp("run") / "refused"
    outcome = qsim_(*START, "--plugin", "hadamard", "--output", output)
    assert outcome.exit_code == 1
    return output, outcome.output


def test_a_transform_that_leaves_more_than_weights_is_refused(refused: tuple[Path, str]) -> None:
    assert re.match(
        r"Error: a transform has left rotations at vit\.\S+; a model that trains cannot be saved", refused[1]
    )


@contextmanager
def stopping(total: int, done: int, description: str) -> Iterator[Callable[[str], None]]:
    """Press Ctrl-C in the fourth step."""
    seen = []

    def step(text: str) -> None:
        seen.append(text)
        if len(seen) == 4:
            raise KeyboardInterrupt

    yield step


def test_a_run_that_was_interrupted_goes_on_to_the_same_numbers(small: Path, tmp_path: Path) -> None:
    recipe = qsim.Recipe.of(
        {
            "model": str(small),
            "weights": "channel(int4(rounding=stochastic), gradient=lsq)",
            "activations": "abfp(int8, gradient=lsq)",
            "evaluate": "perplexity(seqlen=32)",
        }
    )
    training, limited = Training(steps=5, batch_size=2, seqlen=32, checkpoint_every=2), qsim.Run(limit=2)
    texts = {
        "data": str(ROOT / "CHANGELOG.md"),
        "eval_data": str(ROOT / "README.md"),
        "calibration": qsim.Calibration(source=str(ROOT / "CHANGELOG.md"), samples=4, length=32),
    }
    unbroken = finetune(recipe, tmp_path / "unbroken", training, **texts, run=limited)

    with pytest.raises(KeyboardInterrupt):
        finetune(recipe, tmp_path / "broken", training, **texts, run=qsim.Run(limit=2, count=stopping))
    checkpoints = tmp_path / "broken" / "checkpoints"
    shutil.copytree(checkpoints / "checkpoint-2", checkpoints / "checkpoint-4")  # a kill while it is written
    (checkpoints / "checkpoint-4" / "sha256.json").unlink()
    flip(checkpoints / "checkpoint-4" / "optimizer.pt")
    flip(tmp_path / "broken" / "before.json", place=b'"perplexity": ')
    resumed = finetune(recipe, tmp_path / "broken", training, **texts, resume=True, run=limited)

    assert resumed.log == unbroken.log
    assert resumed.after.simulated == unbroken.after.simulated
    assert resumed.before.simulated == unbroken.before.simulated


def flip(path: Path, place: bytes | None = None) -> None:
    """Flip a bit of a file: after `place`, or in the middle."""
    content = bytearray(path.read_bytes())
    at = len(content) // 2 if place is None else content.index(place) + len(place)
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "sites.safetensors", "config.json", "qsim.json", "sha256.json"])
def test_a_damaged_file_of_a_trained_model_is_one_line(
    name: str, trained: tuple[Path, Finetuned], tmp_path: Path
) -> None:
    shutil.copytree(trained[0], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "folded"))
    flip(tmp_path / "run" / name)

    outcome = qsim_("evaluate", tmp_path / "run", "--limit", 2)

    named = r"\S+" if name == "sha256.json" else name
    assert re.match(rf"Error: {tmp_path}/run is not what its training has written: {named} is damaged", outcome.output)


def test_a_run_that_was_interrupted_after_its_last_step_is_finished(
    small: Path, trained: tuple[Path, Finetuned], tmp_path: Path
) -> None:
    output, finetuned = trained
    shutil.copytree(output, tmp_path / "run")
    (tmp_path / "run" / "after.json").unlink()

    resumed = result(small, *LSQ, *SHORT, "--steps", 3, "--resume", "--output", tmp_path / "run")

    assert resumed.log == finetuned.log
    assert resumed.after.simulated == finetuned.after.simulated


@pytest.fixture(scope="module")
def interrupted(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that reached NaN in its third step. Its first step has a learning rate of 0."""
    output = tmp_path_factory.mktemp("run") / "nan"
    outcome = qsim_("finetune", small, "--plugin", "abfp", *SHORT, "--steps", 3, "--lr", "1e30",
                    "--checkpoint-every", 1, "--output", output)  # fmt: skip
    assert outcome.exit_code == 1
    (output / "message").write_text(outcome.output)
    return output


def test_a_loss_that_is_nan_is_one_line_with_its_step_its_layer_and_the_last_checkpoint(interrupted: Path) -> None:
    assert (interrupted / "message").read_text() == (
        "Error: step 3: the loss is nan; the first that is not finite is the output of model.decoder.layers.0"
        f".self_attn_layer_norm; the last good checkpoint is {interrupted}/checkpoints/checkpoint-2\n"
    )


@pytest.mark.parametrize("option", ["--lr", "--epochs"])
def test_what_cannot_be_is_refused_before_anything_runs(option: str, tmp_path: Path) -> None:
    outcome = qsim_("finetune", "opt-tiny", "--plugin", "abfp", "--output", tmp_path / "run", option, "-1")

    assert outcome.output.endswith(f"Error: Invalid value for '{option}': -1.0 is not in the range x>0.\n")


def again(model: Path, output: Path, *changes: Any) -> str:
    outcome = qsim_("finetune", model, "--plugin", "abfp", *SHORT, "--steps", 3, "--output", output, *changes)
    assert outcome.exit_code == 1
    return str(outcome.output)


def test_a_directory_that_holds_another_run_is_left_alone(
    small: Path, interrupted: Path, trained: tuple[Path, Finetuned]
) -> None:
    ended = trained[0]

    assert again(small, interrupted) == (
        f"Error: {interrupted} holds another run; go on with it by --resume, or name another --output\n"
    )
    assert again(small, interrupted, "--resume") == (
        f"Error: {interrupted} holds a run with learning_rate 1e+30, not 0.0001; name another --output\n"
    )
    assert (
        again(small, ended)
        == f"Error: {ended} holds a run that has ended (qsim evaluate {ended}); name another --output\n"
    )
    assert (
        again(small, ROOT / "docs")
        == f"Error: {ROOT / 'docs'} holds files that are not of a training; name another --output\n"
    )
    assert again(small, ROOT / "README.md") == f"Error: {ROOT / 'README.md'} is not a directory\n"


def test_data_shorter_than_one_sequence_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A few words.")

    outcome = qsim_("finetune", "opt-tiny", "--plugin", "abfp", "--limit", 2, "--data", tmp_path / "short.txt",
                    "--output", tmp_path / "run")  # fmt: skip

    assert outcome.output == (
        f"Error: {tmp_path}/short.txt has 7 tokens, fewer than one training window of 256; lower --seqlen\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_run_that_had_not_got_anywhere_is_begun_anew(refused: tuple[Path, str]) -> None:
    output, _ = refused
    assert (output / "before.json").exists()

    outcome = qsim_(*START, "--output", output)

    assert outcome.exit_code == 0, outcome.output
    assert qsim.Result.read(output / "before.json").recipe["transforms"] == []


def test_a_model_without_data_says_which_to_name(small: Path, tmp_path: Path) -> None:
    start = ["finetune", small, "--plugin", "abfp", "--output", tmp_path / "run"]

    nothing, text_alone = qsim_(*start), qsim_(*start, "--data", ROOT / "README.md")

    assert nothing.output == f"Error: {small} comes without data to train on; name some with --data\n"
    assert text_alone.output == (
        f"Error: {small} has nothing to be measured on but what it trains on; name --eval-data\n"
    )


def test_what_it_was_measured_on_is_found_again(small: Path, tmp_path: Path) -> None:
    finetuned = result(small, "--plugin", "abfp", *SHORT, "--steps", 1, "--output", tmp_path / "run")

    assert finetuned.data.source == str(ROOT / "CHANGELOG.md")
    assert finetuned.after.data.sha256 == finetuned.before.data.sha256
    assert json.loads((tmp_path / "run" / "qsim.json").read_text())["data"] == str(ROOT / "README.md")


def test_a_model_of_no_trainable_field_says_so(tmp_path: Path) -> None:
    outcome = qsim_("finetune", "ddpm-tiny", "--plugin", "abfp", "--limit", 1, "--output", tmp_path / "run")

    assert outcome.exit_code == 1
    assert outcome.output == ("Error: denoising makes no training samples; use an evaluator that does, or Python\n")


def test_checkpointing_autocast_and_accumulation_are_options(small: Path, tmp_path: Path) -> None:
    finetuned = result(
        small, "--plugin", "abfp", *SHORT, "--steps", 2, "--gradient-checkpointing", "--bf16", "--accumulate", 2,
        "--output", tmp_path / "run",
    )  # fmt: skip

    assert finetuned.training.bf16 and finetuned.training.gradient_checkpointing
    assert all(entry.loss < 8 for entry in finetuned.log)


def test_a_trained_model_can_train_on(trained: tuple[Path, Finetuned], tmp_path: Path) -> None:
    output, finetuned = trained

    more = result(output, *WINDOWS, *FEW, "--data", ROOT / "CHANGELOG.md", "--steps", 2, "--output", tmp_path / "more")

    assert more.before.simulated == finetuned.after.simulated
    assert more.before.data.sha256 == more.after.data.sha256
    assert more.after.simulated != more.before.simulated
