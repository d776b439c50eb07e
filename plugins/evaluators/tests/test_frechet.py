"""The Fréchet distance against closed forms, and its images, features and reference images."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import scipy.linalg
import torch
import transformers
from PIL import Image
from pipelines import write_stable_diffusion
from qsim_evaluators.features import features
from qsim_evaluators.frechet import GROUPS, Made, contributions, frechet_distance
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.testing import EvaluatorSuite

SIZE, WIDTH = 8, 4
SHADES = np.random.default_rng(0).integers(0, 256, (12, SIZE, SIZE), dtype=np.uint8)
REFERENCE = qsim.Data("shades", {"image": list(SHADES)}, "0" * 64)


def unet(channels: int = 1, seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return diffusers.UNet2DModel(
            sample_size=SIZE, in_channels=channels, out_channels=channels, layers_per_block=1, block_out_channels=(8,),
            norm_num_groups=2, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        ).eval()  # fmt: skip


def loaded(channels: int = 1) -> qsim.LoadedModel:
    return qsim.LoadedModel(unet(channels), None, diffusers.DDPMScheduler(num_train_timesteps=20))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write a random ViT with features of width 4, and its processor."""
    directory = str(tmp_path_factory.mktemp("vit"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": WIDTH, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        config = transformers.ViTConfig(**sizes, image_size=SIZE, patch_size=4, num_channels=1, layer_norm_eps=0.1)
        transformers.ViTForImageClassification(config).save_pretrained(directory)
    processor: Any = transformers.ViTImageProcessorPil
    processor(size={"height": SIZE, "width": SIZE}, image_mean=[0.5], image_std=[0.5]).save_pretrained(directory)
    return directory


class Sides(nn.Module):
    """A model with two features of uint8 images: the mean red of the left half and of the right half."""

    def forward(self, images: Tensor) -> Tensor:
        red = images[:, 0].float()
        return torch.stack([red[:, :, :4].mean((1, 2)), red[:, :, 4:].mean((1, 2))], 1)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = str(tmp_path_factory.mktemp("program") / "sides.pt2")
    example = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8)
    torch.export.save(torch.export.export(Sides(), (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)), file)
    return file


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> qsim.LoadedModel:
    directory = write_stable_diffusion(tmp_path_factory.mktemp("pipeline"))
    return qsim.parse("diffusion").load(str(directory), torch.float32)  # type: ignore[no-any-return]


def corners(mean: list[float], deviation: list[float]) -> Tensor:
    """Return the eight rows mean ± deviation. Their covariance (with n - 1) is diagonal, 8/7 deviation²."""
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.float64)
    return torch.tensor(mean, dtype=torch.float64) + signs * torch.tensor(deviation, dtype=torch.float64)


