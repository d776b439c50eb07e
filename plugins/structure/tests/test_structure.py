"""Tracing, on many families: a structure that is found can be folded, and one that cannot be is refused by name."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import make, tokens
from qsim_structure import StructureError, permute_rows, scale_group, scale_pair, trace
from qsim_structure.folding import GroupScaling
from torch import Tensor, nn

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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_found_can_be_folded(name: str) -> None:
    model = build(name)
    expected = logits(model)

    structure = trace(model, lambda: model(**EXAMPLE))

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

    pairs = [
        pair
        for pair in trace(model, lambda: model(**EXAMPLE)).pairs
        if pair.producer.endswith(("fc1.weight", "up_proj.weight"))
    ]

    assert len(pairs) == 2
    for pair in pairs:
        permute_rows(model, pair, torch.randperm(pair.size, generator=torch.Generator().manual_seed(0)))
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_tied_weight_is_refused_by_name() -> None:
    model = make("opt")

    structure = trace(model, lambda: model(input_ids=tokens()))

    refused = {r.name: r.reasons for r in structure.refused}
    assert refused["model.decoder.final_layer_norm"] == (
        "model.decoder.embed_tokens.weight is also read by embedding: it is tied",
    )


def test_gemmas_weight_is_one_more() -> None:
    model = build("gemma2")

    offsets = {group.offset for group in trace(model, lambda: model(**EXAMPLE)).groups}

    assert offsets == {1.0}


def test_a_fold_that_changes_a_product_is_refused() -> None:
    """The output also depends on the norm's largest weight, so that folding it would change the function."""

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
            return self.linear(self.norm(x)) * self.norm.weight.detach().numpy().max()  # numpy hides it from the tracer

    model = Model().eval()
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    head = nn.Sequential(model, nn.Linear(8, 2)).eval()

    structure = trace(head, lambda: head(x))

    assert structure.groups == []
    assert ("0.norm", ("a product of the model changes when it is folded",)) in [
        (r.name, r.reasons) for r in structure.refused
    ]


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"nonsense": []}, "'nonsense' is declared as a norm, and the model does not run a norm of that name"),
        ({"model.norm": ["x"]}, "'model.norm' is declared to be read by 'x', which is not a parameter of the model"),
        ({"model.norm": ["model.norm.weight"]}, None),
    ],
)
def test_a_declaration_of_what_is_not_there_is_an_error(declared: dict[str, list[str]], message: str | None) -> None:
    model = build("llama")
    if message is None:
        assert "model.norm" not in {group.norm for group in trace(model, lambda: model(**EXAMPLE), declared).groups}
        return
    with pytest.raises(StructureError) as error:
        trace(model, lambda: model(**EXAMPLE), declared)

    assert str(error.value) == message


def test_a_trace_leaves_the_model_as_it_was() -> None:
    model = build("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    trace(model, lambda: model(**EXAMPLE))

    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Noisy(nn.Module):
    """A model that adds noise from torch's generator, as a pipeline that makes images does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return self.linear(self.norm(x + torch.randn(x.shape)))


def test_every_run_draws_the_same_noise_and_the_generator_is_restored() -> None:
    model, before = Noisy().eval(), torch.get_rng_state()

    structure = trace(model, lambda: model(torch.ones(2, 8)))

    assert [group.norm for group in structure.groups] == ["norm"]
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_in_training_mode_is_traced_in_eval_mode_and_restored() -> None:
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    structure = trace(model, lambda: model(torch.randn(5, 8)))

    assert [group.norm for group in structure.groups] == ["0"]
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class TwoOutputs(nn.Module):
    """A norm that a weight reads, and that is an output of the model too; norms are called with a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)
        self.linear, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.first(input=x)
        return hidden, self.head(self.second(input=self.linear(hidden)))


@pytest.mark.parametrize("returned", [True, False])
def test_an_output_of_the_model_is_not_folded_even_if_the_run_returns_nothing(returned: bool) -> None:
    model, x = TwoOutputs().eval(), torch.randn(3, 8, generator=torch.Generator().manual_seed(0))

    structure = trace(model, lambda: model(x) if returned else [model(x), None][1])

    assert [group.norm for group in structure.groups] == ["second"]
    assert [(refused.name, refused.reasons) for refused in structure.refused] == [
        ("first", ("is an output of the model",)),
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_cache_of_keys_and_values_hides_nothing(name: str) -> None:
    model, ids = build(name), EXAMPLE["input_ids"]

    with_cache = trace(model, lambda: model(input_ids=ids, use_cache=True))

    without = trace(model, lambda: model(input_ids=ids, use_cache=False))
    assert [group.norm for group in with_cache.groups] == [group.norm for group in without.groups]
    assert with_cache.refused == without.refused
    assert with_cache.ordered == without.ordered


def test_fused_weights_are_read_by_norms_and_hold_heads() -> None:
    model = build("codegen")

    found = trace(model, lambda: model(**EXAMPLE))

    assert {group.norm: group.weights for group in found.groups}["transformer.h.0.ln_1"] == [
        "transformer.h.0.attn.qkv_proj.weight",
        "transformer.h.0.mlp.fc_in.weight",
    ]
    assert [(a.path, a.heads, a.head_size) for a in found.attention] == [
        (f"transformer.h.{layer}.attn", 4, 8) for layer in (0, 1)
    ]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_does_not_stop_a_trace() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    class Flex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.qkv = nn.LayerNorm(16), nn.Linear(16, 48)

        def forward(self, x: Tensor) -> Tensor:
            heads = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
            return flex_attention(*heads)  # type: ignore[return-value]

    model, x = Flex().eval(), torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))

    assert [group.weights for group in trace(model, lambda: model(x)).groups] == [["qkv.weight"]]


