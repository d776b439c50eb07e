"""Structure by tracing, on many families: what is found can be folded, and what cannot be folded is refused by name."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.structure import equivalence_check
from qsim_core.structure.folding import permute_rows, scale_group, scale_pair
from qsim_core.structure.structure import Structure, trace

Make = Callable[..., Any]
SIZES = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "tie_word_embeddings": False}
FAMILIES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    # name: class, options, norms that can be folded, norms in all
    "opt": ("OPT", {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "word_embed_proj_dim": 32, "max_position_embeddings": 64}, 4, 5),
    "opt-350m style": ("OPT", {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                               "word_embed_proj_dim": 16, "do_layer_norm_before": False}, 1, 4),
    "gpt2": ("GPT2", GPT, 5, 5),
    "gptj": ("GPTJ", {**GPT, "rotary_dim": 4}, 3, 3),
    "gpt_neox": ("GPTNeoX", LLAMA, 5, 5),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, 4, 6),
    "bloom, residual after norm": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4,
                                             "apply_residual_connection_post_layernorm": True}, 0, 6),
    "falcon": ("Falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bias": False,
                          "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}, 4, 5),
    "llama": ("Llama", {**LLAMA, "num_key_value_heads": 2}, 5, 5),
    "mixtral": ("Mixtral", {**LLAMA, "num_key_value_heads": 2, "num_local_experts": 4}, 5, 5),
    "qwen3": ("Qwen3", {**LLAMA, "num_key_value_heads": 2, "head_dim": 8}, 5, 9),
    "gemma2": ("Gemma2", {**LLAMA, "num_key_value_heads": 2, "head_dim": 8}, 5, 9),
    "phi": ("Phi", LLAMA, 3, 3),
    "olmo2": ("Olmo2", {**LLAMA, "num_key_value_heads": 2}, 1, 9),
    "gpt_oss": ("GptOss", {**LLAMA, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4,
                           "num_experts_per_tok": 2}, 5, 5),
    "codegen": ("CodeGen", {**GPT, "rotary_dim": 4}, 3, 3),
}  # fmt: skip


def build(name: str) -> Any:
    """A tiny seeded model with random norms and biases (transformers' ones and zeros hide mistakes)."""
    import transformers

    family, options, _, _ = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**SIZES | options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (
            getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
            ._from_config(config)
            .eval()
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() < 2:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model


EXAMPLE = {"input_ids": torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1)), "use_cache": False}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**EXAMPLE).logits  # type: ignore[no-any-return]


