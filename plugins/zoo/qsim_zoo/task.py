"""Training task of one model of the zoo: its architecture, its data and its loss."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn


class Task(ABC):
    """A model to train. It draws random numbers only from torch's global generator, which the training seeds."""

    name: ClassVar[str]
    steps: ClassVar[int]
    """Number of steps in which the committed weights were trained."""
    measure: ClassVar[str]
    """The name of the number that `report` returns."""
    peak_rate: float = 1e-3
    warmup: int = 100
    left_out: tuple[str, ...] = ()
    """Tensors that are not saved, because the model ties them to others."""

    @abstractmethod
    def prepare(self, directory: Path) -> None:
        """Write the tokenizer or the processor, and read the data."""

    @abstractmethod
    def make(self) -> nn.Module:
        """Make the untrained model."""

    @abstractmethod
    def loss(self, model: nn.Module) -> Tensor:
        """Compute the loss of one random batch."""

    @abstractmethod
    def validate(self, model: nn.Module) -> float:
        """Compute the loss of the validation split, with the same random numbers in each call."""

    def report(self, loss: float) -> float:
        """Convert a validation loss to the number that is reported: a perplexity, unless overridden."""
        return math.exp(loss)

    def save(self, model: nn.Module, directory: Path) -> None:
        """Write the configuration and float16 weights. The model in memory stays float32."""
        saved = {name: tensor.half() for name, tensor in model.state_dict().items() if name not in self.left_out}
        model.save_pretrained(directory, state_dict=saved)  # type: ignore[operator]

    def learning_rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step: linear warm-up, then half a cosine down to zero."""
        if step < self.warmup:
            return self.peak_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, steps - self.warmup)
        return self.peak_rate * 0.5 * (1 + math.cos(math.pi * done))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Make an AdamW optimizer with weight decay on matrices only."""
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.peak_rate, betas=(0.9, 0.98))
