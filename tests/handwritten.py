"""Models that researchers write without a library: their own attention, torch's layers, their own operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ImageBind(nn.Module):
    """Several senses in one space, after ImageBind (arXiv 2305.05665), and their similarity.

    Each sense has a trunk of `nn.MultiheadAttention` with a learned key and value (`add_bias_kv`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.sound = nn.Conv1d(20, 32, 2, 2)
        self.attend = nn.ModuleDict({s: nn.MultiheadAttention(32, 4, add_bias_kv=True) for s in ("image", "sound")})
        self.heads = nn.ModuleDict({s: nn.Linear(32, 16, bias=False) for s in ("image", "sound")})

    def embed(self, sense: str, x: Tensor) -> Tensor:
        y, _ = self.attend[sense](x, x, x, need_weights=False)
        return F.normalize(self.heads[sense]((x + y).mean(0)), dim=-1)

    def forward(self, image: Tensor, sound: Tensor) -> Tensor:
        a = self.embed("image", self.patches(image).flatten(2).permute(2, 0, 1))
        b = self.embed("sound", self.sound(sound).permute(2, 0, 1))
        return 10 * a @ b.T


class Graphormer(nn.Module):
    """Attention with a bias for every distance in a graph, after Graphormer (arXiv 2106.05234)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.distance = nn.Linear(8, 32), nn.Embedding(4, 4)
        self.qkv, self.out, self.readout = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 3)

    def forward(self, nodes: Tensor, distances: Tensor) -> Tensor:
        x = self.embed(nodes)
        batch, length, _ = x.shape
        q, k, v = (
            t.view(batch, length, 4, 8).transpose(1, 2).reshape(batch * 4, length, 8) for t in self.qkv(x).chunk(3, -1)
        )
        bias = self.distance(distances).permute(0, 3, 1, 2).reshape(batch * 4, length, length)
        probabilities = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=8**-0.5).softmax(-1)
        y = torch.bmm(probabilities, v).view(batch, 4, length, 8).transpose(1, 2).flatten(2)
        return self.readout((x + self.out(y)).mean(1))  # type: ignore[no-any-return]


class EncoderDecoder(nn.Module):
    """torch's own `nn.Transformer`. In evaluation its layers take a fused path."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(32, 4, 1, 1, 48, batch_first=True)
        self.head = nn.Linear(32, 8)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.transformer(source, target))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """A recurrent layer and a bilinear form: no torch function shows their products one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.lstm = nn.Linear(8, 8), nn.LSTM(8, 8)
        self.form = nn.Parameter(torch.randn(4, 8, 8) / 8)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(self.linear(x))
        return F.bilinear(y, y, self.form)


@torch.library.custom_op("qsim_tests::fused_attention", mutates_args=())
def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as one custom kernel: the dispatcher sees its name and its operands, and nothing inside."""
    return F.scaled_dot_product_attention(q, k, v)


class Fused(nn.Module):
    """Attention by a registered operator."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(fused_attention(*self.qkv(x).chunk(3, -1)))  # type: ignore[no-any-return]