def norms(structure: Structure, model: nn.Module) -> tuple[int, int]:
    modules = dict(model.named_modules())
    return len(structure.groups), len(structure.groups) + sum(
        r.name in modules for r in structure.refused if "proj" not in r.name
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_found_can_be_folded(name: str) -> None:
    model = build(name)
    expected = logits(model)

    structure = trace(model, EXAMPLE)

    for group in structure.groups:
        scale_group(
            model, group, torch.exp2(4 * torch.rand(group.size, generator=torch.Generator().manual_seed(2)) - 2)
        )
    for pair in structure.pairs:
        if pair.scales:
            scale_pair(
                model, pair, torch.exp2(2 * torch.rand(pair.size, generator=torch.Generator().manual_seed(3)) - 1)
            )
    assert (logits(model) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (len(structure.groups), sum(r.name.endswith(("norm", "ln_1", "ln_2", "ln_f")) or "layernorm" in r.name.rpartition(".")[2] for r in structure.refused)) == (
        FAMILIES[name][2], FAMILIES[name][3] - FAMILIES[name][2],
    )  # fmt: skip


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_pairs_can_be_permuted(name: str) -> None:
    model = build(name)
    expected = logits(model)

    pairs = [pair for pair in trace(model, EXAMPLE).pairs if pair.producer.endswith(("fc1.weight", "up_proj.weight"))]

    assert len(pairs) == 2
    for pair in pairs:
        permute_rows(model, pair, torch.randperm(pair.size, generator=torch.Generator().manual_seed(0)))
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_tied_weight_is_refused_by_name(make: Make, ids: Tensor) -> None:
    structure = trace(make("opt"), {"input_ids": ids})

    refused = {r.name: r.reasons for r in structure.refused}
    assert refused["model.decoder.final_layer_norm"] == (
        "model.decoder.embed_tokens.weight is also read by embedding: it is tied",
    )


def test_gemmas_weight_is_one_more() -> None:
    offsets = {group.offset for group in trace(build("gemma2"), EXAMPLE).groups}

    assert offsets == {1.0}


def test_what_tracing_proposes_wrongly_is_disposed_of_by_the_numbers() -> None:
    """A norm that looks like one, and divides by its own weight's size: folding it would change the function."""

    class FakeNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(8) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = FakeNorm(), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(x)) * self.norm.weight.detach().numpy().max()  # a way that no tracer sees

    model = Model().eval()
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    head = nn.Sequential(model, nn.Linear(8, 2)).eval()

    structure = trace(head, x)

    assert structure.groups == []
    assert ("0.norm", ("a product of the model changes when it is folded",)) in [
        (r.name, r.reasons) for r in structure.refused
    ]


def test_a_declaration_stands_in_place_of_the_trace_and_agrees_with_it(make: Make, ids: Tensor) -> None:
    model, example = make("opt"), {"input_ids": ids}
    declared = qsim.parse("opt").structure(model)

    by_trace, by_word = trace(model, example), trace(model, example, declared)

    assert [(g.norm, g.weights) for g in by_trace.groups] == [(g.norm, g.weights) for g in by_word.groups]
    assert {g.norm for g in by_word.groups} == set(declared)


def test_of_the_adapters_only_opts_declares_anything(host: qsim.Host) -> None:
    """Whichever comes next gets a test like the one above."""
    adapters = {name: offered for name, found in host.components(qsim.Adapter).items() for _, offered in found}

    assert {name for name, a in adapters.items() if a.structure is not qsim.Adapter.structure} == {"opt"}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"nonsense": []}, "'nonsense' is declared as a norm, and the model runs none of that name"),
        ({"model.norm": ["x"]}, "'model.norm' is declared to be read by 'x', which is no parameter of the model"),
        ({"model.norm": ["model.norm.weight"]}, None),
    ],
)
def test_a_declaration_of_what_is_not_there_is_an_error(declared: dict[str, list[str]], message: str | None) -> None:
    model = build("llama")
    if message is None:
        assert "model.norm" not in {group.norm for group in trace(model, EXAMPLE, declared).groups}
        return
    with pytest.raises(qsim.ModelError) as error:
        trace(model, EXAMPLE, declared)

    assert str(error.value) == message


def test_a_trace_leaves_the_model_as_it_was() -> None:
    model = build("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    trace(model, EXAMPLE)

    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Noisy(nn.Module):
    """A model that draws noise, as a pipeline that makes images does: by torch's generator, or by one that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Any:
        return self.linear(self.norm(x + torch.randn(x.shape, generator=generator)))


@pytest.mark.parametrize("own", [False, True])
def test_what_a_model_draws_at_random_hides_nothing(own: bool) -> None:
    model, generator = Noisy(), torch.Generator().manual_seed(5)
    example = {"x": torch.ones(2, 8)} | ({"generator": generator} if own else {})
    before = torch.get_rng_state(), generator.get_state()

    structure = trace(model, UserDict(example))

    assert [group.norm for group in structure.groups] == ["norm"]
    assert all(torch.equal(a, b) for a, b in zip(before, (torch.get_rng_state(), generator.get_state()), strict=True))


@pytest.mark.parametrize("name", ["opt-350m style", "bloom, residual after norm", "mixtral", "gemma2"])
def test_edits_that_are_tried_a_few_at_a_time_are_disposed_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build(name), torch.arange(4, 20).unsqueeze(0)
    tried: list[int] = []
    original = equivalence_check._holds
    monkeypatch.setattr(equivalence_check, "_holds", lambda *given: tried.append(len(given[2])) or original(*given))
    together = trace(model, {"input_ids": ids})
    monkeypatch.setattr(equivalence_check, "PORTION", 1)
    once = len(tried)

    apart = trace(model, {"input_ids": ids})

    assert len(tried) - once > once, "more of them, smaller ones"
    assert [group.norm for group in apart.groups] == [group.norm for group in together.groups]
    assert [pair.producer for pair in apart.pairs] == [pair.producer for pair in together.pairs]
    assert {refused.name for refused in apart.refused} == {refused.name for refused in together.refused}
    assert {refused.name for refused in apart.ordered} == {refused.name for refused in together.ordered}
