"""`QsimConfig` in transformers: the simulation's numbers, saved and reloaded, under PEFT, Trainer and generate."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import write_stable_diffusion
from qsim_transformers import QsimConfig, save_pretrained
from qsim_transformers.pretrained import load_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

import qsim_core as qsim

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT
RECIPE = {"weights": "int4", "activations": "int8", "outputs": "bf16"}
IDS = torch.arange(24).view(2, 12) % 60


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights, as `save_pretrained` writes it."""
    shape = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(shape).save_pretrained(path)
    return path


def load(path: Path, **recipe: Any) -> Any:
    config = {"quantization_config": QsimConfig(**recipe)} if recipe else {}
    return AutoModelForCausalLM.from_pretrained(path, **config).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def test_it_gives_the_numbers_of_the_simulation(directory: Path) -> None:
    plain = load(directory)
    with qsim.simulate(plain, RECIPE | {"skip": ["lm_head"]}):
        wanted = logits(plain)

    assert torch.equal(logits(load(directory, **RECIPE)), wanted)


def test_a_saved_model_is_loaded_with_the_same_bits(directory: Path, tmp_path: Path) -> None:
    model = load(directory, **RECIPE, overrides={"*.mlp.*": {"weights": "int8"}})

    model.save_pretrained(tmp_path)

    assert torch.equal(logits(load(tmp_path)), logits(model))
    assert torch.equal(load(tmp_path).state_dict()["model.norm.weight"], model.state_dict()["model.norm.weight"])


HELD = {"weights": "channel(int4, gradient=lsq)", "activations": "tensor(int8, static=true)", "skip": ["lm_head"]}
"""A recipe whose sites hold static and learned scales."""


def held(directory: Path) -> qsim.Simulation:
    """A simulation whose scales come from calibration data, and have moved since."""
    simulation = qsim.simulate(load(directory), HELD, calibration=[{"input_ids": IDS}])
    with torch.no_grad():
        for name, parameter in simulation.model.named_parameters():
            if "qsim_steps" in name:
                parameter.mul_(1.1)
    return simulation


def test_what_sites_hold_is_saved_with_the_model(directory: Path, tmp_path: Path) -> None:
    simulation = held(directory)

    save_pretrained(simulation, tmp_path / "once")
    once = load(tmp_path / "once")
    once.save_pretrained(tmp_path / "twice")
    twice = load(tmp_path / "twice")

    assert torch.equal(logits(once), logits(simulation.model))
    assert torch.equal(logits(twice), logits(simulation.model))
    assert once.state_dict().keys() == load(directory).state_dict().keys()


def test_the_model_that_was_saved_stays_as_it_was(directory: Path, tmp_path: Path) -> None:
    simulation = held(directory)

    save_pretrained(simulation, tmp_path / "simulated")
    simulation.restore().save_pretrained(tmp_path / "plain")

    assert torch.equal(logits(load(tmp_path / "plain")), logits(load(directory)))


def test_qsim_itself_takes_the_weights_as_they_are(directory: Path, tmp_path: Path) -> None:
    save_pretrained(held(directory), tmp_path)

    model = load_model(LlamaForCausalLM, str(tmp_path), torch.float32)

    assert torch.equal(logits(model), logits(load(directory)))


@pytest.mark.parametrize(
    ("recipe", "example", "line"),
    [
        (
            {"transforms": ["gptq"]},
            {"input_ids": IDS},
            "on its grid for good; a model that trains cannot be saved with it",
        ),
        ({}, IDS, "give simulate an example as a mapping, like"),
    ],
)
def test_what_cannot_be_saved_is_one_line(
    recipe: dict[str, Any], example: Any, line: str, directory: Path, tmp_path: Path
) -> None:
    pytest.importorskip("qsim_gptq")
    simulation = qsim.simulate(load(directory), {"weights": "int4", **recipe}, calibration=[example] * 8)

    with pytest.raises(qsim.QsimError, match=line):
        save_pretrained(simulation, tmp_path / "out")


def test_a_directory_without_the_scales_is_one_line(directory: Path, tmp_path: Path) -> None:
    save_pretrained(held(directory), tmp_path)
    shutil.copy(directory / "model.safetensors", tmp_path)

    with pytest.raises(qsim.ModelError, match="scales are saved with the weights, and no file holds qsim_state"):
        load(tmp_path)


def test_the_output_layer_is_quantized_if_skip_says_so(directory: Path) -> None:
    model = load(directory, **RECIPE, skip=[])

    audit = model.hf_quantizer.simulation.audit({"input_ids": IDS})

    assert next(site for site in audit.sites if site.site == "lm_head").weight == "channel(int4)"


def test_dequantize_gives_the_model_back(directory: Path) -> None:
    model = load(directory, **RECIPE)

    model.dequantize()

    assert torch.equal(logits(model), logits(load(directory)))


def test_a_device_map_changes_no_number(directory: Path) -> None:
    pytest.importorskip("accelerate")
    config = QsimConfig(**RECIPE)
    placed = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, device_map={"": "cpu"}).eval()

    assert torch.equal(logits(placed), logits(load(directory, **RECIPE)))


