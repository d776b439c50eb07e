"""Every matmul is met, in a module or in a function, and nothing else changes."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.matmuls.attention import explicit_attention

Make = Callable[..., Any]
ALL_FAMILIES = ["opt", "opt-350m", "llama", "gpt2", "codegen"]
MATMULS = {"opt": 17, "opt-350m": 19, "llama": 19, "gpt2": 13, "codegen": 13}
"""Two layers each: linears and two attention products, and lm_head (the 350m style projects in and out)."""


def active_modes() -> int:
    return torch._C._len_torch_function_stack()


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits  # type: ignore[no-any-return]


def in_two_steps(model: Any, ids: Tensor) -> Tensor:
    """The last token's logits, from a cache of the tokens before it. transformers 5.2x renamed the argument."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    past = model(input_ids=ids[:, :-1], use_cache=True)
    return model(input_ids=ids[:, -1:], **{name: past[name]}).logits[:, -1]  # type: ignore[no-any-return]


def doubled(x: Tensor) -> Tensor:
    return 2 * x


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_with_nothing_quantized_eager_attention_is_bit_identical(family: str, make: Make, ids: Tensor) -> None:
    model = make(family)
    before = logits(model, ids)

    simulation = qsim.simulate(model, example={"input_ids": ids})

    assert torch.equal(logits(model, ids), before)
    assert len(simulation.sites.table) == MATMULS[family]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_through_explicit_sdpa_logits_stay_within_1e_5(family: str, make: Make, ids: Tensor) -> None:
    model = make(family, "sdpa")
    before = logits(model, ids)

    simulation = qsim.simulate(model, example={"input_ids": ids})

    assert (logits(model, ids) - before).abs().max() <= 1e-5 * before.abs().max()
    assert len(simulation.sites.table) == MATMULS[family]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_site_quantizes(family: str, make: Make, ids: Tensor) -> None:
    model = make(family, "sdpa")
    simulation = qsim.simulate(model, weights="int8", activations="int8", outputs="bf16", example={"input_ids": ids})

    audit = simulation.audit()

    assert (audit.covered, audit.found, audit.uncovered) == (MATMULS[family], MATMULS[family], [])
    assert all(set(site.measured) >= {"input", "output"} for site in audit.sites)
    assert sum("weight" in site.measured for site in audit.sites) == MATMULS[family] - 4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_eager_and_fused_attention_have_the_same_site_names(attention: str, make: Make, ids: Tensor) -> None:
    simulation = qsim.simulate(make("opt", attention), example={"input_ids": ids})

    names = [site.names for site in simulation.sites.table.values() if site.weight is None]
    assert names == [
        ["model.decoder.layers.0.self_attn:matmul.0", "model.decoder.layers.0.self_attn:qk"],
        ["model.decoder.layers.0.self_attn:matmul.1", "model.decoder.layers.0.self_attn:pv"],
        ["model.decoder.layers.1.self_attn:matmul.0", "model.decoder.layers.1.self_attn:qk"],
        ["model.decoder.layers.1.self_attn:matmul.1", "model.decoder.layers.1.self_attn:pv"],
    ]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_generate_with_a_cache_works(family: str, make: Make, ids: Tensor) -> None:
    model = make(family, "sdpa")
    expected = model.generate(ids[:, :4], max_new_tokens=6, do_sample=False)

    qsim.simulate(model)
    assert torch.equal(model.generate(ids[:, :4], max_new_tokens=6, do_sample=False), expected)

    quantized = make(family, "sdpa")
    qsim.simulate(quantized, weights="int2", activations="int2")
    with torch.no_grad():
        whole = quantized(input_ids=ids[:1]).logits[:, -1]
        step = in_two_steps(quantized, ids[:1])
    assert step.shape == whole.shape
    assert not torch.equal(quantized.generate(ids[:, :4], max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_with_causal_scales_a_cache_changes_nothing(family: str, make: Make, ids: Tensor) -> None:
    model = make(family, "sdpa")
    qsim.simulate(model, qsim.Recipe(weights="int4", activations="int8", value_axis="head"))  # type: ignore[arg-type]

    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, -1]
        step = in_two_steps(model, ids)

    assert (step - whole).abs().max() <= 1e-4 * whole.abs().max()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("keep", [True, False])
def test_copies_are_simulated_like_the_original(
    clone: Callable[[Any], Any], keep: bool, make: Make, ids: Tensor
) -> None:
    model = make("llama")
    qsim.simulate(model, weights="abfp(int4, n=16)", activations="int8", keep=keep)
    expected = logits(model, ids)

    other = clone(model)

    assert torch.equal(logits(other, ids), expected)
    assert torch.equal(logits(other, ids), expected)
    assert torch.equal(logits(model, ids), expected)


def test_a_copy_is_independent(make: Make, ids: Tensor) -> None:
    model = make("opt")
    simulation = qsim.simulate(model, weights="int4")
    simulated = logits(model, ids)
    other = copy.deepcopy(model)

    simulation.restore()

    assert torch.equal(logits(other, ids), simulated)
    assert not torch.equal(logits(model, ids), simulated)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_gradient_checkpointing_recomputes_the_same_and_is_counted_once(
    family: str, reentrant: bool, make: Make, ids: Tensor
) -> None:
    def gradients(checkpointing: bool) -> tuple[dict[str, Tensor], set[int]]:
        model = make(family).train()
        simulation = qsim.simulate(model, weights="int8", activations="int8")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        calls = {site.calls for site in simulation.sites.table.values()}
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, calls

    plain, recomputed = gradients(False), gradients(True)

    assert recomputed[1] == {1}
    assert plain[0].keys() == recomputed[0].keys()
    assert all(torch.allclose(plain[0][name], recomputed[0][name], atol=1e-7) for name in plain[0])
    assert active_modes() == 0


def test_an_observer_sees_a_recomputed_tensor_once(make: Make, ids: Tensor) -> None:
    model = make("opt").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    simulation = qsim.simulate(model, activations="int8")
    seen: list[str] = []
    simulation.sites.observer = lambda site, role, before, after, quantizer: seen.append(f"{site.name} {role}")

    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    assert len([name for name in seen if name == "model.decoder.layers.0.fc1 input"]) == 1


def test_autocast(make: Make, ids: Tensor) -> None:
    model = make("opt", "sdpa")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = logits(model, ids)
    simulation = qsim.simulate(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (logits(model, ids) - before).abs().max() <= 2e-2 * before.abs().max()
    simulation.restore()

    simulation = qsim.simulate(model, weights="int4", activations="int4")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantized = logits(model, ids)
    assert quantized.dtype == before.dtype
    assert (quantized - before).abs().max() > 2e-2 * before.abs().max()


def test_weights_offloaded_by_accelerate_are_met(make: Make, ids: Tensor) -> None:
    from accelerate import cpu_offload

    expected = make("llama")
    qsim.simulate(expected, weights="int4", activations="int8")
    model = cpu_offload(make("llama"), execution_device=torch.device("cpu"))

    simulation = qsim.simulate(model, weights="int4", activations="int8")

    for _ in range(2):
        assert torch.equal(logits(model, ids), logits(expected, ids))
    assert len(simulation.sites.table) == MATMULS["llama"]
    assert simulation.sites.weights.folded == {}, "no copy is held of a weight that is kept elsewhere"
    assert next(model.parameters()).is_meta


def test_weights_offloaded_after_simulate_stop_being_held(make: Make, ids: Tensor) -> None:
    from accelerate import cpu_offload

    model = make("llama")
    simulation = qsim.simulate(model, weights="int4")
    expected = logits(model, ids)

    cpu_offload(model, execution_device=torch.device("cpu"))

    for _ in range(5):
        assert torch.equal(logits(model, ids), expected)
    assert simulation.sites.weights.folded == {}


@pytest.mark.parametrize("nested", [False, True])
def test_transformer_encoder_in_eval_does_not_take_its_fused_path(nested: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        before = model(x)
        simulation = qsim.simulate(model, example=x)
        assert torch.allclose(model(x), before, atol=1e-6)
    simulation.restore()

    simulation = qsim.simulate(model, weights="int8", activations="int8", example=x)

    names = [site.name for site in simulation.sites.table.values()]
    assert names == [
        name.format(n)
        for n in (0, 1)
        for name in (
            "layers.{}.self_attn.in_proj_weight",
            "layers.{}.self_attn:matmul.0",
            "layers.{}.self_attn:matmul.1",
            "layers.{}.self_attn.out_proj",
            "layers.{}.linear1",
            "layers.{}.linear2",
        )
    ]
    assert simulation.audit().uncovered == []


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("cross", [False, True])
def test_multi_head_attention(cross: bool, need_weights: bool) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(
        16, 2, batch_first=True, kdim=12 if cross else None, vdim=12 if cross else None
    ).eval()
    query = torch.randn(2, 5, 16)
    memory = torch.randn(2, 7, 12) if cross else query
    mask = torch.zeros(5, memory.shape[1], dtype=torch.bool).triu(1)
    example = {"query": query, "key": memory, "value": memory, "attn_mask": mask, "need_weights": need_weights}
    with torch.no_grad():
        before, _ = model(**example)
        simulation = qsim.simulate(model, example=example)
        assert torch.allclose(model(**example)[0], before, atol=1e-6)

    aliases = [alias for site in simulation.sites.table.values() for alias in site.aliases]
    assert aliases == [":qk", ":pv"]
    assert simulation.sites.table.keys() >= {"out_proj"}
    assert simulation.audit().found == (6 if cross else 4)


def test_two_threads_at_once(make: Make, ids: Tensor) -> None:
    model = make("llama", "sdpa")
    qsim.simulate(model, weights="int4", activations="int4")
    expected = [logits(model, ids[:1]), logits(model, ids[1:])]
    fresh = make("llama", "sdpa")
    qsim.simulate(fresh, weights="int4", activations="int4")
    got: dict[tuple[int, int], Tensor] = {}
    start = threading.Barrier(2)

    def work(row: int) -> None:
        start.wait()
        for turn in range(5):
            got[row, turn] = logits(fresh, ids[row : row + 1])

    threads = [threading.Thread(target=work, args=(row,)) for row in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert all(torch.equal(got[row, turn], expected[row]) for row in (0, 1) for turn in range(5))


def test_an_unsimulated_model_in_another_thread_is_left_alone(make: Make, ids: Tensor) -> None:
    simulated, plain = make("opt"), make("opt")
    before = logits(plain, ids)
    results = []

    class Meanwhile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=lambda: results.append(logits(plain, ids)))
            thread.start()
            thread.join()
            return self.linear(x)  # type: ignore[no-any-return]

    outer = Meanwhile()
    qsim.simulate(outer, weights="int2", activations="int2")
    outer(torch.ones(1, 4))

    assert torch.equal(results[0], before)
    assert simulated is not plain


class Breaks(nn.Module):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4))
        self.error: type[BaseException] | None = error

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(self.linear(x))
        if self.error is not None:
            raise self.error("in mid-forward")
        return y  # type: ignore[no-any-return]


def test_an_exception_in_mid_forward_leaves_no_mode_behind() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Breaks(RuntimeError))
    simulation = qsim.simulate(model, activations=doubled)

    with pytest.raises(RuntimeError, match="in mid-forward"):
        model(torch.ones(1, 4))

    assert active_modes() == 0
    assert simulation.sites.stack.frames == []


