"""`qsim evaluate` on GGUF files of more families: experts, Gemma's norms, and scaled rotary embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import GROUPED, SIZES, WORDS, tokens
from click.testing import CliRunner
from qsim_interop.llama_cpp import NORMS_FROM_ONE, READ, tensors_of
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import qsim_core as qsim
from qsim_core.cli.main import main
from qsim_core.evaluation.locate import locate
from qsim_core.transforms.forward import call

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore")

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
SHARED = {"shared_expert_intermediate_size": 32, "norm_topk_prob": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "phi3": SIZES,
    "starcoder2": SIZES | {"num_key_value_heads": 2},
    "gemma2": GROUPED | {"query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    "gemma3_text": GROUPED | {"query_pre_attn_scalar": 8},
    "qwen2_moe": SIZES | {"num_key_value_heads": 2} | EXPERTS | SHARED,
    "qwen3_moe": GROUPED | EXPERTS,
    "gpt_oss": GROUPED
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
}
SCALED = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}
EXAMPLE = {"input_ids": tokens(), "use_cache": False}


def make(family: str, **options: Any) -> Any:
    """A tiny model with weights that Q8_0 holds exactly, and norms that are not 1."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES.get(family, GROUPED) | {"rope_theta": 5000.0} | options)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(torch.arange(len(parameter)) % 4 / 8)
                continue
            rows = parameter.transpose(1, 2) if is_stack(family, name) else parameter
            if rows.dim() > 1 and rows.shape[-1] % 32 == 0:
                codes = torch.randint(-126, 127, rows.shape)
                codes.unflatten(-1, (-1, 32))[..., 0] = 127
                rows.copy_(codes / 1024)
            elif family == "gpt_oss":
                rows.copy_(torch.randn(rows.shape) / 16)
    return model


def is_stack(family: str, name: str) -> bool:
    """True for a stack of gpt-oss' experts, [E, K, rows]."""
    return family == "gpt_oss" and "experts" in name and not name.endswith("_bias")


def projections(model: Any, name: str, values: Any, count: int) -> Any:
    """The tensors of llama.cpp that a parameter joins."""
    if model.config.model_type != "gpt_oss" or "experts" not in name:
        return values.chunk(count, -2 if values.dim() > 1 else 0)
    values = values.transpose(1, 2) if is_stack("gpt_oss", name) else values
    return (values[:, ::2], values[:, 1::2]) if count == 2 else (values,)


