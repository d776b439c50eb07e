"""Directories of compressed-tensors: transformers loads the weights that the simulation multiplies, bit for bit."""

from __future__ import annotations

import json
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from click.testing import CliRunner
from families import make, save_small, tokens
from qsim_interop.reading import open_checkpoint
from qsim_interop.writing import export
from safetensors.torch import load_file
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.cli.main import main
from qsim_core.evaluation.adapter import LoadedModel

transformers = pytest.importorskip("transformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("compressed_tensors.compressors")

pytestmark = pytest.mark.filterwarnings("ignore")

FORMATS = {
    "block(int4, 32)": "pack-quantized",
    "block(int4, 16, symmetric=false, scale=bf16)": "pack-quantized",
    "channel(uint4, symmetric=false)": "pack-quantized",
    "channel(int3)": "pack-quantized",
    "tensor(int8)": "pack-quantized",
    "channel(e4m3)": "float-quantized",
    "block(e4m3, [32, 32])": "float-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp8_e4m3": "mxfp8-quantized",
    "scaled(e2m1, 16, scale=scaled(e4m3, rule=ceil))": "nvfp4-pack-quantized",
}
"""Quantizers of weights, and the format of their layers."""
IDS = tokens() % 64
UNQUANTIZED_ATTENTION = dict.fromkeys(("queries", "keys", "probabilities", "values"))
EVERYWHERE = dict.fromkeys(("queries", "keys", "probabilities", "values"), "int8")
E2M1 = "scaled(e2m1, 16, scale=scaled(e4m3, rule=ceil))"


def simulated(model: nn.Module, **recipe: Any) -> qsim.Simulation:
    parts = {"skip": ["lm_head"], **UNQUANTIZED_ATTENTION, **recipe}
    return qsim.simulate(model, qsim.Recipe.of(parts), calibration=[{"input_ids": IDS}], example={"input_ids": IDS})


def exported(simulation: qsim.Simulation, directory: Path) -> dict[str, Any]:
    """Export a simulation; give the configuration of its quantization."""
    export(simulation, LoadedModel(simulation.model), "compressed-tensors", directory)
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    return found


def loaded(directory: Path, dequantize: bool = True) -> Any:
    config = transformers.CompressedTensorsConfig(dequantize=True) if dequantize else None
    more = {"quantization_config": config} if dequantize else {}
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **more)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("weights", FORMATS)
def test_transformers_loads_the_same_bits(weights: str, tmp_path: Path) -> None:
    simulation = simulated(make("llama"), weights=weights)

    config = exported(simulation, tmp_path / "out")
    model = loaded(tmp_path / "out")

    assert config["format"] == FORMATS[weights]
    assert all(torch.equal(model.get_parameter(name), weight.decode()) for name, weight in simulation.encoded().items())
    torch.testing.assert_close(logits(model), logits(simulation.model), atol=1e-6, rtol=0)


def test_the_library_dequantizes_vllm_nvfp4_to_the_same_bits(tmp_path: Path) -> None:
    """In float32: as a model, the library unpacks four-bit floats to bfloat16."""
    unpack = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers").unpack_fp4_from_uint8
    dequantize = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward").dequantize
    quantization = pytest.importorskip("compressed_tensors.quantization")
    simulation = simulated(make("llama"), weights="vllm_nvfp4")

    config = exported(simulation, tmp_path / "out")

    arguments = quantization.QuantizationArgs(**config["config_groups"]["group_0"]["weights"])
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in simulation.encoded().items():
        packed, scale, whole = (stored[f"{name}_{part}"] for part in ("packed", "scale", "global_scale"))
        units = unpack(packed, packed.shape[0], 2 * packed.shape[1], dtype=torch.float32)
        found = dequantize(units, scale.float(), None, arguments, torch.float32, whole)
        assert torch.equal(found, weight.decode())