def test_ctrl_c_in_mid_forward_quantizes_nothing_afterwards() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Breaks(KeyboardInterrupt))
    simulation = qsim.simulate(model, activations=doubled)
    eye = torch.eye(4)

    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(1, 4))

    assert torch.equal(eye @ eye, eye)
    model[1].error = None
    model(torch.ones(1, 4))
    assert active_modes() == 0
    assert simulation.sites.stack.frames == []


def test_after_ctrl_c_our_mode_goes_and_others_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Breaks(KeyboardInterrupt))
    qsim.simulate(model, activations=doubled)
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(1, 4))
    model[1].error = None

    with torch.device("meta"):
        model(torch.ones(1, 4, device="cpu"))
        made = torch.empty(1)

    assert made.is_meta
    assert active_modes() == 0


def test_experts_held_in_one_parameter_are_met(ids: Tensor) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()
    expected = logits(model, ids)

    audit = qsim.simulate(model, weights="int8", activations="int8", example={"input_ids": ids}).audit()

    experts = [site for site in audit.sites if ".experts." in site.site]
    assert [site.weight for site in experts] == ["channel(int8)"] * 2
    assert audit.uncovered == []
    assert not torch.equal(logits(model, ids), expected)
    assert torch.allclose(logits(model, ids), expected, atol=0.05)


