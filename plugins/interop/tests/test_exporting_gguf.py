"""Files of GGUF: the package `gguf` dequantizes the weights that the simulation multiplies, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import make, tokens
from qsim_interop.writing import export
from torch import Tensor, nn

import qsim_core as qsim

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::qsim_core.CalibrationWarning")

IDS = tokens()
TYPES = {
    "block(int4, 32, scale=fp16)": "Q4_0",
    "block(int8, 32, scale=fp16)": "Q8_0",
    "mxfp4": "MXFP4",
    "scaled(e2m1, 16, scale=scaled(e4m3, rule=ceil))": "NVFP4",
    "llama_cpp_q4_0": "Q4_0",
    "llama_cpp_q8_0": "Q8_0",
}
"""Quantizers of weights, and the type of their blocks."""
SKIPPED = ["lm_head", "*.down_proj"]
"""Layers that stay in float32; 96 inputs are not blocks of 64."""
HEADS = {"q": 4, "k": 2}
"""The heads of the model, by the letter of the projection."""


def simulated(model: nn.Module, weights: str, **more: Any) -> qsim.Simulation:
    return qsim.simulate(
        model,
        weights=weights,
        example={"input_ids": IDS},
        calibration=[{"input_ids": IDS}],
        **{"skip": SKIPPED, **more},
    )


def exported(simulation: qsim.Simulation, directory: Path) -> dict[str, Any]:
    """Export a simulation; give the tensors of the file by name."""
    export(simulation, qsim.LoadedModel(simulation.model), "gguf", directory)
    return {tensor.name: tensor for tensor in gguf.GGUFReader(directory / "model.gguf").tensors}


def dequantized(stored: Any) -> Tensor:
    return torch.tensor(gguf.quants.dequantize(stored.data, stored.tensor_type))


def paired_as_in_llama_cpp(rows: Tensor, name: str) -> Tensor:
    """The rows of q and k with the two halves of each head interleaved."""
    heads = HEADS.get(name.removeprefix("blk.0.attn_")[0], 0) if ".attn_" in name else 0
    if not heads:
        return rows
    halves = rows.reshape(heads, 2, -1, rows.shape[-1])
    return torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(rows.shape)


LAYERS = {
    "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
    "blk.0.attn_k.weight": "model.layers.0.self_attn.k_proj.weight",
    "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
    "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
}


@pytest.mark.parametrize("weights", TYPES)
def test_gguf_dequantizes_the_same_bits(weights: str, tmp_path: Path) -> None:
    simulation = simulated(make("llama"), weights)

    tensors = exported(simulation, tmp_path / "out")

    encoded = simulation.encoded()
    for name, parameter in LAYERS.items():
        factor = torch.tensor(tensors[name.replace("weight", "scale")].data) if TYPES[weights] == "NVFP4" else 1
        assert tensors[name].tensor_type.name == TYPES[weights]
        assert torch.equal(
            dequantized(tensors[name]) * factor, paired_as_in_llama_cpp(encoded[parameter].decode(), name)
        )


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_the_bytes_are_those_that_gguf_makes_of_the_original(kind: str, tmp_path: Path) -> None:
    model = make("llama")
    original = model.get_parameter("model.layers.0.mlp.up_proj.weight").detach().clone()

    stored = exported(simulated(model, f"llama_cpp_{kind.lower()}"), tmp_path / "out")["blk.0.ffn_up.weight"]

    wanted = gguf.quants.quantize(original.numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.equal(torch.tensor(stored.data), torch.tensor(wanted))


def test_all_else_is_float32(tmp_path: Path) -> None:
    simulation = simulated(make("llama"), "mxfp4")

    tensors = exported(simulation, tmp_path / "out")

    weights = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "blk.1.ffn_down": "model.layers.1.mlp.down_proj",
    }
    assert all(
        torch.equal(torch.tensor(tensors[f"{name}.weight"].data), simulation.model.get_parameter(f"{path}.weight"))
        for name, path in weights.items()
    )


def test_the_codes_of_gptq_are_exported_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("qsim_gptq")
    simulation = simulated(make("llama"), "block(int4, 32, scale=fp16)", transforms=["gptq"])

    stored = exported(simulation, tmp_path / "out")["blk.0.attn_v.weight"]

    assert torch.equal(dequantized(stored), simulation.model.get_parameter("model.layers.0.self_attn.v_proj.weight"))


def test_the_file_describes_the_model(tmp_path: Path) -> None:
    exported(simulated(make("llama"), "mxfp4"), tmp_path / "out")

    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields

    wanted = {"general.architecture": "llama", "llama.block_count": 2, "llama.attention.head_count_kv": 2}
    assert {name: fields[name].contents() for name in wanted} == wanted


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            {"weights": "block(int4, 32)"},
            r"does not hold block\(int4, n=32\) exactly; it holds block\(int4, 32, scale=fp16\)",
        ),
        ({"weights": "block(int4, 32, symmetric=false, scale=fp16)"}, "it holds .* without zero points"),
        ({"weights": "block(int4, 32, scale=scaled(fp16))"}, "does not hold .* exactly"),
        ({"weights": "channel(int8)"}, "does not hold channel"),
        ({"weights": "nvfp4"}, "multiplies by the global scale last"),
        (
            {"weights": "scaled(e2m1, 16, scale=scaled(e4m3, rule=ceil))", "skip": ["lm_head"]},
            r"blocks of 64 \(NVFP4\) do not divide its 96 inputs",
        ),
    ],
)
def test_a_recipe_that_no_block_holds_is_refused(recipe: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(qsim.RecipeError, match=message):
        exported(simulated(make("llama"), **recipe), tmp_path / "out")


def test_inputs_have_no_place_in_the_file(tmp_path: Path) -> None:
    attention = dict.fromkeys(("queries", "keys", "probabilities", "values"))
    recipe = qsim.Recipe.of({"weights": "mxfp4", "activations": "int8", "skip": SKIPPED, **attention})
    simulation = qsim.simulate(make("llama"), recipe, example={"input_ids": IDS})

    with pytest.raises(qsim.RecipeError, match="gguf holds weights only; leave activations out"):
        exported(simulation, tmp_path / "out")


def with_experts(family: str, **options: Any) -> Any:
    """A language model of one layer with four experts, whose rows are whole blocks."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    moe = {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    more = {"intermediate_size": 64, "shared_expert_intermediate_size": 64, "norm_topk_prob": family == "qwen3_moe"}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | moe | more | options)).eval()