def test_static_inputs_have_the_scales_that_calibration_found(tmp_path: Path) -> None:
    simulation = simulated(make("llama"), weights="tensor(e4m3)", activations="tensor(e4m3, static=true)")

    exported(simulation, tmp_path / "out")
    model = loaded(tmp_path / "out", dequantize=False)

    torch.testing.assert_close(logits(model), logits(simulation.model), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("activations", "arguments"),
    [
        ("token(int8)", {"type": "int", "strategy": "token", "dynamic": True, "symmetric": True}),
        ("tensor(int8, symmetric=false)", {"type": "int", "strategy": "tensor", "dynamic": True, "symmetric": False}),
        ("token(e4m3)", {"type": "float", "strategy": "token", "dynamic": True, "symmetric": True}),
    ],
)
def test_the_configuration_says_how_inputs_are_quantized(
    activations: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    weights = "channel(e4m3)" if "e4m3" in activations else "channel(int8)"

    config = exported(simulated(make("llama"), weights=weights, activations=activations), tmp_path / "out")

    assert config["config_groups"]["group_0"]["input_activations"] == {"num_bits": 8, **arguments}
    assert config["format"] == ("float-quantized" if "e4m3" in activations else "int-quantized")


@pytest.mark.parametrize("weights", ["block(int4, 16)", "block(int4, 16, symmetric=false)", E2M1])
def test_the_codes_of_gptq_are_exported_as_they_are(weights: str, tmp_path: Path) -> None:
    pytest.importorskip("qsim_gptq")
    simulation = simulated(make("opt"), weights=weights, transforms=["gptq(act_order=true)"])

    exported(simulation, tmp_path / "out")
    model = loaded(tmp_path / "out")

    assert all(
        torch.equal(model.get_parameter(name), simulation.model.get_parameter(name)) for name in simulation.encoded()
    )


@pytest.mark.parametrize("transforms", [["smoothquant", "gptq"], ["awq"], ["bias_correction"]])
def test_the_model_is_the_one_that_transforms_have_left(transforms: list[str], tmp_path: Path) -> None:
    for transform in transforms:
        pytest.importorskip(f"qsim_{transform}")
    simulation = simulated(make("opt"), weights="block(int4, 16)", transforms=transforms)

    exported(simulation, tmp_path / "out")

    torch.testing.assert_close(logits(loaded(tmp_path / "out")), logits(simulation.model), atol=1e-6, rtol=0)


def test_layers_that_differ_are_groups_by_name(tmp_path: Path) -> None:
    overrides = {"*.mlp.*": {"weights": "channel(int8)"}}

    config = exported(
        simulated(make("llama"), weights="channel(int4)", overrides=overrides, skip=["lm_head", "*.o_proj"]),
        tmp_path / "out",
    )

    groups = {group["weights"]["num_bits"]: group["targets"] for group in config["config_groups"].values()}
    assert sorted(groups) == [4, 8]
    assert all(".mlp." in target for target in groups[8])
    assert config["ignore"] == [*(f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 1)), "lm_head"]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"weights": "nvfp4"}, r"does not hold nvfp4 exactly \(it divides .*say|scaled\(e4m3, rule=ceil\)"),
        ({"weights": "block(int4, 24)"}, "blocks of 24 do not divide its 64 inputs; 8 would"),
        ({"weights": "channel(int12)"}, r"does not hold channel\(int12\) exactly; it holds integers of 2 to 8 bits"),
        ({"weights": "cast(e4m3)"}, r"cast\(e4m3\) has no scales; say channel"),
        ({"weights": "if4"}, r"if4 has more than codes under scales, and such files hold no more"),
        ({"weights": "sinq(mxfp4)"}, r"sinq\(mxfp4\) has more than codes under scales, and such files hold no more"),
        ({"weights": "int8", "activations": "block(int8, 16)"}, r"does not hold inputs of block\(int8, n=16\) exactly"),
        ({"weights": "int8", "outputs": "bf16"}, r"the output of .* is quantized by cast\(bf16\)"),
        ({"weights": "int8", "keys": "int8"}, "its keys are quantized, and files hold the inputs of layers only"),
        (
            {"weights": "int8", "activations": "int8", "arithmetic": "chunked(fp16, 64)", **EVERYWHERE},
            "a file does not choose the arithmetic",
        ),
        ({"weights": "int8", "transforms": ["hadamard"]}, "a transform rotates the input of .* in each forward"),
        ({"weights": "int8", "activations": "int8", "transforms": ["rptq"]}, "has left 4 hooks on the model.*no file"),
        ({"weights": "int8", "skip": []}, "lm_head.weight is tied to another parameter, .*--skip lm_head"),
        ({"activations": "int8"}, "the recipe quantizes no weight"),
    ],
)
def test_a_file_that_cannot_hold_the_recipe_is_refused(recipe: dict[str, Any], message: str, tmp_path: Path) -> None:
    for plugin in ("accumulators", "hadamard", "mx", "rptq", "sinq"):
        pytest.importorskip(f"qsim_{plugin}")
    simulation = simulated(make("opt"), **recipe)

    with pytest.raises(qsim.RecipeError, match=message):
        exported(simulation, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_of_another_class_are_refused(tmp_path: Path) -> None:
    with pytest.raises(qsim.RecipeError, match="to a Conv1D; such files hold codes of Linear and experts: --skip"):
        exported(simulated(make("gpt2"), weights="int8"), tmp_path / "out")


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3-MoE"])
@pytest.mark.parametrize("weights", ["block(int4, 16, scale=bf16)", "channel(e4m3)"])
def test_transformers_joins_the_experts_to_the_same_bits(weights: str, family: str, tmp_path: Path) -> None:
    simulation = simulated(build(family), weights=weights, skip=["lm_head", "*.gate"])
    exported(simulation, tmp_path / "out")

    model = loaded(tmp_path / "out")

    encoded = simulation.encoded()
    assert any(one.encoded.codes.dim() == 3 for one in encoded.values())
    assert all(torch.equal(model.get_parameter(name), one.decode()) for name, one in encoded.items())
    torch.testing.assert_close(logits(model), logits(simulation.model), atol=1e-6, rtol=0)


@pytest.mark.parametrize("weights", ["tensor(int8)", E2M1])
def test_each_expert_has_codes_of_its_own(weights: str, tmp_path: Path) -> None:
    simulation = simulated(build("Mixtral"), weights=weights, skip=["lm_head", "*.gate"])
    exported(simulation, tmp_path / "out")

    checkpoint = open_checkpoint(tmp_path / "out")

    stack = simulation.encoded()["model.layers.0.mlp.experts.gate_up_proj"].decode()
    found = {layer.module.partition("experts.")[2]: checkpoint.dequantize(layer) for layer in checkpoint.layers[::-1]}
    assert torch.equal(torch.cat([found["1.w1"], found["1.w3"]]), stack[1])


def test_experts_without_names_of_their_own_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        qsim.RecipeError, match="stacks experts, which no file holds as they are: GptOssForCausalLM has"
    ):
        exported(simulated(build("GPT-OSS"), weights="channel(int8)", skip=["lm_head", "*.router"]), tmp_path / "out")