def test_a_weight_that_is_not_in_memory_is_an_error() -> None:
    model, x = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)).eval(), torch.arange(16.0).view(2, 8)
    (group,) = trace(model, lambda: model(x)).groups
    model[1].to("meta")

    with pytest.raises(StructureError) as error:
        scale_group(model, group, torch.ones(8))

    assert str(error.value) == "1.weight is not in memory (it is on the meta device); pass `editing` to load it"


@pytest.mark.parametrize("name", ["opt-350m style", "bloom, residual after norm", "mixtral", "gemma2"])
def test_less_memory_takes_more_runs_and_finds_the_same(name: str) -> None:
    model, ids, runs = build(name), torch.arange(4, 20).unsqueeze(0), [0]

    def run() -> Any:
        runs[0] += 1
        return model(input_ids=ids)

    together = trace(model, run)
    at_once = runs[0]

    apart = trace(model, run, copied_bytes=1)

    assert runs[0] - at_once > at_once
    assert [group.norm for group in apart.groups] == [group.norm for group in together.groups]
    assert [pair.producer for pair in apart.pairs] == [pair.producer for pair in together.pairs]
    assert {refused.name for refused in apart.refused} == {refused.name for refused in together.refused}
    assert {refused.name for refused in apart.ordered} == {refused.name for refused in together.ordered}


def test_what_is_not_needed_is_not_run() -> None:
    model, ids, runs = build("opt"), torch.arange(4, 20).unsqueeze(0), [0]

    def run() -> Any:
        runs[0] += 1
        return model(input_ids=ids)

    everything = trace(model, run)
    of_all, runs[0] = runs[0], 0
    groups = trace(model, run, checks=("groups",))

    assert (runs[0], of_all) == (2, 3)  # the run that is traced, and one for each kind of edits
    assert [group.norm for group in groups.groups] == [group.norm for group in everything.groups]
    assert (groups.pairs, groups.ordered) == ([], [])


def test_all_norm_groups_are_checked_in_one_run_that_ends_early_and_weights_come_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(module for _ in range(4) for module in (nn.LayerNorm(16), nn.Linear(16, 16)))).half()
    before, runs, x = copy.deepcopy(model.state_dict()), {"begun": 0, "ended": 0}, torch.randn(64, 16).half()

    def run() -> Any:
        runs["begun"] += 1
        model(x)
        runs["ended"] += 1

    found = trace(model, run, checks=["groups"], copied_bytes=4 * 2 * 16 * 2)  # the bytes of the norms

    assert runs == {"begun": 2, "ended": 1}
    assert [group.weights for group in found.groups] == [[f"{place}.weight"] for place in (1, 3, 5, 7)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_fold_that_fails_halfway_leaves_the_weights() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    group = trace(model, lambda: model(torch.randn(9, 4))).groups[0]
    before, wrong = copy.deepcopy(model.state_dict()), replace(group.uses[0], axis=5)
    scaling = GroupScaling(model, replace(group, uses=(group.uses[0], wrong)), torch.tensor([1.0, 2.0, 4.0, 2.0]))

    with pytest.raises(RuntimeError):
        scaling.apply()
    scaling.undo()

    assert torch.equal(model[1].weight, before["1.weight"])


def test_a_weight_that_would_overflow_is_copied() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)).half()
    with torch.no_grad():
        model[1].weight[0, 0] = 65504
    before = model[1].weight.clone()

    trace(model, lambda: model(torch.zeros(9, 4).half()))

    assert torch.equal(model[1].weight, before)


def test_tracing_keeps_no_activation() -> None:
    model = nn.Sequential(*(module for _ in range(4) for module in (nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU())))
    made: list[Any] = []
    alive: list[int] = []

    def meet(module: nn.Module, args: Any, output: Tensor) -> None:
        alive.append(sum(one() is not None for one in made))
        made.append(weakref.ref(output))

    for module in model[1::3]:
        module.register_forward_hook(meet)
    trace(model, lambda: model(torch.randn(5, 8)), checks=())

    assert alive == [0, 0, 0, 0]
