"""Random small models of parts that other people's models have: gates, windows, views in place, lists that change."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS, HEADS, TOKENS = 16, 2, 6


class GainNorm(nn.Module):
    """A norm that multiplies by one plus its weight, as Gemma's does; its input is its only dtype."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (1 + self.weight)


class HeadNorm(nn.Module):
    """Normalizes each head, [..., heads, size of a head] to [..., channels], with a weight for each channel."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]).flatten(-2) * self.weight


class AddNorm(nn.Module):
    """Adds the residual, and returns both the norm of the sum and the sum."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, total.shape[-1:], self.weight), total


class Channels(nn.Module):
    """GroupNorm over channels that stand in the second place."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.inner = nn.GroupNorm(2, size)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.inner(x.transpose(1, 2))
        return normed.transpose_(1, 2)


class Block(nn.Module):
    """A norm, a part, and a residual. It may count its calls, and change the list and the dictionary it is handed."""

    def __init__(self, draw: random.Random, shared: nn.Module) -> None:
        super().__init__()
        c = CHANNELS
        norms: list[Callable[[int], nn.Module]] = [nn.LayerNorm, nn.RMSNorm, GainNorm, Channels]
        self.norm = draw.choice(norms)(c)
        self.q, self.k, self.v, self.o = nn.Linear(c, c), nn.Linear(c, c // 2), nn.Linear(c, c // 2), nn.Linear(c, c)
        self.gate, self.up, self.down = nn.Linear(c, 24), nn.Linear(c, 24, bias=False), nn.Linear(24, c)
        self.fused, self.joined = nn.Linear(c, 48), nn.Linear(c + 24, c)
        self.conv, self.taps = nn.Conv1d(c, c, 3, padding=1), nn.Conv1d(c, c, 3, padding=1, groups=c)
        self.add_norm, self.head_norm = AddNorm(c), HeadNorm(c)
        self.experts = nn.ModuleList(nn.Linear(c, c) for _ in range(3))
        self.shared = shared
        self.register_buffer("scale", torch.rand(c) + 0.5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.part = draw.choice(PARTS)
        self.changes = draw.choice(["nothing", "list", "dictionary", "input"])
        self.residual = draw.choice([True, False])

    def forward(self, x: Tensor, seen: list[Any], state: dict[str, Any], place: list[int]) -> Tensor:
        if self.changes == "list":
            seen[place[0]] = x
        elif self.changes == "dictionary":
            state[f"block {place[0]}"] = state.pop("last", x)
        place[0] += 1
        self.calls += 1
        y = self.part(self, self.norm(x))
        if self.changes == "input":
            return x.add_(y)
        return x + y if self.residual else y


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, CHANNELS // HEADS)).transpose(1, 2)


def attention(block: Block, h: Tensor) -> Tensor:
    k, v = (_heads(t).repeat_interleave(HEADS, 1) for t in (block.k(h), block.v(h)))
    y = torch.softmax(_heads(block.q(h)) @ k.mT / 3, -1) @ v
    return block.o(y.transpose(1, 2).reshape(h.shape))


def gated_attention(block: Block, h: Tensor) -> Tensor:
    k, v = (_heads(t).repeat_interleave(HEADS, 1) for t in (block.k(h), block.v(h)))
    y = torch.softmax(_heads(block.q(h)) @ k.mT / 3, -1) @ v
    return block.o(y.transpose(1, 2).reshape(h.shape) * torch.sigmoid(block.fused(h)[..., :CHANNELS]))


def fused_attention(block: Block, h: Tensor) -> Tensor:
    q, k, v = (_heads(t) for t in block.fused(h).chunk(3, -1))
    return block.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def normed_attention(block: Block, h: Tensor) -> Tensor:
    q, k, v = block.fused(h).view(*h.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v)
    return block.o(block.head_norm(y.transpose(1, 2)))


def beside_attention(block: Block, h: Tensor) -> Tensor:
    q, k, v = _heads(block.q(h)), _heads(block.k(h)), _heads(block.v(h))
    y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return block.joined(torch.cat([y.transpose(1, 2).flatten(2), F.gelu(block.gate(h))], -1))


def glu(block: Block, h: Tensor) -> Tensor:
    return block.down(F.silu(block.gate(h)) * block.up(h))


def halves(block: Block, h: Tensor) -> Tensor:
    gate, up = block.fused(h).chunk(2, -1)
    return block.down(F.relu(gate).mul_(up))


def mlp(block: Block, h: Tensor) -> Tensor:
    return block.down(torch.relu_(block.gate(h)))


def windows(block: Block, h: Tensor) -> Tensor:
    y = block.q(h).contiguous()
    batch, tokens, c = y.shape
    parts = y.as_strided((batch, tokens - 1, 2, c), (tokens * c, c, c, 1))
    return F.pad(block.o(parts).mean(2), (0, 0, 1, 0))


def in_place_views(block: Block, h: Tensor) -> Tensor:
    y = block.q(h)
    y.unsqueeze_(1)
    both = torch.cat([y, y * 2], 1).transpose_(1, 2)
    return block.o(both).sum(2)


def in_place_slices(block: Block, h: Tensor) -> Tensor:
    y = block.q(h)
    y[..., :4].mul_(0.5)
    y[:, 1:, 4:8] = h[:, :-1, 4:8]
    return block.o(y)


def head_norms(block: Block, h: Tensor) -> Tensor:
    return block.o(block.head_norm(block.q(h).unflatten(-1, (HEADS, -1))))


def add_norms(block: Block, h: Tensor) -> Tensor:
    normed, total = block.add_norm(block.q(h), h)
    return block.o(normed) + total


def convolutions(block: Block, h: Tensor) -> Tensor:
    y: Tensor = block.taps(F.gelu(block.conv(h.mT)))
    return y.mT


def experts(block: Block, h: Tensor) -> Tensor:
    rows = h.flatten(0, 1)
    chosen, y = block.gate(rows)[:, :3].topk(1).indices.flatten(), torch.zeros_like(rows)
    for index, expert in enumerate(block.experts):
        mine = chosen == index
        y[mine] = expert(rows[mine])
    return y.view_as(h)


def shuffles(block: Block, h: Tensor) -> Tensor:
    order = torch.arange(CHANNELS - 1, -1, -1)
    y = torch.stack([block.q(h)[..., order], block.q(h).roll(1, -1)], -1)
    return block.o(y.flip(-2).unbind(-1)[0] + y.amax(-1))


def lookups(block: Block, h: Tensor) -> Tensor:
    weight = block.q.weight
    return F.linear(h, weight) @ weight[torch.arange(CHANNELS)] * 0.1 + weight.sum(0)


def views_of_weights(block: Block, h: Tensor) -> Tensor:
    return torch.cat([F.linear(h, block.q.weight[:8], block.q.bias[:8]), h @ (2 * block.o.weight)[:, :8]], -1)


def equations(block: Block, h: Tensor) -> Tensor:
    y = torch.einsum("btc,dc->btd", h, block.q.weight)
    return torch.einsum("btc,bsc->bts", y, y).softmax(-1) @ block.o(y)


def shared(block: Block, h: Tensor) -> Tensor:
    return block.shared(F.relu(block.shared(h)) * block.get_buffer("scale"))


def single_tokens(block: Block, h: Tensor) -> Tensor:
    return torch.stack([torch.stack([block.o(block.q(token)) for token in sample]) for sample in h])


def spectra(block: Block, h: Tensor) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(block.q(h), dim=1), n=h.shape[1], dim=1) + block.o(h).cumsum(1)


def sorted_values(block: Block, h: Tensor) -> Tensor:
    return block.o(torch.where(block.q(h) > 0, block.q(h), h).sort(1).values)


PARTS = [
    attention, gated_attention, fused_attention, normed_attention, beside_attention, glu, halves, mlp, windows,
    in_place_views, in_place_slices, head_norms, add_norms, convolutions, experts, shuffles, lookups, views_of_weights,
    equations, shared, single_tokens, spectra, sorted_values,
]  # fmt: skip


@dataclass
class Output:
    """An output that is no tensor, list or dictionary."""

    hidden: Tensor
    first: Tensor | None = None


class Model(nn.Module):
    """An input projection, some blocks, a norm and a head. The blocks share one linear, a list and a dictionary."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        shared = nn.Linear(CHANNELS, CHANNELS)
        self.embed = nn.Linear(5, CHANNELS)
        self.blocks = nn.ModuleList(Block(draw, shared) for _ in range(draw.randint(1, 3)))
        self.norm, self.head = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, 4)
        self.returns = draw.choice(["tensor", "tuple", "dictionary", "dataclass"])

    def forward(self, x: Tensor, **options: Any) -> Any:
        seen, state, place = [None] * len(self.blocks), dict(options), [0]
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, seen, state=state, place=place)
        hidden = self.norm(x)
        y = self.head(hidden)
        if self.returns == "tuple":
            return y, [hidden]
        if self.returns == "dictionary":
            return {"y": y, "first": self.blocks[0].q(hidden)}
        return Output(y, hidden) if self.returns == "dataclass" else y


def random_model(seed: int) -> tuple[Model, list[dict[str, Tensor]]]:
    """Make a seeded model in eval mode, with random norms and biases, and two batches for it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Model(random.Random(seed)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model, [{"x": torch.randn(2, TOKENS, 5), "last": torch.ones(1)} for _ in range(2)]


def tensors_of(output: Any) -> list[Tensor]:
    """List the tensors of an output of a random model."""
    if isinstance(output, Output):
        output = vars(output)
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, Tensor):
        return [output]
    return [tensor for item in output or () for tensor in tensors_of(item)]
