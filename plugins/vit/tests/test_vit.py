"""The ViT adapter on directories that the test writes: each family, each head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import IMAGE, IMAGES, pretrained, write
from PIL import Image
from safetensors.torch import load_file, save_file

import qsim_core as qsim
from qsim_core.evaluation.locate import locate
from qsim_core.testing import AdapterSuite
from qsim_core.transforms.forward import as_in_evaluation, call

CHECKPOINTS = {
    "ViTForImageClassification": ("accuracy", 18),
    "ViTModel": ("fidelity", 18),
    "DeiTForImageClassification": ("accuracy", 18),
    "DeiTForImageClassificationWithTeacher": ("accuracy", 19),
    "CLIPVisionModel": ("fidelity", 17),
    "CLIPVisionModelWithProjection": ("fidelity", 18),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_class_that_a_checkpoint_names_is_loaded_and_says_how_it_is_evaluated(name: str, tmp_path: Path) -> None:
    evaluator, matmuls = CHECKPOINTS[name]
    model = pretrained(name, **IMAGES)().eval()

    located = locate(str(write(model, tmp_path)), qsim.Host())

    assert (located.adapter.name, located.adapter.evaluator_of(located.source)) == ("vit", evaluator)
    loaded = located.adapter.load(located.source, torch.float32)
    assert type(loaded.model).__name__ == name
    with as_in_evaluation(model):
        assert torch.equal(call(loaded.model, IMAGE)[0], call(model, IMAGE)[0])
    audit = qsim.simulate(loaded.model, weights="int8", activations="int8", example=IMAGE).audit()
    assert (audit.covered, audit.found, audit.uncovered) == (matmuls, matmuls, [])


def test_the_image_processor_makes_the_models_input(tmp_path: Path) -> None:
    folder = write(pretrained("ViTForImageClassification", **IMAGES)(), tmp_path)

    loaded = qsim.parse("vit").load(str(folder), torch.float32)

    pixels = loaded.processor(Image.new("RGB", (50, 40), "white"), return_tensors="pt").pixel_values
    assert torch.equal(pixels, torch.ones(1, 3, 32, 32))
    assert loaded.tokenizer is None


def test_an_encoder_that_was_saved_without_its_pooler_is_loaded_without(tmp_path: Path) -> None:
    folder = write(pretrained("ViTModel", **IMAGES)(), tmp_path)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    model = qsim.parse("vit").load(str(folder), torch.float32).model

    assert (len(weights) - len(kept), model.pooler) == (2, None)


def test_without_its_image_processor_a_model_is_refused(tmp_path: Path) -> None:
    folder = write(pretrained("ViTForImageClassification", **IMAGES)(), tmp_path)
    (folder / "preprocessor_config.json").unlink()

    with pytest.raises(qsim.ModelError) as error:
        qsim.parse("vit").load(str(folder), torch.float32)

    assert str(error.value) == (
        f"{folder} has no processor: expected preprocessor_config.json; save the image processor or feature extractor "
        f"beside the model"
    )


class TestViT(AdapterSuite):
    text = "vit"

    def checkpoint(self, folder: Path) -> Path:
        return write(pretrained("ViTForImageClassification", **IMAGES)(), folder)

    def example(self, loaded: qsim.LoadedModel) -> Any:
        return IMAGE
