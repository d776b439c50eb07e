"""Find attention in a trace: the weights that make q, k and v, and the rows of each head."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qsim_structure.channels import Partner, Product, Rows, Source, Use

if TYPE_CHECKING:
    from qsim_structure.tracing import Tracer

MEETS = "is multiplied with other activations"
"""The first words of the refusal that every q, k and fused projection has."""


@dataclass(frozen=True, eq=False)
class Projection(Rows):
    """The part of a weight that makes q, k or v."""

    size: int
    """The number of channels that the weight makes. A fused weight makes more than those of the heads."""
    heads: Tensor
    """[heads, size of a head]: the channel of each element of each head, in the order of the product.

    Heads that share keys or values have the same rows.
    """
    uses: tuple[Use, ...]
    """The weights that read its channels: for v, those after the product."""
    reasons: tuple[str, ...]
    """The reasons why its channels must keep their order within the heads (rotary embedding, …)."""
    partners: tuple[Partner, ...] = ()

    @property
    def distinct(self) -> list[Tensor]:
        """The channels of each head; heads that share them are counted once."""
        return list({tuple(head.tolist()): head for head in self.heads}.values())

    @property
    def shares(self) -> list[int]:
        """For each head, its index among the `distinct` ones."""
        places = {tuple(head.tolist()): place for place, head in enumerate(self.distinct)}
        return [places[tuple(head.tolist())] for head in self.heads]

    @property
    def text(self) -> str:
        """The path of the module, with the range of channels if it also makes others."""
        module = self.producer.removesuffix(".weight")
        read = self.heads.unique()
        return module if len(read) == self.size else f"{module}[{int(read[0])}…{int(read[-1])}]"


@dataclass(frozen=True)
class Attention:
    """A module that multiplies q with k and, after a softmax, the probabilities with v."""

    path: str
    """The module that computes the products. They are called `path:qk` and `path:pv`."""
    query: Projection | None
    """None, like `key`, if it goes through a norm first."""
    key: Projection | None
    value: Projection

    @property
    def heads(self) -> int:
        """The number of heads."""
        return len(self.value.heads)

    @property
    def key_heads(self) -> int:
        """The number of heads of keys and values: fewer than `heads` if heads share them."""
        return len(self.value.distinct)

    @property
    def head_size(self) -> int:
        """The number of channels of one head of v."""
        return self.value.heads.shape[-1]


def attention_in(tracer: Tracer) -> list[Attention]:
    """Find the modules that compute one product before a softmax and one after it, with v that a weight makes."""
    by_owner: dict[str, list[Product]] = defaultdict(list)
    for product in tracer.products:
        by_owner[product.owner].append(product)
    found = []
    for owner, products in by_owner.items():
        if [product.after_softmax for product in products] != [False, True]:
            continue
        scores, values = products
        query = _projection(tracer, scores.left, None)
        count = len(query.heads) if query else next((c.shape[-3] for c in scores.left.values() if c.dim() > 3), None)
        key = _projection(tracer, {s: c.transpose(-1, -2) for s, c in scores.right.items()}, count)
        value = _projection(tracer, values.right, count)
        if value:
            found.append(Attention(owner, query, key, value))
    return found


def _projection(tracer: Tracer, operand: dict[Source, Tensor], count: int | None) -> Projection | None:
    """Find the weight that makes an operand with channels [..., heads, tokens, size of a head], or [batch·heads, …]."""
    if len(operand) != 1:
        return None
    ((source, channels),) = operand.items()
    if source.kind != "linear" or channels.dim() < 3 or not bool((channels == channels[..., :1, :]).all()):
        return None
    rows = channels[..., 0, :].flatten(0, -2)
    if bool((rows < 0).any()):
        return None
    # the batch may be on the same axis: then the heads repeat with each sample
    periods = (n for n in range(1, len(rows) + 1) if len(rows) % n == 0)
    alike = (n for n in periods if torch.equal(rows, rows[:n].repeat(len(rows) // n, 1)))
    heads = channels.shape[-3] if channels.dim() > 3 else count or next(alike)
    if heads != len(rows) and not torch.equal(rows, rows[:heads].repeat(len(rows) // heads, 1)):
        return None
    rows = rows[:heads]
    if count is not None and heads != count:  # fused attention gets each shared key and value once
        if count % heads:
            return None
        rows = rows.repeat_interleave(count // heads, 0)
    partners = tracer.partners(source)
    beside = [reason for partner in partners for reason in partner.reasons]
    reasons = tuple(reason for reason in (*source.refusals, *beside) if not reason.startswith(MEETS))
    uses = tuple({(use.weight, use.axis): use for use in source.uses}.values())
    return Projection(source.name, source.axis, tuple(source.biases), source.size, rows, uses, reasons, partners)