@pytest.mark.parametrize("quantizer", ["tensor(int4)", "channel(int4)", "nvfp4", "block(int4, [128, 128])"])
@pytest.mark.parametrize("keep", [True, False])
def test_experts_held_in_one_parameter_are_quantized_one_by_one(quantizer: str, keep: bool) -> None:
    """The first expert's weights are a thousand times the others': no scale is shared between them."""
    weight, x = noise(3, 8, 16), noise(6, 8)
    weight[0] *= 1000
    rounded = torch.stack([qsim.parse(quantizer)(expert.T).T for expert in weight])
    ends = torch.tensor([2, 4, 6], dtype=torch.int32)

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight.clone())

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch._grouped_mm(x, self.weight, ends), torch.bmm(x.view(3, 2, 8), self.weight)

    model = Experts()
    simulation = qsim.simulate(model, weights=quantizer, example=x, keep=keep)

    with torch.no_grad():
        grouped, batched = model(x)
    assert torch.allclose(grouped, torch._grouped_mm(x, rounded, ends))
    assert torch.allclose(batched, torch.bmm(x.view(3, 2, 8), rounded))
    bits = qsim.parse(quantizer).bits_per_element(torch.Size([16, 8]))
    assert simulation.audit().bits_per_weight == pytest.approx(bits)


