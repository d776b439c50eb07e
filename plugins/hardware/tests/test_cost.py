"""`qsim cost`: models from their configurations alone, prompt and tokens, bytes of weights and caches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import qsim_core as qsim
from qsim_core.cli.main import main
from qsim_core.evaluation.locate import locate

Write = Callable[..., Path]
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 50,
}
BERT = {
    "architectures": ["BertForMaskedLM"],
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 50,
}
VIT = {
    "architectures": ["ViTForImageClassification"],
    "model_type": "vit",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 4,
    "d_ff": 64,
    "num_layers": 1,
    "vocab_size": 50,
    "is_encoder_decoder": True,
}
BART = {
    "architectures": ["BartForConditionalGeneration"],
    "model_type": "bart",
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 50,
}
OPT_66B = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "hidden_size": 9216,
    "ffn_dim": 36864,
    "num_hidden_layers": 64,
    "num_attention_heads": 72,
    "word_embed_proj_dim": 9216,
    "vocab_size": 50272,
    "torch_dtype": "float16",
}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a configuration, with changes, into a directory."""

    def written(configuration: dict[str, Any], **changes: Any) -> Path:
        (tmp_path / "config.json").write_text(json.dumps({**configuration, **changes}))
        return tmp_path

    return written


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["cost", *map(str, arguments)])


def report(*arguments: object) -> dict[str, Any]:
    outcome = run(*arguments, "--json", "-")
    assert outcome.exit_code == 0, outcome.output
    found: dict[str, Any] = json.loads(outcome.stdout)
    return found


def phases(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {phase["name"]: phase for phase in found["phases"]}


def operations(left: torch.Size, right: torch.Size, *rest: Any, **named: Any) -> int:
    """Count the operations of a product; positions times frequencies, an outer product, add nothing up."""
    return 2 * left.numel() * right[-1] if left[-1] > 1 else 0


@pytest.mark.parametrize("configuration", [LLAMA, BERT, VIT], ids=lambda configuration: configuration["model_type"])
def test_the_operations_of_a_forward_are_those_that_torch_counts(configuration: dict[str, Any], write: Write) -> None:
    located = locate(str(write(configuration)), qsim.Host())
    model: Any = located.adapter.outline(located.source, torch.bfloat16)
    inputs = torch.zeros(3, 16, dtype=torch.long, device="meta")
    if configuration is VIT:
        inputs = torch.zeros(3, 3, 32, 32, dtype=torch.bfloat16, device="meta")
    counted = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.bmm: operations})
    with counted as counter, sdpa_kernel(SDPBackend.MATH):
        model(inputs)

    found = report(located.source, "--batch", 3, "--prompt", 16)

    assert found["phases"][0]["flops"] == counter.get_total_flops()


def test_a_token_by_hand(write: Write) -> None:
    found = phases(report(write(LLAMA), "--prompt", 10, "--generate", 3))

    weights = 2 * (64 * 64 * 2 + 64 * 16 * 2 + 3 * 64 * 96) + 64 * 50
    assert list(found) == ["prompt", "first token", "last token"]
    for name, read in {"first token": 11, "last token": 13}.items():
        assert found[name]["flops"] == 2 * (weights + 2 * 2 * 64 * read)
        assert found[name]["bops"] == found[name]["flops"] // 2 * 16 * 16


def test_bytes_of_a_token_by_hand_keys_and_values_once_for_all_heads_that_share_them(write: Write) -> None:
    found = phases(report(write(LLAMA), "--prompt", 10, "--generate", 1))["token"]

    weights = 2 * (64 * 64 * 2 + 64 * 16 * 2 + 3 * 64 * 96) + 64 * 50
    inputs = 2 * (4 * 64 + 2 * 64 + 96) + 64
    outputs = 2 * (2 * 64 + 2 * 16 + 2 * 96 + 64) + 50
    attention = 2 * (64 + 2 * 11 * 8 + 64)  # queries, scores, probabilities, results
    cache = 2 * 2 * 11 * 2 * 8
    assert found["bytes"] == 2 * (weights + inputs + outputs + attention + cache)


