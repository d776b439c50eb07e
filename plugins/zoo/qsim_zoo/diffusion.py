"""ddpm-tiny: make digits from noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsim_zoo.digits import digits
from qsim_zoo.task import Task

SIZE = 8
LIBRARY: Any = diffusers  # its classes have no types


class DdpmTiny(Task):
    """A U-Net with attention at both of its resolutions, and DDPM's schedule of 1,000 steps (arXiv 2006.11239)."""

    name = "ddpm-tiny"
    steps = 3000
    measure = "validation_error_of_the_noise"
    batch: int = 32

    def prepare(self, directory: Path) -> None:
        """Read the images with pixels from -1 to 1."""
        directory.mkdir(parents=True, exist_ok=True)
        self.scheduler = LIBRARY.DDPMScheduler()
        self.train_images, self.valid_images = (
            torch.tensor(digits(split)[0]).unsqueeze(1) / 127.5 - 1 for split in ("train", "valid")
        )

    def make(self) -> nn.Module:
        model: nn.Module = LIBRARY.UNet2DModel(
            sample_size=SIZE,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(48, 96),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=24,
        )
        return model

    def loss(self, model: Any) -> Tensor:
        """Compute the mean squared error of the predicted noise, at a random time for each image."""
        images = self.train_images[torch.randint(len(self.train_images), (self.batch,))]
        return self._loss(model, images, torch.randint(len(self.scheduler), (self.batch,)))

    def validate(self, model: Any) -> float:
        """Compute the same over the validation split, with the same noise and times in each call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            times = torch.linspace(0, len(self.scheduler) - 1, len(self.valid_images)).long()
            return float(self._loss(model, self.valid_images, times))

    def report(self, loss: float) -> float:
        """Return the error itself. A model that always predicts zero has an error of 1."""
        return loss

    def save(self, model: Any, directory: Path) -> None:
        """Write a pipeline: the U-Net in float16 and its scheduler."""
        saved = LIBRARY.UNet2DModel.from_config(model.config)
        saved.load_state_dict(model.state_dict())
        LIBRARY.DDPMPipeline(saved.half(), self.scheduler).save_pretrained(directory)

    def _loss(self, model: Any, images: Tensor, times: Tensor) -> Tensor:
        noise = torch.randn(images.shape)
        return F.mse_loss(model(self.scheduler.add_noise(images, noise, times), times).sample, noise)
