"""What a model of the zoo is taught: its data, its shape, its loss."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn


class Lesson(ABC):
    """One model to train. Whatever it draws it draws from torch's generator, which the training seeds."""

    name: ClassVar[str]
    steps: ClassVar[int]
    """How many steps the committed weights were trained for."""
    measure: ClassVar[str]
    """What `report` gives, in words."""
    peak_rate: float = 1e-3
    warmup: int = 100
    left_out: tuple[str, ...] = ()
    """Tensors that are not saved, because the model ties them to others."""

    @abstractmethod
    def prepare(self, directory: Path) -> None:
        """Write tokenizer or processor, and read the data."""

    @abstractmethod
    def make(self) -> nn.Module:
        """The model before training."""

    @abstractmethod
    def loss(self, model: nn.Module) -> Tensor:
        """The loss on one batch, drawn at random."""

    @abstractmethod
    def validate(self, model: nn.Module) -> float:
        """The loss on the validation split; the same each time."""

    def report(self, loss: float) -> float:
        """A validation loss as people read it."""
        return math.exp(loss)

    def save(self, model: nn.Module, directory: Path) -> None:
        """Write configuration and float16 weights; the running model stays float32."""
        saved = {name: tensor.half() for name, tensor in model.state_dict().items() if name not in self.left_out}
        model.save_pretrained(directory, state_dict=saved)  # type: ignore[operator]

    def learning_rate(self, step: int, steps: int) -> float:
        """Linear warm-up, then half a cosine down to zero."""
        if step < self.warmup:
            return self.peak_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, steps - self.warmup)
        return self.peak_rate * 0.5 * (1 + math.cos(math.pi * done))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW; weight decay on matrices only."""
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.peak_rate, betas=(0.9, 0.98))