def test_weights_and_cache_count_their_scales(write: Write) -> None:
    recipe = "--weights", "block(int4, 32)", "--kv-cache", "token(int8)", "--skip", "none"
    found = report(write(LLAMA), "--prompt", 16, "--batch", 2, *recipe)

    weights = 2 * (64 * 64 * 2 + 64 * 16 * 2 + 3 * 64 * 96) + 64 * 50
    assert found["weight_bytes"] == weights * 5 / 8
    assert found["weight_bits"] == 5
    assert found["other_bytes"] == 2 * (64 * 50 + 5 * 64)
    keys, values = (8 + 32 / 8), (8 + 32 / 16)  # a scale for each token's head, and for 16 tokens of a channel
    assert found["cache_bytes"] == 2 * 2 * 2 * 16 * 8 * (keys + values) / 8


def test_a_token_reads_the_weights_of_its_experts_alone(write: Write) -> None:
    found = report(write(MIXTRAL), "--prompt", 16, "--generate", 1, "--on", "h100")

    prompt, token = (phase["costs"]["h100"]["sites"] for phase in found["phases"])
    site = "model.layers.0.mlp.experts.gate_up_proj"
    assert prompt[site]["bytes"] == 2 * (8 * 64 * 192 + 32 * 64 + 32 * 192)
    assert token[site]["bytes"] == 2 * (2 * 64 * 192 + 2 * 64 + 2 * 192)


def test_a_tied_weight_is_read_by_a_product_and_counted_once(write: Write) -> None:
    found = report(write(LLAMA, tie_word_embeddings=True))

    assert found["other_bytes"] == 2 * 5 * 64


def test_the_whole_generation_is_the_prompt_and_its_tokens(write: Write) -> None:
    found = report(write(LLAMA), "--prompt", 10, "--generate", 4, "--batch", 2, "--on", "h100", "--on", "area")

    prompt, first, last = (phase["costs"]["h100"]["totals"]["seconds"] for phase in found["phases"])
    seconds = prompt + 4 * (first + last) / 2
    assert found["generation"]["h100"]["totals"]["seconds"] == pytest.approx(seconds)
    assert found["generation"]["h100"]["tokens_per_second"] == pytest.approx(2 * 4 / seconds)
    assert found["generation"]["area"]["totals"] == {}


def test_a_model_that_does_not_continue_texts_has_one_forward(write: Write) -> None:
    found = report(write(BERT), "--prompt", 8)

    assert [phase["name"] for phase in found["phases"]] == ["forward"]
    assert found["cache_bytes"] is None and found["generation"] == {}
    assert found["notes"] == ["the model does not continue texts: one forward is counted, and no decoding"]


@pytest.mark.slow  # other tests price smaller configurations
def test_opt_66b_is_priced_from_its_configuration_alone(write: Write) -> None:
    found = report(write(OPT_66B) / "config.json", "--precision", "w4a8", "--on", "a100", "--products-only")

    weights = 64 * (4 * 9216**2 + 2 * 9216 * 36864)
    head = 50272 * 9216 * 16  # the adapter leaves it alone
    rows = 64 * (4 * 9216 + 36864 + 9216)
    assert found["weight_bytes"] == pytest.approx((weights * 4 + rows * 32 + head) / 8)
    first = phases(found)["first token"]["costs"]["a100"]
    assert first["totals"]["seconds"] == pytest.approx(found["weight_bytes"] / 2039e9, rel=0.02)
    assert first["sites"]["model.decoder.layers.0.fc1"]["unit"] == "int8"


def test_the_table_has_totals_sites_and_assumptions(write: Write) -> None:
    outcome = run(write(LLAMA), "--precision", "w8a8", "--on", "h100", "--on", "energy", "--skip", "*.mlp.up_proj")

    told = " ".join(outcome.stdout.split())
    assert outcome.exit_code == 0, outcome.output
    for part in ("first token", "BOPs", "h100: seconds", "*.mlp.down_proj", "energy: joules", "tokens a second"):
        assert part in told
    assert "left alone: *.mlp.up_proj" in told and "no overlap, no fusion" in told and "Horowitz's table" in told


def test_a_device_of_ones_own_is_a_file(write: Write, tmp_path: Path) -> None:
    chip = tmp_path / "chip.yaml"
    chip.write_text("roofline:\n  flops: {int8: 1e12, bf16: 5e11}\n  bandwidth: 1e11\n")

    found = report(write(LLAMA), "--precision", "w8a8", "--on", chip, "--prompt", 8)

    (name,) = found["phases"][0]["costs"]
    assert qsim.parse(name) == qsim.parse("roofline([[int8, 1e12], [bf16, 5e11]], bandwidth=1e11)")