@pytest.mark.parametrize(
    ("family", "weights"),
    [
        ("qwen3_moe", "block(int4, 32, scale=fp16)"),
        ("qwen3_moe", "llama_cpp_q8_0"),
        ("qwen2_moe", "mxfp4"),
    ],
)
def test_experts_are_written_as_the_stacks_of_llama_cpp(family: str, weights: str, tmp_path: Path) -> None:
    simulation = simulated(with_experts(family), weights, skip=["lm_head", "*gate"])

    tensors = exported(simulation, tmp_path / "out")

    wanted = simulation.encoded()["model.layers.0.mlp.experts.gate_up_proj"].decode().chunk(2, 1)
    for name, part in zip(("ffn_gate_exps", "ffn_up_exps"), wanted, strict=True):
        assert torch.equal(dequantized(tensors[f"blk.0.{name}.weight"]), part)


def test_a_file_with_experts_is_read_to_the_same_bits(tmp_path: Path) -> None:
    simulation = simulated(with_experts("qwen3_moe"), "mxfp4", skip=["lm_head", "*gate", "*down_proj"])
    exported(simulation, tmp_path)

    from qsim_interop.gguf_model import _File

    weights, _ = _File(str(tmp_path / "model.gguf")).weights()

    plain = simulation.folded_state_dict()[0]
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.items() if "gate_up" not in name)


@pytest.mark.parametrize(
    ("weights", "options", "error", "message"),
    [
        (
            "scaled(e2m1, 16, scale=scaled(e4m3, rule=ceil))",
            {"hidden_size": 64, "moe_intermediate_size": 64},
            qsim.RecipeError,
            "gate_up_proj stacks experts, each with scales of its own for more than a row",
        ),
        ("mxfp4", {"norm_topk_prob": False}, qsim.ModelError, "runs qwen3_moe with norm_topk_prob=True alone"),
        ("mxfp4", {"decoder_sparse_step": 2, "num_hidden_layers": 2}, qsim.ModelError, "with experts in every layer"),
    ],
)
def test_experts_that_a_file_does_not_hold_are_refused(
    weights: str, options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    simulation = simulated(with_experts("qwen3_moe", **options), weights, skip=["lm_head", "*gate"])

    with pytest.raises(error, match=message):
        exported(simulation, tmp_path / "out")


@pytest.mark.parametrize("to", ["onnx", "torchao"])
def test_formats_without_experts_say_so(to: str, tmp_path: Path) -> None:
    simulation = simulated(with_experts("qwen3_moe"), "block(int8, 32)", skip=["lm_head", "*gate"])

    with pytest.raises(qsim.RecipeError, match="gate_up_proj stacks the experts of a Qwen3MoeExperts; such files hold"):
        export(simulation, qsim.LoadedModel(simulation.model), to, tmp_path / "out")


def test_another_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(qsim.ModelError, match="gguf files of opt are not written; those of llama, mistral"):
        exported(simulated(make("opt"), "mxfp4", skip=["lm_head"]), tmp_path / "out")
