"""Denoising against DDIM's formula written out, and the picture of both runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from qsim_evaluators.pictures import write_side_by_side

import qsim_core as qsim
from qsim_core.testing import EvaluatorSuite

SIZE = 8
NOISE = qsim.Data.of_text("noise", "noise")


def unet(scale: float = 1.0) -> Any:
    """Make a random U-Net of one block, with its weights multiplied by a factor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = diffusers.UNet2DModel(
            sample_size=SIZE, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=2,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def loaded(scale: float = 1.0) -> qsim.LoadedModel:
    return qsim.LoadedModel(unet(scale), None, diffusers.DDPMScheduler(num_train_timesteps=20, clip_sample=False))


def by_hand(scale: float, images: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """Compute all images from noise to end by equation 12 of arXiv 2010.02502 with σ = 0."""
    betas = torch.linspace(0.0001, 0.02, 20)
    kept = (1 - betas).cumprod(0)
    every, model, path = 20 // steps, unet(scale), [images]
    with torch.no_grad():
        for step in reversed(range(steps)):
            time = step * every
            now, then = kept[time], kept[time - every] if time >= every else torch.tensor(1.0)
            noise = model(path[-1], torch.full((len(images),), time)).sample
            clean = (path[-1] - (1 - now).sqrt() * noise) / now.sqrt()
            path.append(then.sqrt() * clean + (1 - then).sqrt() * noise)
    return path


@pytest.mark.parametrize("batch_size", [2, 8])
def test_it_is_what_ddims_formula_gives(batch_size: int) -> None:
    evaluator, run = qsim.parse("denoising(steps=4, samples=6)"), {"batch_size": batch_size, "seed": 3}
    exact = evaluator.evaluate(loaded(), NOISE, qsim.Run(**run))

    found = evaluator.evaluate(loaded(1.05), NOISE, qsim.Run(**run, reference=exact.outputs))

    noise = torch.randn(6, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    before, after = by_hand(1.0, noise, 4), by_hand(1.05, noise, 4)
    for name, place in {"error_at_25": 1, "error_at_50": 2, "error_at_75": 3, "error": 4}.items():
        error = (after[place] - before[place]).norm() / before[place].norm()
        assert found[name] == pytest.approx(float(error), rel=1e-3)
        assert exact[name] == 0
    assert found["images"] == 6
    assert math.isfinite(found["error"])


def test_limit_takes_the_first_images() -> None:
    few, many = (
        qsim.parse("denoising(steps=2, samples=5)").evaluate(loaded(), NOISE, qsim.Run(limit=limit)) for limit in (2, 5)
    )

    assert torch.allclose(few.outputs, many.outputs[:, :2], atol=1e-6)


def test_calibration_draws_places_on_the_models_own_path() -> None:
    batches = qsim.parse("denoising(steps=4)").calibration(loaded(), NOISE, 12, None, seed=0)

    assert {batch["sample"].shape for batch in batches} == {(1, 1, SIZE, SIZE)}
    assert {batch["timestep"].item() for batch in batches} == {0, 5, 10, 15}
    with pytest.raises(qsim.DataError, match="^images have no length; leave --calibration-seqlen out$"):
        qsim.parse("denoising").calibration(loaded(), NOISE, 2, 64, 0)


def test_more_steps_than_in_training() -> None:
    with pytest.raises(qsim.DataError, match="^the model was trained with 20 steps of noise, fewer than steps=25$"):
        qsim.parse("denoising").example(loaded(), NOISE)


def test_fidelity_takes_its_inputs() -> None:
    data = qsim.parse("fidelity(denoising(4))").default_data()

    assert qsim.parse("fidelity(denoising(4), samples=3)").evaluate(loaded(), data, qsim.Run())["vectors"] == 3


def test_the_picture_has_the_images_before_on_the_left_and_after_on_the_right(tmp_path: Path) -> None:
    black, white = torch.full((4, 1, SIZE, SIZE), -1.0), torch.full((4, 1, SIZE, SIZE), 1.0)

    write_side_by_side(black, white, tmp_path / "samples.png")

    with Image.open(tmp_path / "samples.png") as image:
        assert image.size == (2 * (2 * (48 + 8) + 8), 2 * (48 + 8))
        assert (image.mode, image.getpixel((20, 20)), image.getpixel((140, 20))) == ("L", 0, 255)


def test_one_file_is_written(tmp_path: Path) -> None:
    path = torch.rand(3, 5, 3, SIZE, SIZE)

    qsim.parse("denoising").save_samples(path, path, tmp_path)

    assert [file.name for file in tmp_path.iterdir()] == ["samples.png"]


class TestDenoising(EvaluatorSuite):
    text = "denoising(steps=4, samples=6)"

    def loaded(self) -> qsim.LoadedModel:
        return loaded()