def written(model: Any, folder: Path, fields: dict[str, Any] | None = None, more: dict[str, Any] | None = None) -> Path:
    """The GGUF file of a model, layers in Q8_0 as `gguf` packs them, as llama.cpp's converter names them."""
    config = model.config
    name = READ[config.model_type]
    writer = gguf.GGUFWriter(folder / "model.gguf", name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(5000.0)
    writer.add_vocab_size(config.vocab_size)
    epsilon = getattr(config, "norm_epsilon", None)
    writer.add_layer_norm_eps(epsilon) if epsilon else writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type == "gpt_oss":
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_sliding_window(config.sliding_window)
    elif hasattr(config, "num_experts"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        writer.add_final_logit_softcapping(cap)
    for key, value in (fields or {}).items():
        kind = {str: "STRING", int: "UINT32", float: "FLOAT32"}[type(value)]
        writer.add_key_value(f"{name}.{key}", value, gguf.GGUFValueType[kind])
    state = model.state_dict()
    seen = set()
    for tensor, values in (more or {}).items():
        writer.add_tensor(tensor, values.numpy())
    for parameter, tensors in tensors_of(config, state).items():
        values = state[parameter] + (config.model_type in NORMS_FROM_ONE and parameter.endswith("norm.weight"))
        values = values.squeeze(0) if len(values) == 1 else values
        for tensor, part in zip(tensors, projections(model, parameter, values, len(tensors)), strict=True):
            packs = part.dim() > 1 and part.shape[-1] % 32 == 0 and not tensor.endswith(("gate_inp.weight", "bias"))
            numbers = np.ascontiguousarray(part.numpy())
            q8 = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quants.quantize(numbers, q8) if packs else numbers
            if tensor not in seen:
                writer.add_tensor(tensor, data, raw_dtype=q8 if packs else None)
            seen.add(tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    words = Tokenizer(models.BPE({chr(32 + n): n for n in range(WORDS["vocab_size"])}, []))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token=" ").save_pretrained(folder)
    return folder / "model.gguf"


def loaded(file: Path) -> qsim.LoadedModel:
    located = locate(str(file), qsim.Host())
    return located.adapter.load(located.source, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_the_one_that_was_written(family: str, tmp_path: Path) -> None:
    model = make(family)

    found = loaded(written(model, tmp_path)).model

    torch.testing.assert_close(call(found, EXAMPLE)[0], call(model, EXAMPLE)[0], atol=1e-6, rtol=1e-5)
    own = {name: value for name, value in model.state_dict().items() if not name.endswith("norm.weight")}
    assert all(torch.equal(found.state_dict()[name], value) for name, value in own.items())


@pytest.mark.parametrize(
    "family", sorted(FAMILIES.keys() - {"gpt_oss"})
)  # transformers reads other names than llama.cpp's
def test_its_weights_are_those_that_transformers_reads(family: str, tmp_path: Path) -> None:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    file = written(make(family), tmp_path)

    found = loaded(file).model

    theirs = load_gguf_checkpoint(file, return_tensors=True, model_to_load=found)["tensors"]
    assert theirs
    assert all(torch.equal(found.state_dict()[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("kind", SCALED)
def test_a_scaled_rotary_embedding_is_read(kind: str, tmp_path: Path) -> None:
    model = make("qwen3", rope_parameters=SCALED[kind] | {"rope_theta": 5000.0})
    fields = {"rope.scaling.type": kind, "rope.scaling.factor": 4.0}

    found = loaded(written(model, tmp_path, fields)).model

    assert torch.equal(found.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert torch.equal(call(found, EXAMPLE)[0], call(model, EXAMPLE)[0])


def test_longrope_is_read_with_its_factors(tmp_path: Path) -> None:
    long, short = [2.0, 4.0, 6.0, 8.0], [1.0, 1.25, 1.5, 1.75]
    rope = {"rope_type": "longrope", "rope_theta": 5000.0, "long_factor": long, "short_factor": short}
    rope |= {"original_max_position_embeddings": 4, "attention_factor": 1.25}
    model = make("phi3", rope_parameters=rope, original_max_position_embeddings=4)
    tensors = {f"rope_factors_{name}.weight": torch.tensor(one) for name, one in (("long", long), ("short", short))}
    fields = {"rope.scaling.original_context_length": 4, "rope.scaling.attn_factor": 1.25}

    found = loaded(written(model, tmp_path, fields, tensors)).model

    for ids in (EXAMPLE["input_ids"], EXAMPLE["input_ids"][:, :3]):
        example = EXAMPLE | {"input_ids": ids}
        torch.testing.assert_close(call(found, example)[0], call(model, example)[0], atol=1e-6, rtol=1e-5)
    assert found.config.rope_parameters["long_factor"] == long


def test_experts_are_in_the_recipe_and_in_the_audit(tmp_path: Path) -> None:
    file = written(make("qwen3_moe"), tmp_path)
    stored = locate(str(file), qsim.Host()).stored
    model = loaded(file)

    assert stored is not None
    simulation = qsim.simulate(model.model, stored.recipe, example=EXAMPLE, final=model.final)

    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert stored.recipe.record()["overrides"]["*.gate_up_proj"] == {"weights": "block(int8, n=32, scale=fp16)"}
    assert torch.equal(simulation.encoded()[name].decode(), model.model.get_parameter(name))


def test_check_lists_experts(tmp_path: Path) -> None:
    file = written(make("qwen3_moe"), tmp_path)

    run = CliRunner().invoke(main, ["check", str(file)])

    assert run.exit_code == 0, run.output
    assert "'*.ffn_gate_exps':\n    weights: block(int8, n=32, scale=fp16)" in run.output


def test_the_experts_of_gpt_oss_are_encoded_with_a_rotary_embedding_that_is_scaled(tmp_path: Path) -> None:
    scaled = SCALED["yarn"] | {"rope_theta": 5000.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    model = make("gpt_oss", rope_parameters=scaled)
    fields = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}

    found = loaded(written(model, tmp_path, fields))

    simulation = qsim.simulate(
        found.model, locate(str(tmp_path / "model.gguf"), qsim.Host()).stored.recipe, example=EXAMPLE, final=found.final
    )
    name = "model.layers.0.mlp.experts.gate_up_proj"
    torch.testing.assert_close(call(found.model, EXAMPLE)[0], call(model, EXAMPLE)[0], atol=1e-6, rtol=1e-5)
    assert torch.equal(simulation.encoded()[name].decode(), model.get_parameter(name))


@pytest.mark.parametrize(
    ("family", "layers", "wanted"),
    [
        ("gemma2", 46, 16),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("gemma2", 42, 8), ("gemma3_text", 62, 16))),
    ],
)
def test_gemma_of_27b_scales_scores_by_hidden_size_over_heads(
    family: str, layers: int, wanted: int, tmp_path: Path
) -> None:
    sizes = {"num_hidden_layers": layers, "hidden_size": 64, "head_dim": 8, "num_attention_heads": 4}
    model = make(family, **sizes, query_pre_attn_scalar=wanted)

    found = loaded(written(model, tmp_path)).model

    assert found.config.query_pre_attn_scalar == wanted
    torch.testing.assert_close(call(found, EXAMPLE)[0], call(model, EXAMPLE)[0], atol=1e-5, rtol=1e-4)