def test_transforms_are_left_out_and_named(write: Write) -> None:
    found = report(write(LLAMA), "--precision", "w4a16", "--plugin", "smoothquant", "--prompt", 8, "--generate", 2)

    assert found["notes"][0].startswith(
        "transforms change values and are left out, with what they add to a forward but "
    )


def test_more_tokens_than_positions_are_doubtful(write: Write) -> None:
    found = report(write(LLAMA), "--prompt", 60, "--generate", 8)

    assert found["notes"] == ["68 tokens are more than the 64 positions that the model was made for"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("roofline: {flops: {int8: 1e12}, bandwidth: .inf}", "bandwidth should be a finite number, not inf"),
        ("energy: {dram: .nan}", "dram should be a finite number, not nan"),
        ("roofline: [1", "chip.yaml is not YAML"),
        ("roofline: 3", "chip.yaml is no hardware"),
    ],
)
def test_a_file_that_is_no_device_is_one_line(text: str, message: str, write: Write, tmp_path: Path) -> None:
    chip = tmp_path / "chip.yaml"
    chip.write_text(text)

    outcome = run(write(LLAMA), "--on", chip)

    assert message in outcome.stderr and outcome.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, ["--on", "h10"], "no hardware 'h10'; did you mean 'h100'?"),
        ({}, ["--on", "int4"], "'int4' is a format, not hardware"),
        ({}, ["--on", "missing.yaml"], "missing.yaml"),
        ({}, ["--weights", "int99"], "no quantizer 'int99'"),
        ({}, ["--dtype", "bfloat"], "no dtype 'bfloat'; did you mean 'bfloat16'?"),
        ({}, ["--precision", "w4a8", "--skip", "nowhere"], "pattern 'nowhere' matches no site"),
        ({}, ["--batch", "2147483647", "--prompt", "2147483647"], "cannot run without values: Storage size"),
        ({"hidden_size": "wide"}, [], "cannot be built from its configuration: "),
        ({"architectures": ["NoSuchForCausalLM"]}, [], "NoSuchForCausalLM"),
        ({"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], "vocab_size": 51865,
          "encoder_attention_heads": 4, "decoder_attention_heads": 4}, [],
         "the inputs of WhisperForConditionalGeneration are neither tokens nor images; "),
        ({"model_type": "longformer", "architectures": ["LongformerForMaskedLM"], "attention_window": [4, 4]}, [],
         "LongformerForMaskedLM cannot run without values: "),
    ],
)  # fmt: skip
def test_what_cannot_be_priced_is_one_line(
    changes: dict[str, Any], arguments: list[str], message: str, write: Write
) -> None:
    outcome = run(write(LLAMA, **changes), *arguments)

    assert outcome.exit_code == 1
    assert message in outcome.stderr and outcome.stderr.count("\n") == 1


def test_a_failure_of_too_many_tokens_says_so(write: Write) -> None:
    outcome = run(write(LLAMA), "--batch", 2**31 - 1, "--prompt", 2**31 - 1, "--generate", 0)

    assert outcome.stderr.endswith("; 2147483647 tokens are more than the 64 positions that the model was made for\n")


CHIP = "roofline([[bf16, 1e12]], bandwidth=1e9, float32=1e11)"
ROWS, HIDDEN, INNER, HEADS, SHARED, DEPTH = 16, 64, 96, 8, 2, 8
"""The sizes of one layer of LLAMA, and a prompt."""


def test_operations_between_products_are_those_of_a_layer_worked_out_by_hand(write: Write) -> None:
    prompt = phases(report(write(LLAMA, num_hidden_layers=1), "--prompt", ROWS))["prompt"]

    states, scores, angles = ROWS * HIDDEN, HEADS * ROWS * ROWS, ROWS * DEPTH
    q, k = ROWS * HEADS * DEPTH, ROWS * SHARED * DEPTH
    read_and_written = {
        "embedding": 2 * states,
        "three norms": 3 * 2 * states,
        "two residual sums": 2 * 3 * states,
        "softmax": 2 * scores,
        "silu": 2 * ROWS * INNER,
        "rotary": 2 * q + 2 * k + 2 * 2 * angles,
        "cosines and sines": 2 * 2 * angles,
    }
    operations = {
        "three norms": 3 * 4 * states,
        "two residual sums": 2 * states,
        "softmax": 5 * scores,
        "silu": 4 * ROWS * INNER,
        "rotary": 3 * (q + k),
        "cosines and sines": 2 * angles,
    }
    assert prompt["bytes_between"] == 2 * sum(read_and_written.values())  # bfloat16
    assert prompt["flops_between"] == sum(operations.values())