def test_a_directory_with_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")

    with pytest.raises(qsim.ModelError, match="is not empty; name another --output$"):
        exported(simulated(make("opt"), weights="int8"), tmp_path)


def test_a_link_to_an_empty_directory_stays_and_leads_to_the_files(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")

    exported(simulated(make("llama"), weights="int8"), tmp_path / "link")

    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").is_file()


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    simulation, before = simulated(make("llama"), weights="int8"), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, before[1]))
    try:
        with pytest.raises(qsim.ModelError, match="^cannot write .*out: .*File too large"):
            exported(simulation, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not [*tmp_path.iterdir()]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("qsim_zoo")
    return save_small(tmp_path_factory.mktemp("model") / "small")


def test_the_command_writes_what_check_reads(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--weights", "block(int4, 16, scale=bf16)", "--skip", "lm_head", "--to", "compressed-tensors"]

    run = CliRunner().invoke(main, ["export", str(small), *options, "--output", str(out), "--quiet"])
    check = CliRunner().invoke(main, ["check", str(out)])

    assert run.exit_code == 0, run.output
    assert run.output == f"{out} holds the model in the format compressed-tensors\n"
    assert check.exit_code == 0, check.output


def test_an_unknown_format_is_named(small: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke(
        main, ["export", str(small), "--weights", "int8", "--to", "compresed-tensors", "--output", str(tmp_path / "x")]
    )

    assert run.exit_code == 1
    assert "no format 'compresed-tensors'; did you mean" in run.output
