"""vit-tiny: recognize the digit in an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from qsim_zoo.digits import digits
from qsim_zoo.task import Task

SIZE = 8
CLASSES = 10


class VitTiny(Task):
    """ViT with 4 layers of width 96 (0.45 million parameters), on patches of 2 by 2 pixels."""

    name = "vit-tiny"
    steps = 3000
    measure = "validation_loss"
    batch: int = 64

    def prepare(self, directory: Path) -> None:
        """Write the processor, and read the images with pixels from -1 to 1, as the processor returns them."""
        directory.mkdir(parents=True, exist_ok=True)
        size = {"height": SIZE, "width": SIZE}
        ViTImageProcessorPil(size=size, image_mean=[0.5], image_std=[0.5]).save_pretrained(directory)
        self.train_images, self.train_labels = _tensors("train")
        self.valid_images, self.valid_labels = _tensors("valid")

    def make(self) -> nn.Module:
        model: nn.Module = ViTForImageClassification(
            ViTConfig(
                image_size=SIZE,
                patch_size=2,
                num_channels=1,
                hidden_size=96,
                intermediate_size=384,
                num_hidden_layers=4,
                num_attention_heads=4,
                id2label={label: str(label) for label in range(CLASSES)},
                label2id={str(label): label for label in range(CLASSES)},
            )
        )
        return model

    def loss(self, model: Any) -> Tensor:
        """Compute the cross-entropy of random images, each shifted by up to a pixel and with a little noise."""
        chosen = torch.randint(len(self.train_images), (self.batch,))
        images = F.pad(self.train_images[chosen], (1, 1, 1, 1), value=-1.0)
        down, right = torch.randint(3, (2, self.batch)).tolist()
        moved = torch.stack(
            [image[:, y : y + SIZE, x : x + SIZE] for image, y, x in zip(images, down, right, strict=True)]
        )
        return self._loss(model, moved + 0.1 * torch.randn(moved.shape), self.train_labels[chosen])

    def validate(self, model: Any) -> float:
        """Compute the cross-entropy over the validation split."""
        return float(self._loss(model, self.valid_images, self.valid_labels))

    def report(self, loss: float) -> float:
        """Return the loss itself, in nats per image."""
        return loss

    @staticmethod
    def _loss(model: Any, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(pixel_values=images).logits, labels)


def _tensors(split: str) -> tuple[Tensor, Tensor]:
    """Return images `[images, 1, 8, 8]` with pixels from -1 to 1, and labels."""
    images, labels = digits(split)
    return torch.tensor(images).unsqueeze(1) / 127.5 - 1, torch.tensor(labels)
