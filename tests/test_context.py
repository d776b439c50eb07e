"""The context of a transform: blocks in their order, the matmuls in them, weights that are final."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.transforms.blocks import block_paths
from qsim_core.transforms.context import Context

Make = Callable[..., Any]


def probe(apply: Callable[[nn.Module, Context], None]) -> qsim.Transform:
    """A transform that runs a function. It also changes a weight, because a transform without a change is an error."""

    class Probe(qsim.Transform):
        name = "probe"

        def apply(self, model: nn.Module, context: Context) -> None:
            apply(model, context)
            next(model.parameters()).add_(1)

    return Probe()


def gather(into: dict[str, list[Tensor]]) -> Callable[..., None]:
    """A watcher that keeps the operands of every matmul by the name of its site."""

    def watch(site: Any, call: Any) -> None:
        into.setdefault(site.name, []).extend(operand.clone() for operand in call.operands)

    return watch


def seq2seq() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=96, decoder_start_token_id=0)
    ).eval()


@pytest.mark.parametrize(
    ("family", "paths"),
    [
        ("opt", ["model.decoder.layers.0", "model.decoder.layers.1"]),
        ("llama", ["model.layers.0", "model.layers.1"]),
        ("gpt2", ["transformer.h.0", "transformer.h.1"]),
        ("codegen", ["transformer.h.0", "transformer.h.1"]),
    ],
)
def test_blocks_are_what_repeats(family: str, paths: list[str], make: Make, ids: Tensor) -> None:
    model = make(family)
    simulation = qsim.simulate(model, example={"input_ids": ids})

    assert block_paths(model, simulation.sites.table.values()) == paths


def test_blocks_are_whole_layers_not_their_halves(ids: Tensor) -> None:
    model = seq2seq()
    simulation = qsim.simulate(model, example={"input_ids": ids, "decoder_input_ids": ids[:, :5]})

    found = block_paths(model, simulation.sites.table.values())

    assert found == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]


def test_without_attention_blocks_are_the_elements_of_a_list_or_the_model() -> None:
    stack, alone = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), nn.Linear(4, 4)
    for model in (stack, alone):
        qsim.simulate(model, example=torch.ones(1, 4))

    assert block_paths(stack, stack[0]._forward_pre_hooks and qsim_sites(stack)) == ["0", "2"]
    assert block_paths(alone, qsim_sites(alone)) == [""]


def qsim_sites(model: nn.Module) -> Any:
    return vars(model)["extra_repr"].sites.table.values()


@pytest.mark.parametrize("family", ["opt", "opt-350m", "llama", "gpt2", "codegen", "t5"])
def test_a_walk_gives_each_block_the_inputs_that_the_model_gives_it(family: str, make: Make, ids: Tensor) -> None:
    model = seq2seq() if family == "t5" else make(family)
    batches: list[Any] = [{"input_ids": ids, "use_cache": False}, {"input_ids": ids.flip(1), "use_cache": False}]
    if family == "t5":
        batches = [{**batch, "decoder_input_ids": ids[:, :5]} for batch in batches]
    seen: dict[str, list[Tensor]] = {}

    def apply(model: nn.Module, context: Context) -> None:
        for block in context.blocks():
            with torch.no_grad():  # a change to a block changes the inputs of the blocks after it
                next(p for p in block.module.parameters() if p.dim() == 1).mul_(1.5)
            block.observe(gather(seen))
        whole: dict[str, list[Tensor]] = {}
        context.observe(gather(whole), "everything")
        for name, operands in seen.items():
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(operands, whole[name], strict=True)), name

    qsim.simulate(model, weights="int8", transforms=[probe(apply)], calibration=batches)

    assert len(seen) >= 8


@pytest.mark.parametrize("family", ["opt", "opt-350m", "gpt2", "t5"])
def test_a_walk_can_show_each_block_as_it_was(family: str, make: Make, ids: Tensor) -> None:
    model = seq2seq() if family == "t5" else make(family)
    batches: list[Any] = [{"input_ids": ids, "use_cache": False}, {"input_ids": ids.flip(1), "use_cache": False}]
    if family == "t5":
        batches = [{**batch, "decoder_input_ids": ids[:, :5]} for batch in batches]
    first: dict[str, list[Tensor]] = {}
    then: dict[str, list[Tensor]] = {}
    now: dict[str, list[Tensor]] = {}

    def apply(model: nn.Module, context: Context) -> None:
        context.observe(gather(first), "everything")
        for block in context.blocks(originals=True):
            next(p for p in block.module.parameters() if p.dim() == 2).mul_(1.5)
            assert block.original is not None
            block.observe(gather(now))
            block.original.observe(gather(then))

    qsim.simulate(model, weights="int8", transforms=[probe(apply)], calibration=batches)

    for name, operands in then.items():
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(operands, first[name], strict=True)), name
    assert not torch.equal(now[name][0], then[name][0])


def test_a_forward_can_quantize_activations_alone() -> None:
    model, x = nn.Linear(2, 2, bias=False), torch.tensor([[0.9, 2.2]])
    seen: list[Tensor] = []

    def apply(model: nn.Module, context: Context) -> None:
        def watch(site: Any, call: Any) -> None:
            seen.extend([call.input, context.with_quantized_inputs(site, call).input])

        with context.quantized_activations():
            context.observe(watch, "one")
            seen.append(model(x))
            with context.quantized_activations(False):
                seen.append(model(x))

    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, 0.0], [0.0, 0.25]]))
    qsim.simulate(model, weights="cast(int8)", activations="cast(int8)", transforms=[probe(apply)], calibration=[x])

    rounded = torch.tensor([[1.0, 2.0]])
    assert all(map(torch.equal, seen, [x, rounded, torch.tensor([[0.5, 0.5]]), torch.tensor([[0.45, 0.55]])]))


class Changing(nn.Module):
    """A block that changes what it is handed: its input, a list, a dictionary and an object."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, seen: list[Any], *, state: dict[str, Any], count: Any) -> Tensor:
        seen[count.calls] = x.clone()
        count.calls += 1
        x *= state.pop("factor") + 0.0
        state["factor"] = torch.full((), 3.0)
        y: Tensor = self.linear(x)
        return y


