"""A small language model, written by hand, with letters for tokens: what suites try components on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qsim_core.evaluation.adapter import LoadedModel
from qsim_core.evaluation.data import Data
from qsim_core.formats.format import Format
from qsim_core.quantizers.standard_schemes import Scaled

LETTERS, WIDTH, HEADS, LONGEST = 128, 32, 4, 64
TEXT = "The quick brown fox jumps over the lazy dog. " * 12


class Block(nn.Module):
    """Attention and a perceptron, each after a norm, each added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (linear(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5
        past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        attended = scores.masked_fill(~past, -torch.inf).softmax(-1) @ v
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x.add(self.fc2(torch.relu(self.fc1(self.norm2(x)))))


class LanguageModel(nn.Module):
    """Blocks between an embedding and a head; norms and biases are random too. `forward` gives `.logits`."""

    checkpointing = False
    """True if blocks are computed again in the backward pass."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=LONGEST)
        self.embed, self.places = nn.Embedding(LETTERS, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, LETTERS, bias=False)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        x = self.embed(input_ids) + self.places.weight[: input_ids.shape[1]]
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return SimpleNamespace(logits=self.head(self.norm(x)))


class Letters:
    """A tokenizer whose tokens are letters."""

    def __call__(self, text: str, **options: Any) -> Any:
        return SimpleNamespace(input_ids=[ord(letter) % LETTERS for letter in text])


def language_model(blocks: int = 2) -> LanguageModel:
    """The same each time, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LanguageModel(blocks)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, mean=round(float(parameter.detach().mean())), std=0.1)
    return model.eval()


def loaded() -> LoadedModel:
    """The model with its tokenizer."""
    return LoadedModel(language_model(), Letters())


def text() -> Data:
    """A text for it."""
    return Data.of_text("a pangram", TEXT)


def batches(count: int = 8, length: int = 16) -> list[dict[str, Tensor]]:
    """Calibration data: single sequences of letters."""
    letters = torch.tensor([ord(letter) for letter in TEXT])
    return [{"input_ids": letters[length * n : length * (n + 1)].view(1, -1)} for n in range(count)]


class Integers(Format):
    """The symmetric integers of some bits: what suites scale, so that no other plugin need be installed."""

    name = "integers"
    bits: int

    @property
    def is_integer(self) -> bool:
        return True

    def table(self) -> Tensor:
        most = 2 ** (self.bits - 1) - 1
        return torch.cat([torch.arange(most + 1), torch.tensor([torch.nan]), torch.arange(-most, 0)]).double()


def scaled(bits: int, block: Literal["tensor", "channel", "token"], **options: Any) -> Scaled:
    """Integers of some bits under a scale shared over a tensor, a row of a weight, or a row of activations."""
    return Scaled(element=Integers(bits=bits), block=block, **options)


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a loss on one batch, by the parameter's name; the model keeps none."""
    model(**batch).logits.square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