@pytest.mark.parametrize("keep", [True, False])
def test_a_weight_multiplied_along_both_its_axes_is_quantized_along_each(keep: bool) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(noise(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight) + x @ self.weight

    model, x = Both(), noise(3, 8)
    channel = qsim.parse("channel(int4)")
    expected = F.linear(x, channel(model.weight.detach())) + x @ channel(model.weight.detach().T).T

    qsim.simulate(model, weights="int4", example=x, keep=keep)

    with torch.no_grad():
        assert torch.allclose(model(x), expected, atol=1e-6)


def test_overwriting_for_one_axis_and_then_meeting_another_is_an_error() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(noise(8, 8))
    model.forward = lambda x: F.linear(x, model.weight) + x @ model.weight  # type: ignore[method-assign]
    qsim.simulate(model, weights="int4", keep=False)

    with (
        torch.no_grad(),
        pytest.raises(qsim.QsimError, match="^weight is multiplied along two axes and was overwritten"),
    ):
        model(noise(3, 8))


@pytest.mark.parametrize("how", ["one object", "one memory", "one module"])
def test_a_tied_weight_is_not_overwritten_under_its_other_user(how: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
            if how == "one object":
                self.head.weight = self.table.weight
            elif how == "one memory":
                self.head.weight.data = self.table.weight.data
            else:
                self.table.forward = self.both  # type: ignore[method-assign]

        def both(self, ids: Tensor) -> Tensor:
            return F.linear(F.embedding(ids, self.table.weight), self.table.weight)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids) if how == "one module" else self.head(self.table(ids))

    model, ids = Tied(), torch.arange(16)
    weight = model.table.weight.detach().clone()
    qsim.simulate(model, weights="int2", keep=False, example=ids)

    with torch.no_grad():
        y = model(ids)

    assert torch.equal(model.table.weight, weight)
    assert torch.equal(y, F.linear(weight, qsim.parse("channel(int2)")(weight)))


def test_a_tied_weight_is_quantized_for_lm_head_and_not_for_the_embedding(make: Make, ids: Tensor) -> None:
    model = make("opt")
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    embedding = model.model.decoder.embed_tokens.weight.detach().clone()

    simulation = qsim.simulate(model, weights="int2", keep=False, example={"input_ids": ids})
    simulation.audit()

    assert torch.equal(model.model.decoder.embed_tokens(torch.arange(96)), embedding)
    assert "model.decoder.layers.0.fc1.weight" not in simulation.sites.weights.tied
    assert len(model.model.decoder.layers[0].fc1.weight[0].unique()) <= 3


def test_a_weight_used_by_a_parent_is_named_by_its_parameter() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(self.embed(ids), self.embed.weight)

    model = Tied()
    before = model.embed.weight.detach().clone()

    simulation = qsim.simulate(model, weights="int2", keep=False, example=torch.arange(8))
    model(torch.arange(8))

    assert list(simulation.sites.table) == ["embed"]
    assert torch.equal(model.embed.weight, before)


def test_a_parameter_times_a_weight_is_the_input() -> None:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.project = nn.Parameter(torch.ones(3, 4)), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.project(self.queries) + x  # type: ignore[no-any-return]

    simulation = qsim.simulate(Queries(), weights="int4", activations="int8", example=torch.zeros(1))

    (site,) = simulation.audit().sites
    assert (site.site, site.weight, site.input) == ("project", "channel(int4)", "token(int8)")


def test_functional_calls_parameters_are_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    other = {name: tensor.detach() * 3 + 0.1 for name, tensor in model.named_parameters()}
    qsim.simulate(model, weights="int3")
    model(x)

    y = torch.func.functional_call(model, other, (x,))

    assert torch.equal(y, F.linear(x, qsim.parse("channel(int3)")(other["0.weight"]), other["0.bias"]))


def test_a_weight_that_is_computed_from_a_buffer_is_pointed_out() -> None:
    model = nn.Module()
    model.register_buffer("kernel", torch.ones(2, 4))
    model.forward = lambda x: F.linear(x, model.kernel)  # type: ignore[method-assign]
    simulation = qsim.simulate(model, activations="int8", example=torch.ones(1, 4))

    assert simulation.audit().notes == [
        ":matmul.0: its weight is computed from no parameter alone: it takes the quantizer of activations"
    ]


def run(function: Callable[..., Tensor], *operands: Tensor, quantizer: Any = None, weight: int | None = None) -> Tensor:
    """A module that computes `function` of its inputs; operand `weight` is its parameter."""

    class Computes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(operands[weight].clone()) if weight is not None else None

        def forward(self, *inputs: Tensor) -> Tensor:
            return function(*(self.kernel if index == weight else x for index, x in enumerate(inputs)))

    model = Computes()
    qsim.simulate(model, activations=quantizer)
    with torch.no_grad():
        return model(*operands)  # type: ignore[no-any-return]


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    ("function", "left", "right"),
    [
        (torch.matmul, (3, 8), (8, 5)),
        (lambda a, b: a @ b, (2, 3, 8), (2, 8, 5)),
        (lambda a, b: a.matmul(b), (3, 8), (8,)),
        (lambda a, b: torch.matmul(input=a, other=b), (8,), (8, 5)),
        (torch.mm, (3, 8), (8, 5)),
        (lambda a, b: a.mm(mat2=b), (3, 8), (8, 5)),
        (torch.bmm, (2, 3, 8), (2, 8, 5)),
        (torch.mv, (3, 8), (8,)),
        (lambda a, b: torch.addmm(torch.ones(3, 5), a, b, beta=2, alpha=3), (3, 8), (8, 5)),
        (lambda a, b: torch.baddbmm(torch.ones(2, 3, 5), a, b), (2, 3, 8), (2, 8, 5)),
        (lambda a, b: torch.ones(3, 5).addmm_(a, b), (3, 8), (8, 5)),
        (lambda a, b: torch.ones(2, 3, 5).baddbmm_(a, b, beta=2), (2, 3, 8), (2, 8, 5)),
        (lambda a, b: torch.addbmm(torch.ones(3, 5), a, b), (2, 3, 8), (2, 8, 5)),
        (lambda a, b: torch.ones(3, 5).addbmm_(a, b), (2, 3, 8), (2, 8, 5)),
        (lambda a, b: torch.addmv(torch.ones(3), a, b), (3, 8), (8,)),
        (torch.linalg.matmul, (3, 8), (8, 5)),
        (torch.inner, (3, 8), (5, 8)),
        (torch.dot, (8,), (8,)),
        (torch.vdot, (8,), (8,)),
        (lambda a, b: torch.linalg.multi_dot([a, b, b.t() / 20, b]), (3, 8), (8, 5)),
        (lambda a, b: torch.linalg.multi_dot([a, b, b.t(), a]), (8,), (8, 5)),
        (lambda a, b: torch.conv_tbc(a, b, torch.ones(5), pad=1), (6, 2, 8), (3, 8, 5)),
        (torch.linalg.vecdot, (3, 8), (3, 8)),
        (lambda a, b: torch.linalg.vecdot(a, b, dim=0), (8, 3), (8, 3)),
        (lambda a, b: torch.tensordot(a, b, dims=1), (3, 8), (8, 5)),
        (lambda a, b: torch.tensordot(a, b, dims=([0, 2], [1, 0])), (2, 3, 8), (8, 2, 5)),
        (lambda a, b: torch._grouped_mm(a, b, torch.tensor([2, 6], dtype=torch.int32)), (6, 8), (2, 8, 16)),
        (lambda a, b: torch.einsum("ik,kj->ij", a, b), (3, 8), (8, 5)),
        (lambda a, b: torch.einsum("ik,kj", [a, b]), (3, 8), (8, 5)),
        (lambda a, b: torch.einsum("...qd,...kd->...qk", a, b), (2, 3, 8), (2, 5, 8)),
        (lambda a, b: torch.einsum(a, [0, 1], b, [1, 2], [0, 2]), (3, 8), (8, 5)),
        (lambda a, b: torch.einsum("iab,abj->ij", a, b), (3, 4, 8), (4, 8, 5)),
        (F.linear, (3, 8), (5, 8)),
        (F.conv1d, (2, 8, 6), (5, 8, 3)),
        (F.conv2d, (2, 8, 6, 6), (5, 8, 3, 3)),
        (F.conv3d, (1, 8, 4, 4, 4), (5, 8, 2, 2, 2)),
        (F.conv_transpose1d, (2, 8, 6), (8, 5, 3)),
        (F.conv_transpose3d, (8, 4, 4, 4), (8, 5, 2, 2, 2)),
    ],
)  # fmt: skip
def test_each_operator_hands_over_its_operands_with_the_reduction_axis_last(
    function: Callable[..., Tensor], left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    a, b = noise(*left), noise(*right)
    lengths: list[int] = []

    def record(x: Tensor) -> Tensor:
        lengths.append(x.shape[-1])
        return x

    plain = run(function, a, b, quantizer=record)
    fine = run(function, a, b, quantizer=qsim.parse("scaled(int16, token)"))

    assert torch.allclose(plain, function(a, b), atol=1e-5)
    assert torch.allclose(fine, plain, atol=2e-3)
    assert not torch.equal(fine, plain)
    assert lengths[1] % lengths[0] == 0, "the kernel's rows hold the input's channels, once for each tap"


def test_the_rows_of_an_operand_are_what_one_output_sums_over() -> None:
    """One huge element changes the scale of its own row, and of no other row."""
    q = torch.full((1, 3, 8), 0.5)
    k = torch.full((1, 8, 4), 0.5)
    k[0, 0, 0] = 1000.0

    y = run(torch.matmul, q, k, quantizer=qsim.parse("token(int4)"))

    assert torch.equal(y[0, :, 1:], (q @ k)[0, :, 1:])
    assert not torch.equal(y[0, :, 0], (q @ k)[0, :, 0])


def test_grouped_convolutions_keep_their_groups_apart() -> None:
    x = torch.full((1, 8, 1, 1), 0.5)
    x[0, 0] = 1000.0
    kernel = torch.ones(2, 4, 1, 1)

    y = run(lambda a, b: F.conv2d(a, b, groups=2), x, kernel, quantizer=qsim.parse("token(int4)"), weight=1)

    assert y.flatten().tolist() == [1000.0, 2.0]


def test_an_output_is_quantized_before_the_mask_and_after_the_bias() -> None:
    a, b, mask = noise(2, 3, 8), noise(2, 8, 3), torch.full((3, 3), -1e9).triu(1)
    bias = nn.Parameter(torch.tensor([0.3, 0.6, 0.9]))

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = bias

        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return torch.baddbmm(mask, a, b), torch.addmm(self.bias, a[0], b[0])

    model = Both()
    qsim.simulate(model, outputs="int8")
    scores, linear = model(a, b)

    assert torch.equal(scores, mask + (a @ b).round())
    assert torch.equal(linear, torch.addmm(bias, a[0], b[0]).round())


@pytest.mark.parametrize("mask", [None, "causal", "boolean", "additive", "all"])
@pytest.mark.parametrize("heads", [4, 2])
def test_explicit_attention_is_torchs(mask: str | None, heads: int) -> None:
    q, k, v = noise(2, 4, 5, 8), noise(2, heads, 7, 8), noise(2, heads, 7, 6)
    options: dict[str, Any] = {"enable_gqa": heads != 4, "scale": 0.3 if mask == "additive" else None}
    if mask == "causal":
        options["is_causal"] = True
    elif mask == "boolean":
        options["attn_mask"] = noise(2, 1, 5, 7) > 0
    elif mask == "additive":
        options["attn_mask"] = noise(5, 7)
    elif mask == "all":
        options["attn_mask"] = torch.zeros(5, 7, dtype=torch.bool)

    expected = F.scaled_dot_product_attention(q, k, v, **options)

    assert torch.allclose(explicit_attention(q, k, v, **options), expected, atol=1e-6)


def test_numbers_that_are_drawn_for_one_site_are_not_anothers() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.load_state_dict(self.a.state_dict())

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    model = Two().eval()
    qsim.simulate(model, activations="token(int4(rounding=stochastic))")
    with torch.no_grad():
        one, other = model(noise(4, 8))

    assert not torch.equal(one, other)


def test_an_activation_shared_by_q_k_and_v_is_quantized_once(make: Make, ids: Tensor) -> None:
    calls = 0

    def count(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x.clone()

    model = make("opt")
    qsim.simulate(model, activations=count, skip=["lm_head", "*:matmul*"])
    logits(model, ids)

    assert calls == 2 * (1 + 1 + 1 + 1)  # q, k and v's; out_proj's; fc1's; fc2's: two layers


@pytest.mark.parametrize(
    ("recipe", "note"),
    [
        ({"activations": "tensor(int8)"}, "one input scale for the whole tensor: it depends on the batch and sees later tokens"),
        ({"activations": "nvfp4"}, "one input scale for the whole tensor: it depends on the batch and sees later tokens"),
        ({"outputs": "tensor(int8)"}, "one output scale for the whole tensor: it depends on the batch and sees later tokens"),
        ({"activations": "block(e4m3, [128, 128])"}, "input scales are shared over 128 rows and see later tokens"),
        ({"activations": "block(e4m3, [1, 128])"}, None),
        ({"activations": "abfp(int4, scale=scaled(int8, channel))"}, None),
        ({"weights": "tensor(int8)"}, None),
    ],
)  # fmt: skip
def test_scales_that_see_other_samples_are_pointed_out(recipe: dict[str, str], note: str | None) -> None:
    x = torch.ones(2, 4)

    (site,) = qsim.simulate(nn.Linear(4, 4), recipe, example=x).audit().sites

    assert site.notes == ([note] if note else [])


def test_v_may_be_quantized_along_the_head_so_that_no_later_token_is_seen(make: Make, ids: Tensor) -> None:
    changed = ids.clone()
    changed[:, -1] = 3
    model = make("llama", "sdpa")
    by_head = qsim.Recipe(activations="token(int3)", value_axis="head", skip=())  # type: ignore[arg-type]
    simulation = qsim.simulate(model, by_head, example={"input_ids": ids})
    assert torch.equal(logits(model, ids)[:, :-1], logits(model, changed)[:, :-1])
    assert simulation.audit().notes == []
    simulation.restore()

    simulation = qsim.simulate(model, activations="token(int3)", example={"input_ids": ids})

    assert not torch.equal(logits(model, ids)[:, :-1], logits(model, changed)[:, :-1])
    assert simulation.audit().notes == [
        f"model.layers.{layer}.self_attn:matmul.1: v's scales are shared over tokens and see later ones "
        f"(value_axis head: they do not)"
        for layer in (0, 1)
    ]


def test_the_output_of_a_masked_product_reaches_the_tensor_it_was_to_go_to() -> None:
    a, b, mask, out = noise(2, 3, 8), noise(2, 8, 4), noise(2, 3, 4), torch.zeros(2, 3, 4)
    model = nn.Module()
    model.forward = lambda x: torch.baddbmm(mask, x, b, out=out)  # type: ignore[method-assign]
    qsim.simulate(model, outputs=torch.round)

    y = model(a)

    assert y is out
    assert torch.equal(out, mask + (a @ b).round())


def test_integer_products_are_none_of_our_business() -> None:
    model = nn.Module()
    model.forward = lambda x: torch.matmul(x, x) + torch.mm(x / 9, x / 9)  # type: ignore[method-assign]
    simulation = qsim.simulate(model, activations="int4")

    assert torch.equal(model(torch.full((2, 2), 9)), torch.full((2, 2), 164.0))
    assert [site.op for site in simulation.sites.table.values()] == ["mm"]


class Sinks(nn.Module):
    """Attention with a learned share of the softmax that goes to no token."""

    def __init__(self) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ x.transpose(-1, -2)
        return torch.cat([scores, self.sink.expand(*scores.shape[:-1], 1)], -1).softmax(-1)[..., :-1] @ x


class Disentangled(nn.Module):
    """Attention whose scores are a sum of products. One of these products has the shape of the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.ones(9, 8))

    def forward(self, x: Tensor) -> Tensor:
        relative = x @ F.embedding(torch.arange(9), self.positions).T
        return (x @ x.transpose(-1, -2) + relative[..., : x.shape[-2]]).softmax(-1) @ x


@pytest.mark.parametrize(("model", "scores"), [(Sinks(), 0), (Disentangled(), 1)])
def test_attention_is_known_with_sinks_and_with_positions_of_their_own(model: nn.Module, scores: int) -> None:
    simulation = qsim.simulate(model, example=noise(2, 5, 8))

    aliases = {name: site.aliases for name, site in simulation.sites.table.items() if site.aliases}
    assert aliases == {f":matmul.{scores}": [":qk"], f":matmul.{scores + 1}": [":pv"]}


def test_what_no_site_meets_is_listed() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.lstm = nn.Linear(4, 4), nn.LSTM(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y, _ = self.lstm(self.linear(x))
            return F.bilinear(y, y, torch.ones(2, 4, 4))

    simulation = qsim.simulate(Hidden(), activations="int8", example=torch.ones(3, 1, 4))

    audit = simulation.audit()

    assert audit.covered == 1
    assert audit.found == 1 + len(audit.uncovered)
    assert any(entry.startswith("lstm:") for entry in audit.uncovered)
    assert any(entry.startswith(":") for entry in audit.uncovered)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("sparse", [Tensor.to_sparse, Tensor.to_sparse_csr])
@pytest.mark.parametrize("product", [torch.matmul, torch.mm, torch.sparse.mm])
@pytest.mark.parametrize("as_weight", [True, False])
def test_a_product_with_a_sparse_matrix_is_listed(
    product: Callable[..., Tensor], sparse: Callable[[Tensor], Tensor], as_weight: bool
) -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.adjacency = nn.Parameter(adjacency, requires_grad=False) if as_weight else adjacency

        def forward(self, x: Tensor) -> Tensor:
            return product(self.adjacency, self.layer(x))

    adjacency = sparse(torch.eye(5))
    audit = qsim.simulate(Graph(), weights="int8", activations="int8", example=noise(5, 8)).audit()

    assert [site.site for site in audit.sites] == ["layer"]
    assert len(audit.uncovered) == 1


SPARSE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hspmm": lambda adjacency, x: torch.hspmm(adjacency, x).to_dense(),
    "sspaddmm": lambda adjacency, x: torch.sspaddmm(torch.zeros(5, 8).to_sparse(), adjacency, x),
    "_sparse_addmm": lambda adjacency, x: torch.sparse.addmm(torch.zeros(5, 8), adjacency, x),
    "sparse_sampled_addmm": lambda adjacency, x: torch.sparse.sampled_addmm(adjacency.to_sparse_csr(), x, x.T),
    "_sparse_sparse_matmul": lambda adjacency, x: torch.sparse.mm(adjacency, x.to_sparse()),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("operator", SPARSE)
def test_an_operator_of_sparse_matrices_is_listed(operator: str) -> None:
    model, adjacency = nn.Sequential(nn.Linear(8, 8)), torch.eye(5).to_sparse()
    model.forward = lambda x: SPARSE[operator](adjacency, model[0](x))  # type: ignore[method-assign]

    audit = qsim.simulate(model, weights="int8", example=noise(5, 8)).audit()

    assert audit.uncovered == [f":{operator}"]


@pytest.mark.parametrize("rows", [5, 50])
def test_distances_are_listed(rows: int) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model.forward = lambda x: torch.cdist(model[0](x), x)  # type: ignore[method-assign]
    audit = qsim.simulate(model, activations="int8", example=noise(rows, 8)).audit()

    assert (audit.covered, len(audit.uncovered)) == (1, 1)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_listed_and_does_not_stop_the_audit() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    class Flex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.qkv = nn.LayerNorm(16), nn.Linear(16, 48)

        def forward(self, x: Tensor) -> Tensor:
            heads = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
            return flex_attention(*heads)  # type: ignore[return-value]

    model, x = Flex().eval(), noise(1, 5, 16)

    audit = qsim.simulate(model, activations="int8", example=x).audit()

    assert (audit.covered, audit.found, audit.uncovered) == (1, 2, [":higher_order::flex_attention"])


def test_in_inference_mode_too(make: Make, ids: Tensor) -> None:
    model = make("gpt2", "sdpa")
    simulation = qsim.simulate(model, weights="int4", activations="int4")
    expected = logits(model, ids)

    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert {site.calls for site in simulation.sites.table.values()} == {2}


def test_a_simulation_leaves_no_cycle_that_keeps_activations(make: Make, ids: Tensor) -> None:
    model = make("opt")
    simulation = qsim.simulate(model, activations="int8")
    logits(model, ids)

    assert simulation.sites.stack.quantized is None
    gc.collect()
    assert simulation.sites.stack.caller is None


def test_the_error_of_a_result_is_measured_before_a_mask_is_added() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return torch.baddbmm(mask, x, x.transpose(1, 2))

    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    measured = []
    for masked in (0.0, 1000.0):
        simulation = qsim.simulate(Masked().eval(), outputs="tensor(int4)", example=(x, torch.full((2, 4, 4), masked)))
        measured.append(simulation.audit().sites[0].measured["output"])

    assert measured[0] == measured[1]
