"""`qsim evaluate` on a GGUF file: the codes in it, under the names of transformers, and nothing rounded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from families import make, tokens
from qsim_interop.reading import open_checkpoint
from qsim_interop.writing import export
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import qsim_core as qsim
from qsim_core.cli.main import main
from qsim_core.evaluation.locate import locate
from qsim_core.testing import AdapterSuite

gguf = pytest.importorskip("gguf")

IDS = tokens()
EXACT = {
    "block(int4, 32, scale=fp16)": "block(int(4, narrow=false), n=32, scale=fp16)",
    "llama_cpp_q8_0": "block(int8, n=32, scale=fp16)",
    "mxfp4": "mxfp4",
    "scaled(e2m1, 16, scale=scaled(e4m3, rule=ceil))": "nvfp4",
}
"""Quantizers of weights, and those that their blocks in a file stand for."""
CHARACTERS = [chr(33 + n) for n in range(94)] + ["\u0120", "AB"]


def simulated(
    weights: str, family: str = "llama", skip: tuple[str, ...] = ("lm_head", "*.down_proj")
) -> qsim.Simulation:
    return qsim.simulate(make(family), weights=weights, skip=skip, example={"input_ids": IDS})


def exported(simulation: qsim.Simulation, folder: Path, tokenizer: bool = True) -> Path:
    """The GGUF file of a simulated model, with a tokenizer of single characters beside it."""
    made = Tokenizer(models.BPE({chr(32 + n): n for n in range(64)}, []))
    beside = PreTrainedTokenizerFast(tokenizer_object=made, unk_token=" ") if tokenizer else None
    export(simulation, qsim.LoadedModel(simulation.model, beside), "gguf", folder)
    return folder / "model.gguf"


def rewritten(file: Path, fields: dict[str, Any] | None = None, **tensors: tuple[str, np.ndarray] | None) -> Path:
    """The same file with other fields, and with other tensors: type and bytes by name, None for one to leave out."""
    read = gguf.GGUFReader(file)
    new = gguf.GGUFWriter(file.with_suffix(".new"), "llama")
    for key, field in read.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture" and key not in (fields or {}):
            sub = field.types[1] if len(field.types) > 1 else None
            new.add_key_value(key, field.contents(), field.types[0], sub_type=sub)
    for key, value in (fields or {}).items():
        new.add_key_value(
            key, value, gguf.GGUFValueType.ARRAY if isinstance(value, list) else gguf.GGUFValueType.STRING
        )
    kept = {one.name: (one.tensor_type.name, one.data) for one in read.tensors}
    given = {name.replace("__", "."): one for name, one in tensors.items()}
    for name, found in {**kept, **given}.items():
        if found is not None:
            packed = found[1].dtype == np.uint8
            new.add_tensor(name, found[1], raw_dtype=gguf.GGMLQuantizationType[found[0]] if packed else None)
    new.write_header_to_file()
    new.write_kv_data_to_file()
    new.write_tensors_to_file()
    new.close()
    return file.with_suffix(".new").rename(file)


def loaded(file: Path) -> qsim.LoadedModel:
    located = locate(str(file), qsim.Host())
    return located.adapter.load(located.source, torch.float32)


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(
        main, ["evaluate", *map(str, arguments), "--set", "perplexity.seqlen=64", "-q", "--json", "-"]
    )


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("ABCDEFGHIJKLMNOPQRSTUVWXYZ" * 10)
    return path


class TestGGUFModel(AdapterSuite):
    text = "gguf"

    def checkpoint(self, folder: Path) -> Path:
        return exported(simulated("mxfp4"), folder / "model")


@pytest.mark.parametrize("weights", EXACT)
def test_the_model_has_the_weights_of_the_file_to_the_bit(weights: str, tmp_path: Path) -> None:
    simulation = simulated(weights)

    model = loaded(exported(simulation, tmp_path / "out"))

    wanted = {name: one.decode() for name, one in simulation.encoded().items()}
    plain = {name: value for name, value in simulation.model.state_dict().items() if name not in wanted}
    assert all(torch.equal(model.model.state_dict()[name], value) for name, value in {**plain, **wanted}.items())
    assert set(model.final) == set(wanted)
    with torch.no_grad():
        torch.testing.assert_close(model.model(IDS).logits, simulation.model(IDS).logits, atol=1e-6, rtol=0)


def test_they_are_the_weights_that_transformers_reads(tmp_path: Path) -> None:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    file = exported(simulated("block(int4, 32, scale=fp16)"), tmp_path / "out")

    model = loaded(file).model

    theirs = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]
    assert all(torch.equal(model.get_parameter(name), value) for name, value in theirs.items())
    assert len(theirs) == len(model.state_dict())


@pytest.mark.parametrize(("weights", "text"), EXACT.items())
def test_its_recipe_has_the_quantizers_that_qsim_check_reads(weights: str, text: str, tmp_path: Path) -> None:
    file = exported(simulated(weights), tmp_path / "out")

    stored = locate(str(file), qsim.Host()).stored

    assert stored is not None
    assert {str(layer.weights) for layer in open_checkpoint(file).layers} == {text}
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
    assert stored.recipe.record()["overrides"] == {f"*.{layer}": {"weights": text} for layer in layers}


def test_a_directory_with_one_file_is_evaluated(text: Path, tmp_path: Path) -> None:
    file = exported(simulated("block(int4, 32, scale=fp16)"), tmp_path / "out")

    run = evaluate(file.parent, "--data", text)

    result = json.loads(run.stdout)
    assert run.exit_code == 0, run.output
    assert result["model"] == str(file)
    assert result["simulated"] == result["baseline"]
    assert 4.4 < result["audit"]["bits_per_weight"] < 32
    assert "its weights are stored quantized, as gguf (Q4_0), and none is rounded again" in run.stderr


def test_inputs_may_be_quantized_as_llama_cpp_does(text: Path, tmp_path: Path) -> None:
    file = exported(simulated("block(int4, 32, scale=fp16)"), tmp_path / "out")

    result = json.loads(evaluate(file, "--data", text, "--activations", "llama_cpp_q8_0").stdout)

    assert result["simulated"] != result["baseline"]


def test_the_values_of_another_type_are_evaluated_and_the_result_says_so(text: Path, tmp_path: Path) -> None:
    octets = np.full((32, 2 * 24), 7, np.uint8)
    file = rewritten(exported(simulated("mxfp4"), tmp_path / "out"), blk__0__attn_v__weight=("Q5_1", octets))

    run = evaluate(file, "--data", text)

    value = loaded(file).model.get_parameter("model.layers.0.self_attn.v_proj.weight")
    assert torch.equal(value, torch.from_numpy(gguf.quants.dequantize(octets, gguf.GGMLQuantizationType.Q5_1)))
    assert "Q5_1: qsim has no such quantizer; the values are those that gguf dequantizes" in run.stderr


def test_the_tokenizer_in_the_file_is_used(text: Path, tmp_path: Path) -> None:
    file = exported(simulated("mxfp4"), tmp_path / "out", tokenizer=False)
    fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": CHARACTERS, "tokenizer.ggml.merges": ["A B"]}

    tokenizer = loaded(rewritten(file, fields)).tokenizer

    assert tokenizer("ABBA")["input_ids"] == [CHARACTERS.index(one) for one in ("AB", "B", "A")]


def test_a_tokenizer_of_sentencepiece_in_the_file_is_used(tmp_path: Path) -> None:
    file = exported(simulated("mxfp4"), tmp_path / "out", tokenizer=False)
    pieces = ["<unk>", "<s>", "</s>", "▁", "A", "B", "AB", "▁AB"]
    fields = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": pieces, "tokenizer.ggml.merges": ["A B"]}
    fields |= {"tokenizer.ggml.scores": [-float(place) for place in range(8)]}
    fields |= {"tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1]}

    tokenizer = loaded(rewritten(file, fields)).tokenizer

    assert tokenizer.convert_ids_to_tokens(tokenizer("ABBA", add_special_tokens=False)["input_ids"])[-2:] == ["B", "A"]


def test_without_a_tokenizer_it_is_one_line(text: Path, tmp_path: Path) -> None:
    file = exported(simulated("mxfp4"), tmp_path / "out", tokenizer=False)

    run = evaluate(file, "--data", text)

    assert run.stderr.startswith(f"Error: transformers cannot make the tokenizer of {file} (")
    assert run.stderr.endswith("; put the tokenizer.json of the model beside the file\n")
    assert run.stderr.count("\n") == 1


def test_a_tied_head_has_the_codes_of_the_embedding(tmp_path: Path) -> None:
    file = exported(simulated("mxfp4"), tmp_path / "out")
    values = np.random.default_rng(0).standard_normal((96, 64), dtype=np.float32)
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)

    found = rewritten(file, token_embd__weight=("Q8_0", packed), output__weight=None)

    located, model = locate(str(found), qsim.Host()), loaded(found)
    wanted = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))
    assert torch.equal(model.model.lm_head.weight, wanted)
    assert located.stored is not None
    assert located.stored.recipe.record()["overrides"]["lm_head"] == {"weights": "block(int8, n=32, scale=fp16)"}
    assert "*.embed_tokens" not in located.stored.recipe.record()["overrides"]


def test_frequencies_of_the_rotary_embedding_are_divided_as_llama_cpp_does(tmp_path: Path) -> None:
    file, factors = exported(simulated("mxfp4"), tmp_path / "out"), np.linspace(1, 8, 8, dtype=np.float32)
    before = loaded(file).model.model.rotary_emb.inv_freq.clone()

    model = loaded(rewritten(file, rope_freqs__weight=("F32", factors))).model

    assert torch.equal(model.model.rotary_emb.inv_freq, before / torch.from_numpy(factors))


def test_a_file_without_packed_tensors_is_a_model_like_any_other(text: Path, tmp_path: Path) -> None:
    file = exported(simulated("mxfp4"), tmp_path / "out")
    tensors = gguf.GGUFReader(file).tensors
    plain = {one.name: ("F32", gguf.quants.dequantize(one.data, one.tensor_type)) for one in tensors}

    result = json.loads(evaluate(rewritten(file, **plain), "--data", text, "--weights", "int4").stdout)

    assert result["recipe"]["weights"] == "channel(int4)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"fields": {"llama.rope.scaling.type": "longrope"}},
            "scales its rotary embedding (longrope); linear and yarn, ",
        ),
        (
            {"blk__0__attn_v__weight": None},
            "lacks blk.0.attn_v.weight, which is model.layers.0.self_attn.v_proj.weight",
        ),
    ],
)
def test_a_file_that_is_not_read_is_one_line(change: dict[str, Any], message: str, text: Path, tmp_path: Path) -> None:
    file = rewritten(exported(simulated("mxfp4"), tmp_path / "out"), **change)

    run = evaluate(file, "--data", text)

    assert run.exit_code == 1
    assert message in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_file_of_another_family_is_one_line(text: Path, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "falcon")
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    run = evaluate(tmp_path / "m.gguf", "--data", text)

    assert "m.gguf holds a model of falcon; of GGUF files, llama, mistral, qwen2, qwen3, qwen2_moe, " in run.stderr


def test_of_several_files_one_has_to_be_named(text: Path, tmp_path: Path) -> None:
    file = exported(simulated("mxfp4"), tmp_path / "out")
    (file.parent / "other.gguf").write_bytes(file.read_bytes())

    run = evaluate(file.parent, "--data", text)

    assert run.stderr == f"Error: {file.parent} holds 2 models, model.gguf and other.gguf among them; name one\n"


def test_it_is_exported_again_with_the_codes_that_it_has(tmp_path: Path) -> None:
    simulation = simulated("block(int4, 32, scale=fp16)")
    file = exported(simulation, tmp_path / "out")

    run = CliRunner().invoke(
        main, ["export", str(file), "--to", "compressed-tensors", "--output", str(tmp_path / "ct")]
    )

    assert run.exit_code == 0, run.output
    checkpoint = open_checkpoint(tmp_path / "ct")
    wanted = simulation.encoded()
    assert all(torch.equal(checkpoint.dequantize(one), wanted[one.weight].decode()) for one in checkpoint.layers)
    assert len(checkpoint.layers) == len(wanted)
