"""Channels in another order: the function stays, and where it would not, the structure says why."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from families import make, tokens
from qsim_structure import (
    Structure,
    StructureError,
    Use,
    permute_group,
    permute_rows,
    permute_scores,
    rotate_values,
    trace,
)
from qsim_structure.folding import columns
from torch import Tensor, nn


def shuffled(*sets: Tensor, size: int, seed: int) -> Tensor:
    """An order that moves channels within each set."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(size)
    for channels in sets:
        order[channels] = channels[torch.randperm(len(channels), generator=generator)]
    return order


def reorder(model: nn.Module, structure: Structure, seed: int = 7) -> set[str]:
    """Put all channels that may be reordered in another order. Return the names of the others."""
    values = {attention.value.producer for attention in structure.attention}
    for group in structure.groups:
        permute_group(model, group, shuffled(torch.arange(group.size), size=group.size, seed=seed))
    done: set[str] = set()
    for pair in structure.pairs:
        if pair.producer not in values | done:
            permute_rows(model, pair, shuffled(torch.arange(pair.size), size=pair.size, seed=seed))
            done |= {partner.producer for partner in pair.partners}
    for attention in structure.attention:
        if not structure.why_ordered(f"{attention.path}:pv"):
            value = attention.value
            permute_rows(model, value, shuffled(*value.distinct, size=value.size, seed=seed))
        if not structure.why_ordered(f"{attention.path}:qk"):
            assert attention.key is not None
            generator = torch.Generator().manual_seed(seed)
            heads = [torch.randperm(attention.head_size, generator=generator) for _ in attention.key.distinct]
            permute_scores(model, attention, heads)
    return {refused.name.partition("layers.")[2] or refused.name for refused in structure.ordered}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("family", "stays"),
    [
        ("opt", set()),
        ("opt-350m", set()),
        ("gpt2", set()),
        ("llama", {"0.self_attn:qk", "1.self_attn:qk"}),
        ("codegen", {f"transformer.h.{i}.attn:{product}" for i in (0, 1) for product in ("qk", "pv")}),
    ],
)
def test_everything_in_another_order_is_the_same_function(
    family: str, stays: set[str], attention: str, dtype: torch.dtype, tolerance: float
) -> None:
    model, ids = make(family, attention).to(dtype), tokens()
    before, weights = model(input_ids=ids).logits, [p.detach().clone() for p in model.parameters()]

    structure = trace(model, lambda: model(input_ids=ids))
    stayed = reorder(model, structure)
    if family == "llama":  # its norms compute in float32
        tolerance = max(tolerance, 1e-6)

    assert stayed == stays
    assert (model(input_ids=ids).logits - before).abs().max() <= tolerance * before.abs().max()
    assert sum(not torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True)) >= 8
    assert len(structure.attention) == 2


def test_heads_are_found_with_their_rows() -> None:
    models = make("llama"), make("gpt2")

    llama, gpt2 = (trace(model, lambda: model(input_ids=tokens())).attention[0] for model in models)  # noqa: B023

    assert (llama.path, llama.heads, llama.key_heads, llama.head_size) == ("model.layers.0.self_attn", 4, 2, 16)
    assert llama.key is not None
    assert llama.key.heads[:, 0].tolist() == [0, 0, 16, 16]
    assert llama.key.shares == [0, 0, 1, 1]
    assert [use.weight for use in llama.value.uses] == ["model.layers.0.self_attn.o_proj.weight"]
    assert (gpt2.value.producer, gpt2.value.axis) == ("transformer.h.0.attn.c_attn.weight", 1)
    assert gpt2.value.heads.flatten().tolist() == list(range(128, 192))
    assert gpt2.value.text == "transformer.h.0.attn.c_attn[128…191]"


def test_v_is_found_where_q_and_k_go_through_norms() -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(vocab_size=64, intermediate_size=48, head_dim=8, **sizes)
    model = Qwen3ForCausalLM._from_config(config).eval()

    structure = trace(model, lambda: model(input_ids=torch.arange(6).view(1, 6)))

    (attention,) = structure.attention
    assert (attention.query, attention.key, attention.heads, attention.key_heads) == (None, None, 4, 2)
    assert [refused.name for refused in structure.ordered] == ["model.layers.0.self_attn:qk"]
    assert structure.why_ordered("model.layers.0.self_attn:qk") == "q or k is not what a weight makes"


def test_rotary_embedding_keeps_q_and_k_in_order_and_says_why() -> None:
    model = make("llama")

    structure = trace(model, lambda: model(input_ids=tokens()))

    assert structure.why_ordered("model.layers.0.self_attn:qk") == (
        "meets its own other channels in model.layers.0.self_attn"
    )
    assert structure.why_ordered("model.layers.0.self_attn:pv") == ""


def test_a_norm_of_groups_keeps_its_channels_in_order() -> None:
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(0))

    structure = trace(model, lambda: model(x))

    assert [group.norm for group in structure.groups] == ["0"]
    assert structure.why_ordered("0") == "its channels are not its input's last axis"


def test_a_secret_product_of_q_keeps_its_order() -> None:
    """Tracing does not see that q is scaled by its place; the numeric check does."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
            q = q * torch.arange(1.0, 5.0)
            out: Tensor = self.out((torch.softmax(q @ k.transpose(-1, -2), -1) @ v).transpose(1, 2).flatten(-2))
            return out

    model, x = Attention().eval(), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))

    structure = trace(model, lambda: model(x))

    assert [(refused.name, refused.reasons) for refused in structure.ordered] == [
        (":qk", ("a product of the model changes",))
    ]


def test_columns_that_read_a_channel_twice_follow_in_their_order() -> None:
    use = Use("w", 1, torch.tensor([0, 1, 0, 1, -1, 2, 2]), True)

    assert columns(use, torch.tensor([1, 0, 2])).tolist() == [1, 0, 3, 2, 4, 5, 6]


def test_columns_that_cannot_follow_are_an_error() -> None:
    use = Use("w", 1, torch.tensor([0, 0, 1]), True)

    with pytest.raises(StructureError) as error:
        columns(use, torch.tensor([1, 0]))

    assert str(error.value) == "w reads some channels more often than those that would take their places"


def test_a_copied_model_keeps_its_order() -> None:
    model, ids = make("opt"), tokens()
    reorder(model, trace(model, lambda: model(input_ids=ids)))

    assert torch.equal(copy.deepcopy(model)(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["opt", "opt-350m", "gpt2", "llama"])
def test_values_that_are_rotated_within_heads_are_the_same_function(family: str) -> None:
    model, ids = make(family).double(), tokens()
    before = model(input_ids=ids).logits
    structure = trace(model, lambda: model(input_ids=ids))
    matrix = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).double()).Q

    for attention in structure.attention:
        rotate_values(model, attention.value, lambda x: x @ matrix)

    assert len(structure.attention) == 2
    assert (model(input_ids=ids).logits - before).abs().max() < 1e-12 * before.abs().max() + 1e-10


def test_values_that_are_read_in_another_order_are_not_rotated() -> None:
    model, ids = make("opt"), tokens()
    value = trace(model, lambda: model(input_ids=ids)).attention[0].value
    use = value.uses[0]
    moved = replace(value, uses=(Use(use.weight, use.axis, use.channels.flip(0), True),))

    with pytest.raises(StructureError, match="does not read the channels of each head in their order"):
        rotate_values(model, moved, lambda x: x)