def test_of_diagonal_covariances_it_is_the_sum_over_features() -> None:
    """The distance is Σ (μ₁ - μ₂)² + (σ₁ - σ₂)² over the features."""
    a, b = corners([0, 1, 2], [1, 2, 3]), corners([3, 1, -2], [2, 2, 0.5])

    assert frechet_distance(a, b) == pytest.approx(3**2 + 4**2 + 8 / 7 * (1**2 + 2.5**2), rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_of_covariances_that_do_not_commute_it_is_the_formula_for_two_features() -> None:
    """The eigenvalues p, q of Σ₁ Σ₂ have (√p + √q)² = tr + 2 √det."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(30, 2, generator=generator) @ torch.randn(2, 2, generator=generator) for _ in range(2))

    first, second = np.cov(a.double().numpy().T), np.cov(b.double().numpy().T)
    assert abs(first @ second - second @ first).max() > 0.01
    cross = math.sqrt(np.trace(first @ second) + 2 * math.sqrt(np.linalg.det(first) * np.linalg.det(second)))
    means = float((a.double().mean(0) - b.double().mean(0)).square().sum())
    expected = means + np.trace(first) + np.trace(second) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_contributions_vary_as_the_distance_does_from_one_set_of_images_to_another() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(400, 8, generator=generator, dtype=torch.float64)
    sets = [contributions(reference, torch.randn(200, 8, generator=generator).double() + 0.5) for _ in range(60)]

    distances = torch.stack([shares.mean() for shares in sets])
    foreseen = torch.stack([shares.std() / math.sqrt(len(shares)) for shares in sets]).mean()

    assert float(foreseen / distances.std()) == pytest.approx(1, abs=0.2)


def test_contributions_add_up_to_the_distance() -> None:
    reference, made = torch.randn(40, 3).double(), torch.randn(30, 3).double() + 1

    shares = contributions(reference, made)

    assert len(shares) == GROUPS
    assert float(shares.mean()) == pytest.approx(frechet_distance(reference, made), rel=1e-12)
    assert len(contributions(reference, made[:7])) == 7


def test_what_is_not_finite_has_no_distance() -> None:
    assert math.isnan(frechet_distance(torch.tensor([[1.0], [math.inf]]), torch.tensor([[1.0], [2.0]])))


@pytest.mark.parametrize("batch_size", [4, 100])
def test_its_images_are_denoisings_and_its_features_the_mean_of_the_last_states(vit: str, batch_size: int) -> None:
    evaluator, run = qsim.parse(f'frechet("{vit}", steps=4, samples=9)'), qsim.Run(seed=3, batch_size=batch_size)
    found = evaluator.evaluate(loaded(), REFERENCE, run)

    path = qsim.parse("denoising(steps=4, samples=9)").evaluate(loaded(), None, run).outputs
    shades = ((path[-1].clamp(-1, 1) + 1) * 127.5).round()
    model = transformers.ViTForImageClassification.from_pretrained(vit).eval().vit

    def states(shade: Tensor) -> Any:
        with torch.no_grad():
            return model(pixel_values=shade / 127.5 - 1).last_hidden_state.double().mean(1).numpy()

    a, b = states(shades), states(torch.tensor(SHADES).unsqueeze(1).float())
    first, second = np.cov(a.T), np.cov(b.T)
    cross = scipy.linalg.sqrtm(first @ second).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(first + second - 2 * cross)
    assert torch.equal(found.outputs.images, shades.to(torch.uint8))
    assert found["frechet_distance"] == pytest.approx(expected, rel=1e-4)
    assert (found["images"], found["reference_images"]) == (9, 12)


def test_the_model_of_features_is_never_quantized(vit: str) -> None:
    evaluator, model = qsim.parse(f'frechet("{vit}", steps=2, samples=6)'), loaded()
    exact = evaluator.evaluate(model, REFERENCE, qsim.Run())
    simulation = qsim.simulate(model.model, weights="int2", activations="int2", outputs="int4")

    found = evaluator.evaluate(model, REFERENCE, qsim.Run(reference=exact.outputs))

    simulation.restore()
    images = list(found.outputs.images.squeeze(1).numpy())
    outside = frechet_distance(exact.outputs.reference_features, features(vit, torch.device("cpu"))(images))
    assert not torch.equal(found.outputs.images, exact.outputs.images)
    assert found["frechet_distance"] == pytest.approx(outside, rel=1e-9) != exact["frechet_distance"]


def test_features_of_a_program(program: str) -> None:
    halves = np.zeros((SIZE, SIZE), np.uint8)
    halves[:, 4:] = 200

    found = features(program, torch.device("cpu"))([halves, Image.new("RGB", (SIZE, SIZE), (7, 0, 0))])

    assert found.tolist() == [[0, 200], [7, 7]]


def test_a_clips_vision_half_gives_features(tmp_path: Path) -> None:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=SIZE, patch_size=4)
    transformers.CLIPVisionModel(vision).save_pretrained(tmp_path)
    processor: Any = transformers.CLIPImageProcessorPil
    processor(size={"shortest_edge": SIZE}, crop_size=SIZE).save_pretrained(tmp_path)

    assert features(str(tmp_path), torch.device("cpu"))(list(SHADES[:2])).shape == (2, WIDTH)


def test_a_model_that_makes_no_numbers_has_no_distance(program: str) -> None:
    model = loaded()
    with torch.no_grad():
        model.model.conv_out.bias.fill_(math.nan)  # type: ignore[union-attr]

    found = qsim.parse(f'frechet("{program}", steps=1, samples=4)').evaluate(model, REFERENCE, qsim.Run())

    assert math.isnan(found["frechet_distance"])


def test_a_run_from_the_zoos_digits_to_the_saved_picture(tmp_path: Path) -> None:
    recipe = {"model": "ddpm-tiny", "weights": "int4", "evaluate": 'frechet("vit-tiny", steps=2, samples=100)'}

    result = qsim.evaluate(qsim.Recipe.of(recipe), samples=tmp_path, run=qsim.Run(batch_size=100))

    assert result.data.name == "zoo: scikit-learn's digits, test split"
    assert result.protocol.startswith("Fréchet distance of 100 images at most, after 2 steps of DDIM from one noise, ")
    assert "features: the last hidden states of vit-tiny, averaged over positions" in result.protocol
    assert result.metric == "frechet_distance"
    assert 0 < result.baseline["frechet_distance"] != result.simulated["frechet_distance"] > 0
    low, high = result.intervals["frechet_distance"].baseline
    assert low < result.baseline["frechet_distance"] < high
    assert [file.name for file in tmp_path.iterdir()] == ["samples.png"]


def test_denoising_is_measured_on_noise_still() -> None:
    recipe = {"model": "ddpm-tiny", "weights": "int8", "evaluate": "denoising(steps=1, samples=2)"}

    assert qsim.evaluate(qsim.Recipe.of(recipe)).data.name == "Gaussian noise"


def test_calibration_and_example_are_denoisings(program: str) -> None:
    frechet, denoising = qsim.parse(f'frechet("{program}", steps=4)'), qsim.parse("denoising(steps=4)")
    for of in (lambda e: e.calibration(loaded(), REFERENCE, 3, None, 1), lambda e: [e.example(loaded(), REFERENCE)]):
        for a, b in zip(of(frechet), of(denoising), strict=True):
            assert torch.equal(a["sample"], b["sample"])
            assert torch.equal(a["timestep"], b["timestep"])
    with pytest.raises(qsim.DataError, match="^images have no length; leave --calibration-seqlen out$"):
        frechet.calibration(loaded(), REFERENCE, 2, 64, 0)


def test_the_picture_has_both_runs_images(tmp_path: Path, program: str) -> None:
    black, white = (Made(torch.full((1, 1, 48, 48), shade, dtype=torch.uint8), torch.empty(0)) for shade in (0, 255))

    qsim.parse(f'frechet("{program}")').save_samples(black, white, tmp_path)

    with Image.open(tmp_path / "samples.png") as image:
        assert (image.getpixel((20, 20)), image.getpixel((90, 20))) == (0, 255)


class TestOfTexts:
    """A pipeline that makes images from texts."""

    DATA = qsim.Data(
        "captions", {"image": list(np.repeat(SHADES[..., None], 3, 3)), "text": ["a cat", "two dogs"] * 6}, ""
    )

    @pytest.mark.parametrize("batch_size", [2, 100])
    def test_its_images_are_those_of_the_prompts(self, pipeline: Any, program: str, batch_size: int) -> None:
        evaluator = qsim.parse(f'frechet("{program}", steps=2, samples=5, guidance=3)')

        found = evaluator.evaluate(pipeline, self.DATA, qsim.Run(seed=3, batch_size=batch_size))

        seeds = torch.randint(2**31, (5,), generator=torch.Generator().manual_seed(3)).tolist()
        own = pipeline.model.pipeline(
            prompt=self.DATA.content["text"][:5],
            num_inference_steps=2,
            guidance_scale=3,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
        ).images
        assert (found.outputs.images.movedim(1, 3) - torch.tensor(own * 255)).abs().max() <= 1
        assert (found["images"], found["reference_images"]) == (5, 12)
        assert evaluator.protocol(pipeline).startswith(
            "Fréchet distance of 5 images at most, one for each prompt, 2 steps, guidance 3, to the reference images; "
        )

    def test_captions_lie_beside_the_images(self, tmp_path: Path) -> None:
        lines = []
        for place, caption in enumerate(self.DATA.content["text"][:3]):
            Image.new("RGB", (SIZE, SIZE), (place, 0, 0)).save(tmp_path / f"{place}.png")
            lines.append(json.dumps({"file_name": f"{place}.png", "caption": caption}))
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines))

        read = qsim.parse("frechet(x, text=caption)").read(str(tmp_path))

        assert list(read.content["text"]) == ["a cat", "two dogs", "a cat"]
        assert [image.getpixel((0, 0))[0] for image in read.content["image"]] == [0, 1, 2]

    def test_metadata_that_cannot_be_read_is_one_line(self, tmp_path: Path) -> None:
        Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "0.png")
        (tmp_path / "metadata.jsonl").write_text('{"file_name": ')

        with pytest.raises(qsim.DataError, match=f"^datasets cannot load {tmp_path}: [^\n]+$"):
            qsim.parse("frechet(x)").read(str(tmp_path))

    def test_calibration_starts_from_other_noise_than_the_images(self, pipeline: Any, program: str) -> None:
        evaluator = qsim.parse(f'frechet("{program}", steps=2, samples=4)')

        seeds = [
            [generator.initial_seed() for batch in batches for generator in batch["generator"]]
            for batches in (evaluator.calibration(pipeline, self.DATA, 4, None, seed) for seed in (0, 0, 1))
        ]

        images = torch.randint(2**31, (4,), generator=torch.Generator().manual_seed(0)).tolist()
        assert seeds[0] == seeds[1] != seeds[2] and not set(seeds[0]) & set(images)

    def test_smoothquant_on_the_prompts(self, pipeline: Any, program: str) -> None:
        evaluator = qsim.parse(f'frechet("{program}", steps=2, samples=4)')
        batches = evaluator.calibration(pipeline, self.DATA, 2, None, 0)

        simulation = qsim.simulate(
            pipeline.model, weights="int4", activations="int4", transforms=["smoothquant"], calibration=batches
        )

        smoothed = {report.layer.partition(".")[0] for report in simulation.reports if not report.note}
        simulation.restore()
        assert smoothed == {"text_encoder", "unet", "vae"}

    def test_without_prompts(self, pipeline: Any, program: str) -> None:
        message = "^frechet needs a prompt for each image of this pipeline, and shades has no column of texts$"

        with pytest.raises(qsim.DataError, match=message):
            qsim.parse(f'frechet("{program}")').evaluate(pipeline, REFERENCE, qsim.Run())


class TestRead:
    """Sources of reference images."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for place, name in enumerate(("b.png", "a.JPEG", "c.bmp")):
            Image.new("L", (SIZE + place, SIZE), 10 * place).save(tmp_path / name)
        (tmp_path / "notes.txt").write_text("no image")
        return tmp_path

    def test_a_directory_of_images(self, folder: Path) -> None:
        read = qsim.parse("frechet(x)").read(str(folder))

        assert [image.width for image in read.content["image"]] == [SIZE + 1, SIZE, SIZE + 2], "in the order of names"
        Image.new("L", (SIZE, SIZE), 11).save(folder / "b.png")
        assert qsim.parse("frechet(x)").read(str(folder)).sha256 != read.sha256

    def test_a_column_of_a_data_set(self, tmp_path: Path) -> None:
        import datasets

        rows = {"picture": [Image.fromarray(shade) for shade in SHADES]}
        datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image()).to_parquet(tmp_path / "test.parquet")

        read = qsim.parse("frechet(x, image=picture)").read(str(tmp_path))

        assert np.array_equal(np.stack([np.asarray(image) for image in read.content["image"]]), SHADES)

    def test_a_directory_without_images(self, tmp_path: Path) -> None:
        (tmp_path / "test.jsonl").write_text('{"image": "a.png"}')

        with pytest.raises(qsim.DataError, match="^column 'image' of .* holds .*string.*, not images$"):
            qsim.parse("frechet(x)").read(str(tmp_path))

    def test_an_image_that_cannot_be_read(self, tmp_path: Path, program: str) -> None:
        (tmp_path / "a.png").write_bytes(b"no picture")
        evaluator = qsim.parse(f'frechet("{program}", steps=1)')

        with pytest.raises(qsim.DataError, match="^a reference image of .* cannot be read: cannot identify image file"):
            evaluator.evaluate(loaded(), evaluator.read(str(tmp_path)), qsim.Run())