class WithChanging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Changing(), Changing()])

    def forward(self, x: Tensor, state: dict[str, Any]) -> Tensor:
        seen, count = [None, None], SimpleNamespace(calls=0)
        for block in self.blocks:
            x = block(x, seen, state=state, count=count)
        return x


def test_a_block_that_changes_what_it_is_handed_is_run_on_the_same_each_time() -> None:
    model = WithChanging()
    batches = [{"x": torch.ones(2, 8), "state": {"factor": torch.tensor(2.0)}} for _ in range(2)]
    seen: dict[str, list[Tensor]] = {}

    def apply(model: nn.Module, context: Context) -> None:
        def watch(site: Any, call: Any) -> None:
            seen.setdefault(site.name, []).append(call.input.clone())

        context.observe(watch, "everything")
        for block in context.blocks():
            block.observe(watch)
            block.observe(watch)

    qsim.simulate(model, weights="int8", transforms=[probe(apply)], calibration=batches)

    for inputs in seen.values():
        assert len(inputs) == 6
        assert all(torch.equal(found, inputs[0]) for found in inputs)
    assert torch.equal(seen["blocks.0.linear"][0], torch.full((2, 8), 2.0))
    assert batches[0] == {"x": batches[0]["x"], "state": {"factor": torch.tensor(2.0)}}
    assert torch.equal(batches[0]["x"], torch.ones(2, 8))


def test_a_report_says_if_its_layer_changed() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))

    def apply(model: nn.Module, context: Context) -> None:
        model.get_parameter("0.weight").mul_(0.5)
        next(site for site in context.all_sites if site.name == "1").rotations["input"] = torch.clone
        for layer in ("0", "0.weight", "0.bias", "1", "2"):
            context.report(layer)

    class Change(qsim.Transform):
        name = "change"

        def apply(self, model: nn.Module, context: Context) -> None:
            apply(model, context)

    simulation = qsim.simulate(model, weights="int8", transforms=[Change()], example=torch.ones(1, 8))

    assert [r.layer for r in simulation.reports if r.changed] == ["0", "0.weight", "1"]


def test_a_pinned_weight_is_not_rounded_again() -> None:
    model = nn.Linear(8, 4, bias=False)

    def apply(model: nn.Module, context: Context) -> None:
        for weight in context.weights():
            weight.parameter.fill_(0.3)
            context.pin(weight)

    class Fill(qsim.Transform):
        name = "fill"

        def apply(self, model: nn.Module, context: Context) -> None:
            apply(model, context)

    qsim.simulate(model, weights="cast(int4)", transforms=[Fill()], example=torch.ones(1, 8))

    assert torch.allclose(model(torch.ones(1, 8)), torch.full((1, 4), 2.4))


def test_the_input_of_a_call_has_its_reduction_axis_last(make: Make, ids: Tensor) -> None:
    model, lengths = make("gpt2"), {}

    def apply(model: nn.Module, context: Context) -> None:
        def watch(site: Any, call: Any) -> None:
            if call.weight is not None:
                lengths[site.name] = call.input.shape[-1]

        context.observe(watch, "lengths")

    qsim.simulate(model, weights="int8", transforms=[probe(apply)], calibration=[{"input_ids": ids}])

    assert lengths["transformer.h.0.mlp.c_fc"] == 64
    assert lengths["transformer.h.0.mlp.c_proj"] == 256


