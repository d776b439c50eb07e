"""`simulate` changes a model in place, by a recipe or by its parts; it is audited, and undone bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsim_core as qsim

Make = Callable[..., Any]


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


X = torch.linspace(-1, 1, 24).reshape(3, 8)


def test_the_numbers_are_those_of_quantizing_by_hand() -> None:
    model = perceptron()
    w8, a8 = qsim.parse("channel(int4)"), qsim.parse("token(int8)")
    hidden = torch.relu(nn.functional.linear(a8(X), w8(model[0].weight), model[0].bias).bfloat16().float())
    by_hand = nn.functional.linear(a8(hidden), w8(model[2].weight), model[2].bias).bfloat16().float()

    qsim.simulate(model, weights="int4", activations="int8", outputs="bf16")

    assert torch.equal(model(X), by_hand)


def test_restore_is_bit_identical_and_leaves_nothing(make: Make, ids: Tensor) -> None:
    model = make("opt")
    before, keys, attributes = model(input_ids=ids).logits, list(model.state_dict()), str(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    simulation = qsim.simulate(model, weights="int2", activations="int2", outputs="bf16")
    assert not torch.equal(model(input_ids=ids).logits, before)
    assert list(model.state_dict()) == keys
    assert simulation.restore() is model

    assert torch.equal(model(input_ids=ids).logits, before)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert str(model) == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks or "extra_repr" in vars(m) for m in model.modules())


@pytest.mark.parametrize("keep", [True, False])
def test_final_weights_are_not_rounded_again(keep: bool) -> None:
    model, w4 = perceptron(), qsim.parse("channel(int4)")
    by_hand = model[2](model[1](nn.functional.linear(X, w4(model[0].weight), model[0].bias)))

    simulation = qsim.simulate(model, weights="int4", final={"2.weight": None}, example=X, keep=keep)

    assert torch.equal(model(X), by_hand)
    assert simulation.audit().covered == 2


def test_as_a_context_it_restores_by_itself() -> None:
    model = perceptron()
    before = model(X)

    with qsim.simulate(model, weights="int2"):
        assert not torch.equal(model(X), before)

    assert torch.equal(model(X), before)


def test_keep_false_overwrites_the_weights_and_cannot_restore() -> None:
    model, other = perceptron(), perceptron()
    simulation = qsim.simulate(model, weights="int3", keep=False)
    qsim.simulate(other, weights="int3")

    assert torch.equal(model(X), other(X))
    assert torch.equal(model[0].weight, qsim.parse("channel(int3)")(other[0].weight))
    assert all(folded.copy is None for folded in simulation.sites.weights.folded.values())
    with pytest.raises(qsim.QsimError, match="the original weights are gone; load them again"):
        simulation.restore()


def test_weights_are_quantized_once_in_eval_and_again_when_they_change() -> None:
    calls = 0

    def count(w: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return w.clone()

    model = perceptron()
    qsim.simulate(model, weights=count)

    for _ in range(3):
        model(X)
    assert calls == 2
    model.load_state_dict(perceptron().state_dict())
    model(X)
    assert calls == 4


@pytest.mark.parametrize("keep", [True, False])
def test_loaded_weights_are_quantized_anew(keep: bool) -> None:
    model = perceptron()
    qsim.simulate(model, weights="int3", keep=keep)
    model(X)
    torch.manual_seed(7)
    fresh = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()

    model.load_state_dict(fresh.state_dict())
    qsim.simulate(fresh, weights="int3")

    assert torch.equal(model(X), fresh(X))


def test_overwritten_weights_are_not_quantized_twice_when_they_come_back() -> None:
    model = perceptron()
    qsim.simulate(model, weights=lambda w: w / 2, keep=False)  # a second time would show
    expected = model(X)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    model.load_state_dict(state)
    assert torch.equal(model(X), expected)
    model.load_state_dict(state, assign=True)
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("keep", [True, False])
def test_a_weight_that_was_exchanged_is_quantized_anew(keep: bool) -> None:
    model = nn.Linear(8, 4, bias=False)
    qsim.simulate(model, weights="int4", keep=keep)
    x, new = torch.eye(8), torch.arange(32.0).view(4, 8)
    with torch.no_grad():
        model(x)

        model.weight.data = new.clone()

        assert torch.equal(model(x).T, qsim.parse("channel(int4)")(new))


def test_simulate_that_fails_leaves_the_model_as_it_was() -> None:
    class Refuses(nn.Module):
        """A module that refuses hooks, as a scripted module does."""

        def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no hooks here")

        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.Sequential(nn.Linear(4, 4), Refuses())
    x = torch.ones(1, 4)
    expected = model(x)

    with pytest.raises(RuntimeError, match="no hooks here"):
        qsim.simulate(model, activations="int2")

    assert torch.equal(model(x), expected)
    assert not model[0]._forward_pre_hooks
    assert "extra_repr" not in vars(model[0])


def test_functional_gradients_pass_through() -> None:
    model = nn.Linear(4, 1)
    qsim.simulate(model, activations="int8")
    x = torch.ones(4)

    gradient = torch.func.grad(lambda v: model(v).sum())(x)

    assert torch.equal(gradient, model.weight.detach()[0])


def test_training_moves_the_weights_themselves() -> None:
    model = perceptron().train()
    qsim.simulate(model, weights="int4", activations="int8")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = (model(X) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < 0.2 * losses[0]
    assert len(model[0].weight[0].unique()) == 8, "masters stay float32"


def test_gradients_in_eval_are_those_of_training() -> None:
    def gradient(model: nn.Sequential) -> Tensor:
        qsim.simulate(model, weights="int4", activations="int8")
        model(X).square().sum().backward()
        return model[0].weight.grad  # type: ignore[return-value]

    assert torch.equal(gradient(perceptron().eval()), gradient(perceptron().train()))


def test_print_shows_each_sites_quantizers() -> None:
    model = perceptron()
    qsim.simulate(model, weights="abfp(int4, n=4)", activations="int8", skip=["2"])

    assert str(model) == (
        "Sequential(\n"
        "  (0): Linear(in_features=8, out_features=16, bias=True, weight=abfp(int4, n=4), input=token(int8))\n"
        "  (1): ReLU()\n"
        "  (2): Linear(in_features=16, out_features=4, bias=True)\n"
        ")"
    )


def test_print_shows_the_sites_of_modules_that_write_their_own_text_at_their_parents(make: Make, ids: Tensor) -> None:
    model = make("gpt2")
    qsim.simulate(model, weights="int4", activations="int8", example={"input_ids": ids})

    text = str(model)

    assert "c_attn: weight=channel(int4) input=token(int8), c_proj: weight=channel(int4) input=token(int8)" in text


def test_print_shows_parameters_that_are_no_modules_weight() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.ones(1, 3, 8)
    qsim.simulate(attention, weights="int4", example=(x, x, x))

    assert "in_proj_weight: weight=channel(int4)" in str(attention)


def test_print_shows_attention_products_once_they_are_known(make: Make, ids: Tensor) -> None:
    model = make("opt")
    qsim.simulate(model, activations="int8", outputs="bf16", example={"input_ids": ids})

    assert "qk: input=token(int8) output=cast(bf16), pv: input=token(int8) output=cast(bf16)\n" in str(model)


def test_skip_and_overrides_say_what_is_different() -> None:
    model = perceptron()
    simulation = qsim.simulate(
        model,
        weights="int4",
        overrides={"*": {"activations": "int8"}, "2": {"weights": None, "outputs": "bf16"}},
        example=X,
    )

    first, second = simulation.audit().sites

    assert (first.weight, first.input, first.output) == ("channel(int4)", "token(int8)", None)
    assert (second.weight, second.input, second.output) == (None, "token(int8)", "cast(bf16)")


@pytest.mark.parametrize("where", ["skip", "overrides"])
def test_a_pattern_that_matches_nothing_is_an_error_at_once_with_an_example(where: str) -> None:
    model = perceptron()
    before = model(X)
    wrong: Any = {"skip": ["layer.*"]} if where == "skip" else {"overrides": {"layer.*": {"weights": "int8"}}}

    with pytest.raises(qsim.RecipeError, match=r"^pattern 'layer.\*' matches no site. There are: 0, 2$"):
        qsim.simulate(model, weights="int4", example=X, **wrong)

    assert torch.equal(model(X), before), "the model is as it was"


def test_without_an_example_it_is_an_error_after_the_first_forward() -> None:
    model = perceptron()
    qsim.simulate(model, weights="int4", skip=["1"])

    with pytest.raises(qsim.RecipeError, match="pattern '1' matches no site"):
        model(X)

    assert torch._C._len_torch_function_stack() == 0


def test_an_alias_in_a_recipe_needs_an_example_under_eager_attention(make: Make, ids: Tensor) -> None:
    model = make("opt", "eager")
    overrides = {"*:qk": {"activations": "int4"}}
    qsim.simulate(model, activations="int8", overrides=overrides)
    with pytest.raises(qsim.RecipeError, match="self_attn:qk', .* give simulate an example"):
        model(input_ids=ids)

    simulation = qsim.simulate(
        fresh := make("opt", "eager"), activations="int8", overrides=overrides, example={"input_ids": ids}
    )

    fresh(input_ids=ids)
    inputs = {site.aliases[0].rpartition(":")[2]: site.input for site in simulation.audit().sites if site.aliases}
    assert inputs == {"qk": "token(int4)", "pv": "token(int8)"}


def test_a_requested_quantizer_that_reaches_no_site_is_an_error() -> None:
    with pytest.raises(qsim.RecipeError, match=r"^weights: channel\(int4\) reached no site of this model$"):
        qsim.simulate(perceptron(), weights="int4", skip=["*"], example=X)


def test_a_model_is_simulated_once_at_a_time() -> None:
    model = perceptron()
    qsim.simulate(model)

    with pytest.raises(qsim.QsimError, match=r"simulated already; restore\(\) it first"):
        qsim.simulate(model)


def test_a_recipe_or_its_parts_but_not_both() -> None:
    with pytest.raises(qsim.RecipeError, match=r"give a recipe or its parts, not both \(here: recipe and weights\)"):
        qsim.simulate(perceptron(), qsim.Recipe(), weights="int4")


def test_a_recipe_may_be_plain_data() -> None:
    model = perceptron()
    simulation = qsim.simulate(model, {"weights": "int4", "skip": ["0"]}, example=X)

    assert [site.weight for site in simulation.audit().sites] == [None, "channel(int4)"]


def test_an_example_leaves_batch_statistics_and_mode_alone() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5)).train()
    state = torch.get_rng_state()

    qsim.simulate(model, weights="int4", example=torch.randn(2, 2, 4, 4, generator=torch.Generator()))

    assert model.training and model[2].training
    assert model[1].num_batches_tracked == 0
    assert torch.equal(torch.get_rng_state(), state)


class Halve(qsim.Transform):
    """A transform that halves every weight."""

    name = "halve"

    def apply(self, model: nn.Module, context: Any) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)


def test_transforms_come_first_and_are_undone_too() -> None:
    model = perceptron()
    before = model(X)
    simulation = qsim.simulate(model, qsim.Recipe(weights="int8", transforms=(Halve(),)), example=X)  # type: ignore[arg-type]
    assert model(X).abs().max() < 0.6 * before.abs().max()

    simulation.restore()

    assert torch.equal(model(X), before)


class TestAudit:
    """The audit of one batch."""

    def test_it_measures_each_role(self) -> None:
        model = perceptron()
        recipe = {"weights": "int4", "activations": "tensor(int8)", "outputs": "bf16", "arithmetic": "float32"}
        simulation = qsim.simulate(model, recipe, example=X)

        site = simulation.audit().sites[0]

        x, w = X, model[0].weight.detach()
        error = w - qsim.parse("channel(int4)")(w)
        assert site.measured["weight"].sqnr_db == pytest.approx(
            10 * float((w.square().sum() / error.square().sum()).log10()), abs=1e-4
        )
        assert site.measured["weight"].bits == 4 + 32 / 8
        assert site.measured["input"].bits == pytest.approx(8 + 32 / x.numel())
        assert site.measured["output"].bits == 16
        assert site.notes == ["one input scale for the whole tensor: it depends on the batch and sees later tokens"]
        assert (site.site, site.op, site.arithmetic, site.calls) == ("0", "linear", "float32", 1)

    def test_it_counts_what_is_clipped_and_flushed(self) -> None:
        model = nn.Linear(4, 1, bias=False)
        simulation = qsim.simulate(model, activations="cast(int4)", example=torch.tensor([[0.2, 9.0, 1.0, 0.0]]))

        measured = simulation.audit().sites[0].measured["input"]

        assert (measured.clipped, measured.flushed) == (0.25, 0.25)

    def test_it_averages_bits_over_all_elements(self) -> None:
        simulation = qsim.simulate(perceptron(), weights="int4", activations="cast(int8)", example=X)

        audit = simulation.audit()

        weights = 8 * 16, 16 * 4
        bits = (4 + 32 / 8) * weights[0] + (4 + 32 / 16) * weights[1]
        assert audit.bits_per_weight == pytest.approx(bits / sum(weights))
        assert audit.bits_per_activation == 8

    def test_a_callables_bits_are_unknown(self) -> None:
        audit = qsim.simulate(perceptron(), weights=torch.trunc, example=X).audit()

        assert audit.bits_per_weight is None
        assert audit.sites[0].weight == "function(trunc)"

    def test_a_callable_may_see_anything(self) -> None:
        audit = qsim.simulate(perceptron(), activations=torch.trunc, example=X).audit()

        (note,) = {note for site in audit.sites for note in site.notes}
        assert note == "function(trunc) does not say what shares a scale: its input may depend on later tokens"

    def test_after_restore_there_is_nothing_to_look_at(self) -> None:
        simulation = qsim.simulate(perceptron(), weights="int4", example=X)
        simulation.restore()

        with pytest.raises(qsim.QsimError, match=r"^there is nothing to audit: this simulation was restored$"):
            simulation.audit()

    def test_it_leaves_no_trace(self) -> None:
        model = perceptron()
        simulation = qsim.simulate(model, weights="int4", example=X)
        model(X)
        before = model(X)

        first, second = simulation.audit(), simulation.audit(X)

        assert first == second
        assert torch.equal(model(X), before)
        assert {site.calls for site in simulation.sites.table.values()} == {3}

    def test_weights_are_measured_before_they_are_overwritten_and_not_afterwards(self) -> None:
        kept = qsim.simulate(perceptron(), weights="int4", example=X).audit()
        simulation = qsim.simulate(perceptron(), weights="int4", example=X, keep=False)

        first, second = simulation.audit(), simulation.audit()

        assert first == kept
        assert second.sites[0].measured["weight"].sqnr_db is None
        assert second.bits_per_weight == kept.bits_per_weight

    def test_without_an_example_it_tells_what_was_met(self) -> None:
        model = perceptron()
        simulation = qsim.simulate(model, weights="int4")
        assert simulation.audit().found == 0
        model(X)

        audit = simulation.audit()

        assert (audit.covered, audit.found, audit.sites[0].measured) == (2, 2, {})

    def test_skipped_sites_are_listed(self) -> None:
        audit = qsim.simulate(perceptron(), weights="int4", skip="2", example=X).audit()

        assert (audit.covered, audit.found, audit.skipped) == (1, 2, ["2"])


@pytest.mark.parametrize(("outputs", "warned"), [("int16", True), ("token(int16)", False), ("bf16", False)])
def test_a_format_without_a_scale_that_loses_most_values_is_warned_of(outputs: str, warned: bool) -> None:
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 8)), torch.randn(4, 8) / 8

    with qsim.simulate(model, {"outputs": outputs}, example=x) as simulation:
        warnings = simulation.audit().warnings

    assert [line.partition(" at ")[0] for line in warnings] == [
        "cast(int16) has no scale, and clips or flushes most of the output"
    ] * warned


def test_a_static_scale_is_named_by_its_role_in_attention() -> None:
    q, k, v = (torch.randn(1, 1, 4, 8) for _ in range(3))

    class Attention(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, k, v)

    with qsim.simulate(Attention(), {"keys": "tensor(int8, static=true)"}, example=q, calibration=[q]) as simulation:
        held = [site.fixed["input2"] for site in simulation.sites.table.values() if site.fixed]

    assert [one.where for one in held] == [":matmul.0 (keys)"]


def test_an_observer_of_the_audit_sees_rows_before_and_after_their_quantizer() -> None:
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def observe(site: Any, role: str, before: torch.Tensor, after: torch.Tensor, quantizer: Any) -> None:
        seen[role] = before, after

    x = torch.tensor([[0.4, 1.0, 7.0]])
    with qsim.simulate(nn.Linear(3, 2), activations="int4", example=x) as simulation:
        simulation.audit(observer=observe)

    assert seen["input"][0].equal(x)
    assert seen["input"][1].tolist() == [[0.0, 1.0, 7.0]]
