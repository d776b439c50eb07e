"""CLIPScore against cosines computed by hand, on a Stable Diffusion and a CLIP that the tests write."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from pipelines import LAYERS, LONGEST, SIZE, TEXT, tokenizer, write_stable_diffusion
from torch import Tensor

import qsim_core as qsim
from qsim_core.testing import EvaluatorSuite

PROMPTS = ["a cat", "two dogs", "a very long line that is cut"]
DATA = qsim.Data("prompts", PROMPTS, "0" * 64)
MEAN, DEVIATION = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write a random CLIP with its tokenizer and its image processor."""
    directory = str(tmp_path_factory.mktemp("clip"))
    vision = LAYERS | {"image_size": SIZE, "patch_size": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        config = transformers.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=3)
        transformers.CLIPModel(config).save_pretrained(directory)
    processor: Any = transformers.CLIPImageProcessorPil
    processor(size={"shortest_edge": SIZE}, crop_size=SIZE, image_mean=MEAN, image_std=DEVIATION).save_pretrained(
        directory
    )
    tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_stable_diffusion(tmp_path_factory.mktemp("pipeline")))


def load(pipeline: str) -> qsim.LoadedModel:
    return qsim.parse("diffusion").load(pipeline, torch.float32)  # type: ignore[no-any-return]


def by_hand(clip: str, images: Tensor, prompts: list[str]) -> list[float]:
    """Compute 100 max(Σ a b / (|a| |b|), 0) for uint8 images."""
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    scores = []
    for image, prompt in zip(images, prompts, strict=True):
        words = [letter for word in prompt.split() for letter in [*word[:-1], f"{word[-1]}</w>"]]
        table = tokenizer().get_vocab()
        ids = [0, *[table[word] for word in words][: LONGEST - 2], 1]
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids]), pixel_values=((image / 255 - mean) / deviation).unsqueeze(0))
        a, b = out.image_embeds[0].tolist(), out.text_embeds[0].tolist()
        product = sum(x * y for x, y in zip(a, b, strict=True))
        scores.append(100 * max(product / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b)), 0))
    return scores


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_it_is_the_mean_of_the_cosines(pipeline: str, clip: str, batch_size: int) -> None:
    evaluator = qsim.parse(f'clip_score("{clip}", steps=2)')

    found = evaluator.evaluate(load(pipeline), DATA, qsim.Run(batch_size=batch_size))

    scores = by_hand(clip, found.outputs, PROMPTS)
    assert min(scores) == 0 < sorted(scores)[1], "this CLIP finds that two of the images fit"
    assert found.samples["clip_score"].tolist() == pytest.approx(scores, abs=1e-3)
    assert found["clip_score"] == pytest.approx(sum(scores) / 3, abs=1e-3)
    assert found["prompts"] == 3


def test_a_negative_cosine_counts_as_none(pipeline: str, clip: str, tmp_path: Path) -> None:
    """Negating the projection of texts changes the sign of every cosine."""
    model = transformers.CLIPModel.from_pretrained(clip)
    with torch.no_grad():
        model.text_projection.weight.neg_()
    turned = shutil.copytree(clip, tmp_path / "turned")
    model.save_pretrained(turned)

    one, other = (
        qsim.parse(f'clip_score("{judge}", steps=1)').evaluate(load(pipeline), DATA, qsim.Run())
        for judge in (clip, turned)
    )

    assert torch.equal(one.outputs, other.outputs)
    pairs = list(zip(one.samples["clip_score"].tolist(), other.samples["clip_score"].tolist(), strict=True))
    assert all(min(pair) == 0 < max(pair) for pair in pairs)


def test_each_prompt_has_noise_of_its_own_that_the_seed_draws(pipeline: str, clip: str) -> None:
    evaluator, model = qsim.parse(f'clip_score("{clip}", steps=2)'), load(pipeline)
    same = qsim.Data("same", ["a cat"] * 3, "")

    images, few, other = (
        evaluator.evaluate(model, same, run).outputs
        for run in (qsim.Run(seed=5), qsim.Run(seed=5, limit=2), qsim.Run(seed=6))
    )

    assert not torch.equal(images[0], images[1])
    assert len(few) == 2
    assert (few.int() - images[:2].int()).abs().max() <= 1, "but for sums in another order"
    assert not torch.equal(images, other)