def test_an_operation_takes_the_time_of_its_bytes_or_of_its_arithmetic_in_float32(write: Write) -> None:
    prompt = phases(report(write(LLAMA), "--prompt", ROWS, "--on", CHIP))["prompt"]

    (cost,) = prompt["costs"].values()
    softmax = cost["sites"]["model.layers.0.self_attn:softmax.0"]
    assert softmax["seconds"] == pytest.approx(2 * 2 * HEADS * ROWS * ROWS / 1e9)
    assert (softmax["bound"], softmax["unit"]) == ("memory", "float32")


def test_the_recipe_says_how_wide_an_operation_reads_and_writes(write: Write) -> None:
    directory = write(LLAMA)
    found = report(directory, "--prompt", ROWS, "--operations", "{softmax: {input: cast(e4m3), output: cast(e4m3)}}")

    plain = phases(report(directory, "--prompt", ROWS))["prompt"]["bytes_between"]

    assert plain - phases(found)["prompt"]["bytes_between"] == 2 * 2 * HEADS * ROWS * ROWS


def test_products_alone_are_counted_on_demand(write: Write) -> None:
    found = phases(report(write(LLAMA), "--products-only", "--on", CHIP))["prompt"]

    assert found["bytes_between"] == 0
    (cost,) = found["costs"].values()
    assert "matmuls alone: no softmax, norms, embeddings or biases" in cost["assumptions"]


@pytest.mark.parametrize("products_only", [False, True])
@pytest.mark.parametrize("configuration", [LLAMA, BERT], ids=lambda configuration: configuration["model_type"])
def test_an_audit_prices_a_forward_as_the_command_does(
    configuration: dict[str, Any], products_only: bool, write: Write
) -> None:
    directory, only = write(configuration), ["--products-only"] if products_only else []
    same = ["--weights", "int4", "--skip", "none", "--dtype", "float32", "--on", CHIP, "--batch", 2, "--prompt", ROWS]
    (expected,) = report(directory, *same, *only)["phases"][0]["costs"].values()
    located = locate(str(directory), qsim.Host())
    chip: Any = qsim.Host().parse(CHIP, qsim.Hardware)
    model: Any = located.adapter.outline(located.source, torch.float32)
    model.set_attn_implementation("eager")  # others look at the values of masks
    example = {"input_ids": torch.zeros(2, ROWS, dtype=torch.long, device="meta")}

    with qsim.simulate(model, weights="int4", skip=()) as simulation:
        found = (chip.products_only() if products_only else chip).price(simulation, example)

    assert (found.totals, found.sites) == (expected["totals"], expected["sites"])


@pytest.mark.parametrize("option", ["--batch", "--prompt"])
def test_a_shape_of_zero_is_refused(option: str, write: Write) -> None:
    outcome = run(write(LLAMA), option, 0)

    assert outcome.exit_code == 2
    assert "0 is not in the range" in outcome.stderr


def test_a_directory_without_a_configuration_is_one_line(tmp_path: Path) -> None:
    outcome = run(tmp_path)

    assert outcome.exit_code == 1
    assert "has no config.json" in outcome.stderr


def test_a_decoder_reads_its_encoder_once_and_a_token_reads_both_caches(write: Write) -> None:
    found = phases(report(write(T5), "--prompt", 10, "--generate", 3))

    rows = 4 * 32 * 32 + 2 * 32 * 64  # the projections of one attention, and the feed-forward layers
    encoder = 2 * 10 * (rows + 2 * 10 * 32)
    crossing = 2 * 10 * 2 * 32 * 32  # keys and values of what the encoder has read
    decoder = {read: 2 * (rows + 2 * 32 * 32 + 2 * (read + 10) * 32 + 32 * 50) for read in (1, 2, 4)}
    assert found["prompt"]["flops"] == encoder + crossing + decoder[1]
    assert found["first token"]["flops"] == decoder[2]
    assert found["last token"]["flops"] == decoder[4]


@pytest.mark.parametrize("configuration", [T5, BART], ids=lambda configuration: configuration["model_type"])
def test_the_caches_of_a_decoder_hold_the_prompt_and_its_first_token(
    configuration: dict[str, Any], write: Write
) -> None:
    found = report(write(configuration), "--prompt", 10, "--generate", 3)

    assert found["cache_bytes"] == 2 * 2 * (10 + 1) * 32