@pytest.mark.parametrize(
    ("of", "channels", "data", "message"),
    [
        ("{vit}", 1, qsim.Data("noise", None, ""), "frechet needs reference images, and noise has none; name some with --data"),
        ("{vit}", 1, qsim.Data("two", {"image": list(SHADES[:4])}, ""), "4 reference images are too few for the covariance of 4 features: it needs more images than features"),
        ("{vit}", 3, REFERENCE, "image 0 has mode RGB, the model takes one channel; convert the images to 'L'"),
        ("{program}", 4, REFERENCE, "the model makes images of 4 channels, which are neither grey nor RGB"),
        ("{program}", 1, qsim.Data("wide", {"image": [np.zeros((8, 9), "uint8")]}, ""), "{program} does not take 1 images of 8 by 9 by 3: "),
        ("{program}", 1, qsim.Data("both", {"image": [SHADES[0], np.zeros((8, 9), "uint8")]}, ""), "{program} does not take 2 images of 8 by 8 by 3: all input arrays must have the same shape"),
        ("opt-tiny", 1, REFERENCE, "opt-tiny, a OPTForCausalLM, cannot give features: it does not encode images"),
        ("ddpm-tiny", 1, REFERENCE, "ddpm-tiny, a UNet2DModel, cannot give features: it does not encode images"),
        ("none.pt2", 1, REFERENCE, "none.pt2 cannot be loaded as a program that torch.export saved: "),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(
    of: str, channels: int, data: qsim.Data, message: str, vit: str, program: str
) -> None:
    evaluator = qsim.parse(f'frechet("{of.format(vit=vit, program=program)}", steps=1, samples=5)')

    with pytest.raises(qsim.DataError) as error:
        evaluator.evaluate(loaded(channels), data, qsim.Run())

    assert str(error.value).startswith(message.format(program=program))
    assert "\n" not in str(error.value)


def test_fewer_images_than_features(vit: str) -> None:
    with pytest.raises(qsim.DataError, match="^3 made images are too few for the covariance of 4 features: "):
        qsim.parse(f'frechet("{vit}", steps=1)').evaluate(loaded(), REFERENCE, qsim.Run(limit=3))


def test_a_model_that_is_no_denoiser() -> None:
    class BertModel(nn.Module):
        """A class whose name tells that it encodes texts."""

    with pytest.raises(qsim.DataError, match="^frechet does not fit a BertModel; retrieval and fidelity do$"):
        qsim.parse("frechet(x)").example(qsim.LoadedModel(BertModel()), REFERENCE)


class TestFrechet(EvaluatorSuite):
    text = "frechet"
    limit = 3

    @pytest.fixture
    def component(self, program: str) -> Any:
        return qsim.parse(f"frechet({json.dumps(program)}, steps=2, samples=6)")

    def loaded(self) -> qsim.LoadedModel:
        return loaded()

    def data(self, evaluator: Any) -> qsim.Data:
        return REFERENCE