def test_a_pipeline_before_and_after_from_the_file_to_the_picture(pipeline: str, clip: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\n  two dogs \n")
    recipe = {"model": pipeline, "weights": "int2", "activations": "int2", "evaluate": f'clip_score("{clip}", steps=2)'}

    result = qsim.evaluate(qsim.Recipe.of(recipe), data=str(tmp_path / "prompts.txt"), samples=tmp_path / "pictures")

    sites = {site.site.partition(".")[0] for site in result.audit.sites}
    assert sites == {"text_encoder", "unet", "vae"}
    assert result.baseline["clip_score"] != result.simulated["clip_score"]
    assert result.baseline["prompts"] == 2
    assert (result.samples, result.intervals) == (2, {})
    assert result.protocol == (
        f"CLIPScore, 100 max(cos, 0) by {clip}, one image for each prompt, 2 steps, the pipeline's own guidance"
    )
    assert [file.name for file in (tmp_path / "pictures").iterdir()] == ["samples.png"]


def test_the_clip_is_never_quantized(pipeline: str, clip: str) -> None:
    model = load(pipeline)
    qsim.simulate(model.model, weights="int2", activations="int2")

    found = qsim.parse(f'clip_score("{clip}", steps=1)').evaluate(model, DATA, qsim.Run())

    assert found.samples["clip_score"].tolist() == pytest.approx(by_hand(clip, found.outputs, PROMPTS), abs=1e-3)


def test_guidance_is_the_pipelines_own_or_a_given_one(pipeline: str, clip: str) -> None:
    own, same, other = (
        qsim.parse(f'clip_score("{clip}", steps=2{text})').evaluate(load(pipeline), DATA, qsim.Run()).outputs
        for text in ("", ", guidance=7.5", ", guidance=50")
    )

    assert torch.equal(own, same)
    assert not torch.equal(own, other)


def test_an_image_that_is_no_number_has_no_score(pipeline: str, clip: str) -> None:
    model = load(pipeline)
    with torch.no_grad():
        model.model.vae.decoder.conv_out.bias.fill_(math.nan)  # type: ignore[union-attr]

    assert math.isnan(qsim.parse(f'clip_score("{clip}", steps=1)').evaluate(model, DATA, qsim.Run())["clip_score"])


def test_prompts_of_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps({"caption": prompt}) for prompt in PROMPTS))

    assert qsim.parse("clip_score(x, column=caption)").read(str(tmp_path)).content == PROMPTS


def test_no_prompts(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n \n")

    with pytest.raises(qsim.DataError, match="prompts.txt is empty: there is no prompt to make an image of$"):
        qsim.parse("clip_score(x)").read(str(tmp_path / "prompts.txt"))


def test_a_model_that_makes_no_images_of_texts() -> None:
    with pytest.raises(
        qsim.DataError, match="^clip_score needs a pipeline that makes images from texts, not a Linear$"
    ):
        qsim.parse("clip_score(x)").example(qsim.LoadedModel(torch.nn.Linear(2, 2)), DATA)


def test_a_judge_that_embeds_no_images(pipeline: str) -> None:
    with pytest.raises(qsim.DataError, match="^opt-tiny, an OPTForCausalLM, does not embed both images and texts$"):
        qsim.parse('clip_score("opt-tiny")').evaluate(load(pipeline), DATA, qsim.Run())


def test_a_clip_of_the_hub(pipeline: str, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache on disk replaces the network; the image processor is found there too."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    entry = tmp_path / "hub" / "models--acme--clip"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text(commit)
    shutil.copytree(clip, entry / "snapshots" / commit)
    for module in ("huggingface_hub.constants", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    hub, local = (
        qsim.parse(f'clip_score("{name}", steps=1)').evaluate(load(pipeline), DATA, qsim.Run())
        for name in ("acme/clip", clip)
    )

    assert hub == local


def test_the_picture_has_both_runs_images(tmp_path: Path) -> None:
    black, white = (torch.full((1, 3, 48, 48), shade, dtype=torch.uint8) for shade in (0, 255))

    qsim.parse("clip_score(x)").save_samples(black, white, tmp_path)

    with Image.open(tmp_path / "samples.png") as image:
        assert (image.getpixel((20, 20)), image.getpixel((90, 20))) == ((0, 0, 0), (255, 255, 255))


class TestClipScore(EvaluatorSuite):
    text = "clip_score"

    @pytest.fixture
    def component(self, clip: str, pipeline: str) -> Any:
        self.pipeline = pipeline
        return qsim.parse(f"clip_score({json.dumps(clip)}, steps=2)")

    def loaded(self) -> qsim.LoadedModel:
        return load(self.pipeline)

    def data(self, evaluator: Any) -> qsim.Data:
        return DATA