def test_generate_gives_the_tokens_of_the_simulation(directory: Path) -> None:
    model, plain = load(directory, **RECIPE), load(directory)
    qsim.simulate(plain, RECIPE | {"skip": ["lm_head"]})

    found, wanted = (one.generate(IDS[:1], max_new_tokens=8, do_sample=False, pad_token_id=0) for one in (model, plain))

    assert torch.equal(found, wanted)


def test_a_pipeline_takes_it(directory: Path) -> None:
    words = WordLevel({f"w{number}": number for number in range(64)}, unk_token="w0")
    backend = Tokenizer(words)
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w63")
    model = load(directory, **RECIPE)

    (found,) = pipeline("text-generation", model, tokenizer=tokenizer)(
        "w5 w7", max_new_tokens=4, do_sample=False, return_tensors=True
    )

    wanted = model.generate(torch.tensor([[5, 7]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert found["generated_token_ids"] == wanted[0].tolist()


def adapted(model: nn.Module) -> Any:
    """The model with adapters of random values."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def simulated_first(directory: Path) -> tuple[Any, qsim.Simulation]:
    model = load(directory, **RECIPE)
    return adapted(model), model.hf_quantizer.simulation


def adapted_first(directory: Path) -> tuple[Any, qsim.Simulation]:
    model = adapted(load(directory))
    return model, QsimConfig(**RECIPE).apply(model)


ORDERS = pytest.mark.parametrize("made", [simulated_first, adapted_first])


@ORDERS
def test_under_peft_the_base_is_quantized_and_the_adapters_are_not(
    made: Callable[[Path], tuple[Any, qsim.Simulation]], directory: Path
) -> None:
    _, simulation = made(directory)

    sites = simulation.audit({"input_ids": IDS}).sites
    quantized = {site.site.removeprefix("base_model.model."): site.weight for site in sites}
    assert {weight for name, weight in quantized.items() if "lora_" in name} == {None}
    assert {weight for name, weight in quantized.items() if "_proj" in name and "lora_" not in name} == {
        "channel(int4)"
    }


def test_both_orders_give_the_same_numbers(directory: Path) -> None:
    one, other = simulated_first(directory)[0], adapted_first(directory)[0]

    assert torch.equal(logits(one), logits(other))


def test_merged_adapters_are_quantized_with_the_weights(directory: Path) -> None:
    model, _ = simulated_first(directory)
    merged = adapted(load(directory)).merge_and_unload()
    QsimConfig(**RECIPE).apply(merged)

    assert torch.equal(logits(model.merge_and_unload()), logits(merged))


def test_a_trainer_trains_it_and_every_forward_sees_the_new_weights(directory: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = load(directory, **RECIPE)
    before = copy.deepcopy(model.model.layers[0].mlp.up_proj.weight)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], learning_rate=0.01, use_cpu=True
    )
    samples = [{"input_ids": row, "labels": row} for row in IDS]

    Trainer(model, arguments, train_dataset=samples).train()

    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    fresh = load(directory)
    fresh.load_state_dict(model.state_dict())
    QsimConfig(**RECIPE).apply(fresh)
    assert torch.equal(logits(model.eval()), logits(fresh))


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers")
    return write_stable_diffusion(tmp_path_factory.mktemp("pipeline"))


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_of_diffusers_gives_its_text_encoder_the_configuration(stable_diffusion: Path) -> None:
    import diffusers

    config = diffusers.PipelineQuantizationConfig(quant_mapping={"text_encoder": QsimConfig(**RECIPE)})

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(stable_diffusion, quantization_config=config)

    assert pipe.text_encoder.hf_quantizer.simulation.recipe.weights == qsim.parse("channel(int4)")


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_diffusers_is_simulated_once_it_is_loaded(stable_diffusion: Path) -> None:
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(stable_diffusion)
    make = {"num_inference_steps": 1, "output_type": "np"}
    before = pipe("abc", generator=torch.Generator().manual_seed(0), **make).images

    simulation = QsimConfig(**RECIPE).apply(pipe.unet)

    during = pipe("abc", generator=torch.Generator().manual_seed(0), **make).images
    simulation.restore()
    after = pipe("abc", generator=torch.Generator().manual_seed(0), **make).images
    assert abs(during - before).max() > 1e-3
    assert abs(after - before).max() == 0


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        ({"weights": "int3.5"}, "int3.5"),
        ({"weight": "int4"}, "did you mean 'weights'"),
        ({}, "the recipe quantizes nothing"),
        ({"weights": "int4", "transforms": ["gptq"]}, "a QsimConfig has no transforms: transforms need data"),
        ({"activations": "static(int8)"}, "static"),
        ({"weights": "int4", "model": "opt-tiny"}, "a QsimConfig has no model: from_pretrained names the model"),
    ],
)
def test_what_cannot_be_a_configuration_is_one_line(recipe: dict[str, Any], line: str) -> None:
    with pytest.raises(qsim.QsimError, match=line) as error:
        QsimConfig(**recipe)

    assert "\n" not in str(error.value)