def test_a_transform_that_changes_nothing_is_an_error() -> None:
    class Idle(qsim.Transform):
        name = "idle"

        def apply(self, model: nn.Module, context: Context) -> None:
            context.report("0", note="no norm before it")

    with pytest.raises(qsim.RecipeError, match="^idle changed nothing in this model: no norm before it$"):
        qsim.simulate(nn.Linear(4, 4), weights="int4", transforms=[Idle()], example=torch.ones(1, 4))


def test_a_transform_without_calibration_data_says_how_to_give_some() -> None:
    def apply(model: nn.Module, context: Context) -> None:
        context.observe(lambda site, call: None, "")

    with pytest.raises(qsim.DataError, match="^probe needs calibration data; give simulate"):
        qsim.simulate(nn.Linear(4, 4), weights="int4", transforms=[probe(apply)], example=torch.ones(1, 4))


def test_nan_in_the_calibration_data_names_site_and_sample() -> None:
    def apply(model: nn.Module, context: Context) -> None:
        context.observe(lambda site, call: None, "")

    batches = [torch.ones(1, 4), torch.full((1, 4), torch.nan)]
    with pytest.raises(qsim.DataError, match="^calibration batch 1 brings NaN or Inf to 0; leave it out$"):
        qsim.simulate(nn.Sequential(nn.Linear(4, 4)), weights="int4", transforms=[probe(apply)], calibration=batches)


def test_nan_in_a_weight_is_not_blamed_on_the_calibration_data() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight.data[0, 0] = torch.nan

    with pytest.raises(qsim.ModelError, match="^the weight of 0 holds NaN or Inf$"):
        qsim.simulate(model, weights="int4", transforms=["gptq"], calibration=[torch.ones(8, 4)])


@pytest.mark.parametrize("what", ["order", "site"])
def test_a_new_order_and_a_new_quantizer_are_changes(what: str) -> None:
    class Change(qsim.Transform):
        name = "change"

        def apply(self, model: nn.Module, context: Context) -> None:
            if what == "order":
                parameter = next(model.parameters())
                parameter.copy_(parameter.flip(0))
            else:
                next(iter(context.sites.table.values())).fixed["input"] = None

    x = torch.ones(1, 4)
    simulation = qsim.simulate(nn.Linear(4, 4), activations="int8", transforms=[Change()], calibration=[x])

    texts = [site.input for site in simulation.audit(x).sites]
    assert texts == ["token(int8)" if what == "order" else None]


def test_restore_takes_the_hooks_of_transforms_away() -> None:
    class Hook(qsim.Transform):
        name = "hook"

        def apply(self, model: nn.Module, context: Context) -> None:
            context.handles.append(model.register_forward_hook(lambda module, args, output: output + 1))
            next(model.parameters()).add_(1)

    model, x = nn.Linear(4, 4), torch.ones(1, 4)
    before = model(x)

    simulation = qsim.simulate(model, activations="int8", transforms=[Hook()], calibration=[x])

    assert not torch.equal(model(x), before)
    assert torch.equal(simulation.restore()(x), before)


class Masked(nn.Module):
    """A product of activations with a mask."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(torch.full((1, 5, 5), 0.3), x, x.transpose(1, 2))


class Experts(nn.Module):
    """Two experts in one weight, of which the second is a hundred times as large."""

    def __init__(self) -> None:
        super().__init__()
        scales = torch.tensor([1.0, 100.0])[:, None, None]
        self.weight = nn.Parameter(scales * torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.expand(2, -1, -1), self.weight)


@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        (nn.Linear(8, 4), {"weights": "int4", "activations": "int8", "outputs": "int6"}),
        (nn.Linear(8, 4), {"weights": "int(4, rounding=stochastic)", "activations": "int4"}),
        (Experts(), {"weights": "tensor(int4)", "activations": "tensor(int4)", "outputs": "e4m3"}),
        (Masked(), {"activations": "int4", "outputs": "cast(int4)"}),
    ],
    ids=["linear", "stochastic", "experts", "mask"],
)
def test_what_is_tried_is_what_the_site_computes(model: nn.Module, recipe: dict[str, str]) -> None:
    """The random numbers of a weight are the same, too."""
    tried: list[Tensor] = []

    class Trying(qsim.Transform):
        name = "trying"

        def apply(self, model: nn.Module, context: Context) -> None:
            context.observe(lambda site, call: tried.append(context.simulated(site, call)), "trying")
            site = next(iter(context.all_sites))
            site.fixed["input"] = site.planned("input")  # a transform has to change something

    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1))
    qsim.simulate(model.eval(), {**recipe, "transforms": [Trying()]}, calibration=[x])

    with torch.no_grad():
        assert torch.equal(tried[0], model(x))
