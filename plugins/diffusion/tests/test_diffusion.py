"""The diffusion adapter on directories that the test writes: models, and pipelines with all their networks."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FAMILIES, build
from pipelines import write_stable_diffusion
from safetensors.torch import load_file, save_file

import qsim_core as qsim
from qsim_core.evaluation.locate import locate
from qsim_core.testing import AdapterSuite
from qsim_core.transforms.forward import as_in_evaluation, call

PROMPT = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "pt"}


@pytest.fixture
def stable_diffusion(tmp_path: Path) -> Path:
    return write_stable_diffusion(tmp_path)


def load(folder: Path) -> qsim.LoadedModel:
    located = locate(str(folder), qsim.Host())
    assert located.adapter.name == "diffusion"
    return located.adapter.load(located.source, torch.float32)


def images(model: Any) -> torch.Tensor:
    return model(**PROMPT, generator=torch.Generator().manual_seed(0)).images  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["UNet2D", "UNet2DCondition", "DiT", "Stable Diffusion 3", "AutoencoderKL"])
def test_a_model_of_diffusers_is_loaded_bit_for_bit(name: str, tmp_path: Path) -> None:
    model, example = build(name), FAMILIES[name].example
    model.save_pretrained(tmp_path)  # type: ignore[operator]

    loaded = load(tmp_path)

    assert type(loaded.model) is type(model)
    with as_in_evaluation(model):
        assert torch.equal(call(loaded.model, example)[0], call(model, example)[0])
    assert qsim.parse("diffusion").evaluator_of(str(tmp_path)) == "fidelity"


def test_every_network_of_a_pipeline_is_quantized_under_its_name(stable_diffusion: Path) -> None:
    loaded = load(stable_diffusion)
    model = loaded.model
    exact = images(model)

    simulation = qsim.simulate(model, weights="int8", activations="int8", example=PROMPT)

    audit = simulation.audit()
    assert (audit.covered, audit.uncovered) == (audit.found, [])
    sites = [site.site for site in audit.sites]
    parts = ["text_encoder", "unet", "vae"]
    assert list(dict.fromkeys(site.partition(".")[0] for site in sites)) == parts
    calls = {part: {s.calls for s in audit.sites if s.site.startswith(part)} for part in parts}
    assert calls == {"text_encoder": {2}, "unet": {2}, "vae": {1}}, "with and without the prompt; two steps; one image"
    assert not torch.equal(images(model), exact)
    simulation.restore()
    assert torch.equal(images(model), exact)
    assert loaded.tokenizer("a cat").input_ids[0] == 0


@pytest.mark.parametrize("to", ["auto", "disk"])
def test_where_the_weights_of_a_pipeline_are_kept_changes_no_image(to: str, stable_diffusion: Path) -> None:
    here = load(stable_diffusion).model
    there = qsim.parse("diffusion").load_dispatched(str(stable_diffusion), torch.float32, to).model

    for model in (here, there):
        qsim.simulate(model, weights="int4", activations="int8", example=PROMPT)

    assert torch.equal(images(there), images(here))


def test_what_does_not_fit_into_memory_goes_to_the_disk_by_whole_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, example = build("UNet2D"), FAMILIES["UNet2D"].example
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    less = sum(parameter.nbytes for parameter in model.parameters()) * 9 // 10
    monkeypatch.setattr("accelerate.utils.modeling.get_max_memory", lambda max_memory=None: {"cpu": less})

    there = qsim.parse("diffusion").load_dispatched(str(tmp_path), torch.float32, "auto").model

    blocks = [*there.down_blocks, there.mid_block, *there.up_blocks]
    kept = [{parameter.device.type for parameter in block.parameters()} for block in blocks]
    assert kept == [{"cpu"}, {"cpu"}, {"meta"}, {"cpu"}, {"meta"}]
    with as_in_evaluation(model):
        assert torch.equal(call(there, example)[0], call(model, example)[0])


def test_a_part_of_a_pipeline_can_be_left_alone(stable_diffusion: Path) -> None:
    model = load(stable_diffusion).model

    audit = qsim.simulate(model, weights="int8", skip=["vae.*", "text_encoder.*"], example=PROMPT).audit()

    assert {site.site.partition(".")[0] for site in audit.sites if not site.skipped} == {"unet"}


def test_a_copy_of_a_pipeline_runs_its_own_networks(stable_diffusion: Path) -> None:
    model = load(stable_diffusion).model
    other = copy.deepcopy(model)

    qsim.simulate(other, weights="int2", activations="int2")

    assert other.pipeline.unet is other.unet
    assert not torch.equal(images(other), images(model))


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument is deprecated")
def test_a_pipeline_of_the_hub(stable_diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache on disk replaces the network, as in the test of OPT's adapter."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    entry = tmp_path / "hub" / "models--acme--tiny"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text(commit)
    shutil.copytree(stable_diffusion, entry / "snapshots" / commit, ignore=shutil.ignore_patterns("hub"))
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    located = locate("acme/tiny", qsim.Host())

    assert located.adapter.name == "diffusion"
    model = located.adapter.load(located.source, torch.float32).model
    assert [name for name, _ in model.named_children()] == ["vae", "text_encoder", "unet"]


def test_a_pipeline_of_one_network_is_that_network_and_its_scheduler(tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler

    DDPMPipeline(build("UNet2D"), DDPMScheduler()).save_pretrained(tmp_path)

    loaded = load(tmp_path)

    assert type(loaded.model).__name__ == "UNet2DModel"
    assert (type(loaded.processor).__name__, loaded.tokenizer) == ("DDPMScheduler", None)
    assert qsim.parse("diffusion").evaluator_of(str(tmp_path)) == "denoising"


def test_the_dtype_is_the_callers(stable_diffusion: Path) -> None:
    model = qsim.parse("diffusion").load(str(stable_diffusion), torch.bfloat16).model

    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def break_class(folder: Path) -> None:
    change(folder, _class_name="EvilPipeline")


def break_part(folder: Path) -> None:
    change(folder, unet=["os", "path"])


def break_pickle(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, folder / "vae" / "diffusion_pytorch_model.bin")


def break_missing(folder: Path) -> None:
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    del weights["conv_out.bias"]
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def break_shape(folder: Path) -> None:
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_out.bias"] = torch.ones(3)
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def break_nan(folder: Path) -> None:
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    next(iter(weights.values()))[0] = torch.nan
    save_file(weights, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})


def change(folder: Path, **values: Any) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_class, "{} is of class EvilPipeline, which is neither a model nor a pipeline of diffusers "),
        (break_part, "unet of {} is of class os.path, which is neither diffusers' nor transformers'"),
        (break_pickle, "{}/vae holds diffusion_pytorch_model.bin, a pickle, which could run code; "),
        (break_missing, "the weights of {}/unet lack conv_out.bias"),
        (break_shape, "weight conv_out.bias of {}/unet has shape (3,), its configuration says (4,)"),
        (break_nan, "weight "),
    ],
)  # fmt: skip
def test_a_damaged_pipeline_is_one_clear_line(damage: Any, message: str, stable_diffusion: Path) -> None:
    damage(stable_diffusion)

    with pytest.raises(qsim.ModelError) as error:
        load(stable_diffusion)

    assert str(error.value).startswith(message.format(stable_diffusion))
    assert "\n" not in str(error.value)


class TestDiffusion(AdapterSuite):
    text = "diffusion"

    def checkpoint(self, folder: Path) -> Path:
        build("UNet2DCondition").save_pretrained(folder)  # type: ignore[operator]
        return folder

    def example(self, loaded: qsim.LoadedModel) -> Any:
        return FAMILIES["UNet2DCondition"].example
