"""RPTQ against its reference's formulas, and for what it promises: the same function, narrower clusters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from qsim_rptq.held import Clustered
from qsim_structure.for_transforms import structure_of
from torch import Tensor, nn

import qsim_core as qsim
from qsim_core.cli.main import main
from qsim_core.testing import QuantizerSuite, TransformSuite
from qsim_core.testing import both_ways as both_ways
from qsim_core.transforms.context import Context

SIZES = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OPT = {**LAYERS, "ffn_dim": 48, "word_embed_proj_dim": 32}
LLAMA = {**LAYERS, "intermediate_size": 48, "num_key_value_heads": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("OPTForCausalLM", OPT),
    "opt-350m": ("OPTForCausalLM", OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "llama": ("LlamaForCausalLM", LLAMA),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | {"head_dim": 8}),
    "mixtral": ("MixtralForCausalLM", LLAMA | {"num_local_experts": 8}),
    "gpt2": ("GPT2LMHeadModel", GPT),
    "codegen": ("CodeGenForCausalLM", GPT | {"rotary_dim": 4}),
    "bloom": ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
}
LAYER = "model.decoder.layers.0"
SKIP = ["lm_head"]


def build(family: str, **options: Any) -> Any:
    """A tiny seeded model whose channels differ: norms and biases are random, some large."""
    import transformers

    name, sizes = FAMILIES[family]
    made = getattr(transformers, name)
    config = made.config_class(**SIZES | sizes | options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = made._from_config(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() < 2:
                    parameter.add_(0.5 * torch.randn_like(parameter))
                if "norm" in name or "ln_" in name:
                    parameter[[3, 7]] *= 8
    return model


def tokens(seed: int) -> dict[str, Any]:
    return {
        "input_ids": torch.randint(3, 64, (1, 12), generator=torch.Generator().manual_seed(seed)),
        "use_cache": False,
    }


BATCHES = [tokens(seed) for seed in range(3)]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**BATCHES[0]).logits  # type: ignore[no-any-return]


def rptq(model: Any, options: str = "4, head_clusters=2", **recipe: Any) -> qsim.Simulation:
    recipe = {"weights": "int8", "activations": "int4", "skip": SKIP, **recipe}
    return qsim.simulate(model, recipe | {"transforms": [f"rptq({options})"]}, calibration=BATCHES)


def seen(model: Any, path: str, output: bool = False) -> list[Tensor]:
    """The inputs or the outputs of a module, batch by batch: [tokens, channels]."""
    found: list[Tensor] = []
    hook = lambda m, args, out: found.append((out if output else args[0]).detach().flatten(0, -2))  # noqa: E731
    handle = model.get_submodule(path).register_forward_hook(hook)
    with torch.no_grad():
        for batch in BATCHES:
            model(**batch)
    handle.remove()
    return found


def k_means(points: Tensor, clusters: int) -> Tensor:
    """The reference's labels of points [channels, features]."""
    from sklearn.cluster import KMeans

    return torch.from_numpy(KMeans(clusters, n_init=10, random_state=0).fit(points.double().numpy()).labels_).long()


def ends(values: list[Tensor]) -> Tensor:
    """(max, min) of each channel: [channels, 2]."""
    both = torch.cat(values)
    return torch.stack([both.amax(0), both.amin(0)], -1)


def fixed(simulation: qsim.Simulation, name: str, role: str = "input") -> Any:
    (site,) = (site for site in simulation.sites.table.values() if name in site.names)
    return site.fixed.get(role)


def notes(simulation: qsim.Simulation) -> dict[str, str]:
    return {report.layer: report.note for report in simulation.reports if report.after is None}


@pytest.mark.parametrize(
    ("family", "reordered"),
    [
        ("opt", 10),
        ("opt-350m", 7),
        ("llama", 8),
        ("qwen3", 8),
        ("mixtral", 6),
        ("gpt2", 8),
        ("codegen", 2),
        ("bloom", 8),
    ],
)
@pytest.mark.filterwarnings("ignore:.*grouped_mm.*")
def test_the_function_stays(family: str, reordered: int) -> None:
    model = build(family)
    before = logits(model)

    simulation = rptq(model)
    simulation.sites.quantizing = False

    assert (logits(model) - before).abs().max() <= 1e-5 * before.abs().max()
    assert len([report for report in simulation.reports if report.after is not None]) == reordered


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value_axis", ["tokens", "head"])
def test_sixteen_bits_change_next_to_nothing(family: str, value_axis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scale stands where its channel does: a scale of another cluster would clip."""
    monkeypatch.setattr("qsim_rptq.held.SMALLEST", 1e-12)  # the reference's bounds are for few bits
    model = build(family)
    before = logits(model)

    rptq(
        model,
        "4, head_clusters=2, p_bits=16, momentum=none",
        weights=None,
        activations="int16",
        value_axis=value_axis,
    )

    assert (logits(model) - before).norm() <= 2e-3 * before.norm()


def test_the_order_of_a_norm_is_that_of_scikit_learns_clusters() -> None:
    model = build("opt")
    before = model.get_submodule(f"{LAYER}.self_attn_layer_norm").weight.detach().clone()
    columns = model.get_submodule(f"{LAYER}.self_attn.k_proj").weight.detach().clone()
    order = k_means(ends(seen(model, f"{LAYER}.self_attn_layer_norm", output=True)), 4).argsort(stable=True)

    rptq(model, weights=None)

    assert torch.equal(model.get_submodule(f"{LAYER}.self_attn_layer_norm").weight, before[order])
    # q and k change places within their heads too, so k's rows are compared as a set
    changed = model.get_submodule(f"{LAYER}.self_attn.k_proj").weight
    assert torch.equal(changed.sort(0).values, columns[:, order].sort(0).values)


def test_q_and_k_are_clustered_together_head_by_head() -> None:
    model = build("opt")
    attention = f"{LAYER}.self_attn"
    made = [seen(model, f"{attention}.{name}", output=True) for name in ("q_proj", "k_proj")]
    (q, k), before = (ends(values) for values in made), model.get_submodule(f"{attention}.q_proj").bias.detach().clone()
    points = torch.stack([q[:, 0], k[:, 0], q[:, 1], k[:, 1]], -1).view(4, 8, 4)
    order = torch.cat([8 * head + k_means(points[head], 2).argsort(stable=True) for head in range(4)])

    rptq(model, weights=None)

    assert torch.equal(model.get_submodule(f"{attention}.q_proj").bias, before[order])


@pytest.mark.usefixtures("both_ways")
def test_scales_are_the_references() -> None:
    """Extremes of each cluster averaged over batches, (max - min) / 16 and round(-(max + min) / (2 scale))."""
    model = build("opt")
    values = seen(model, f"{LAYER}.fc2")
    labels = k_means(ends(values), 4).sort().values
    order = k_means(ends(values), 4).argsort(stable=True)
    low = high = None
    for x in values:
        lowest = torch.stack([x[:, order][:, labels == c].min() for c in range(4)])
        highest = torch.stack([x[:, order][:, labels == c].max() for c in range(4)])
        low = lowest if low is None else 0.99 * low + 0.01 * lowest
        high = highest if high is None else 0.99 * high + 0.01 * highest
    scale = ((high - low) * 2**-4).clamp(1e-4, 1e4)
    zero = ((high + low) * (-0.5 / scale)).round()
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    expected = (((x / scale[labels]).round() + zero[labels]).clamp(-8, 7) - zero[labels]) * scale[labels]

    held = fixed(rptq(model), f"{LAYER}.fc2")

    assert torch.allclose(held.scale, scale[labels], rtol=1e-6)
    assert torch.equal(held.zero, zero[labels])
    assert torch.allclose(held(x), expected, rtol=1e-5)


def test_a_channel_whose_values_hardly_differ_keeps_them() -> None:
    """The smallest scale, 1e-4, is 30,000 steps below 3: more than the reference's zero points have."""
    low, high = torch.tensor([2.999, -1.0]), torch.tensor([3.001, 1.0])

    held = Clustered.covering(low, high, qsim.parse("int8").full(), 2)

    assert torch.allclose(held.quantize(torch.tensor([[3.0, 0.5]])), torch.tensor([[3.0, 0.5]]), atol=1e-4)


class TokenByToken(nn.Module):
    """A norm and a weight that read one token after another."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.up(self.norm(token)) for token in x])


def test_a_batch_is_one_range_however_many_calls_it_makes() -> None:
    model, batch = TokenByToken().eval(), {"x": torch.randn(8, 4, generator=torch.Generator().manual_seed(0))}
    normed = model.norm(batch["x"])

    simulation = qsim.simulate(model, activations="int8", transforms=["rptq(clusters=1)"], calibration=[batch])

    assert torch.allclose(fixed(simulation, "up").scale * 256, normed.max() - normed.min(), rtol=1e-5)


def test_momentum_none_covers_all_data() -> None:
    model = build("opt")
    everything = torch.cat(seen(model, f"{LAYER}.fc2"))

    held = fixed(rptq(model, "1, momentum=none"), f"{LAYER}.fc2")

    assert torch.allclose(held.scale, (everything.max() - everything.min()) / 16)


def test_each_site_says_what_it_has() -> None:
    simulation = rptq(build("opt"))

    texts = {site.site: site.input for site in simulation.audit(BATCHES[0]).sites if site.site.startswith(LAYER)}

    wide, narrow = "rptq(int(4, narrow=false), 4 clusters)", "rptq(int(4, narrow=false), 8 clusters)"
    assert texts == {
        f"{LAYER}.self_attn.q_proj": wide,
        f"{LAYER}.self_attn.k_proj": wide,
        f"{LAYER}.self_attn.v_proj": wide,
        f"{LAYER}.self_attn:matmul.0": narrow,
        f"{LAYER}.self_attn:matmul.1": f"cast(unit_interval(8)), {narrow}",
        f"{LAYER}.self_attn.out_proj": narrow,
        f"{LAYER}.fc1": wide,
        f"{LAYER}.fc2": wide,
    }
    assert simulation.audit(BATCHES[0]).notes == []


def test_q_k_and_v_share_one_quantizer() -> None:
    simulation = rptq(build("opt"))

    assert len({id(fixed(simulation, f"{LAYER}.self_attn.{name}_proj")) for name in "qkv"}) == 1


@pytest.mark.usefixtures("both_ways")
def test_probabilities_have_255_levels() -> None:
    held = fixed(rptq(build("opt")), f"{LAYER}.self_attn:pv")
    x = torch.rand(100, generator=torch.Generator().manual_seed(0))

    assert torch.equal(held(x), x.mul(255).round().div(255))
    assert held(torch.tensor([1.5, -0.5])).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("options", "norm", "p"),
    [
        ("4", "rptq(int(4, narrow=false), 4 clusters)", "cast(unit_interval(8))"),
        ("4, preset=paper", "rptq(int(8, narrow=false), 4 clusters)", "cast(unit_interval(8))"),
        ("4, norm_bits=6, p_bits=4", "rptq(int(6, narrow=false), 4 clusters)", "cast(unit_interval(4))"),
        ("4, norm_bits=3, p_bits=none", "rptq(int(4, narrow=false), 4 clusters)", "None"),
    ],
)
def test_what_the_reference_hides_is_an_option(options: str, norm: str, p: str) -> None:
    simulation = rptq(build("opt"), options)

    assert str(fixed(simulation, f"{LAYER}.self_attn.q_proj")) == norm
    assert str(fixed(simulation, f"{LAYER}.fc1")) == norm
    assert str(fixed(simulation, f"{LAYER}.fc2")) == "rptq(int(4, narrow=false), 4 clusters)"
    assert str(fixed(simulation, f"{LAYER}.self_attn:pv")) == p


def test_only_k_and_v() -> None:
    simulation = rptq(build("opt"), "4, head_clusters=2, only_kv=true", weights=None)

    texts = {site.site: site.input for site in simulation.audit(BATCHES[0]).sites if site.input}

    kept = "rptq(int(4, narrow=false), 8 clusters)"
    assert texts == {f"model.decoder.layers.{layer}.self_attn:matmul.{i}": kept for layer in (0, 1) for i in (0, 1)}
    assert fixed(simulation, f"{LAYER}.self_attn:qk") is None
    assert str(fixed(simulation, f"{LAYER}.self_attn:qk", "input2")) == kept
    assert {report.layer.rpartition(":")[2] for report in simulation.reports} == {"qk", "pv"}


@pytest.mark.usefixtures("both_ways")
def test_clusters_hurt_less_than_one_scale() -> None:
    changed = [report for report in rptq(build("opt")).reports if report.after is not None]

    assert all(report.after < report.before for report in changed)  # type: ignore[operator]
    assert changed[0].measure == "relative error of activations with one static scale, and with one for each cluster"
    assert {report.layer: report.note for report in changed}[f"{LAYER}.fc1"] == "4 clusters of 48 channels"


def test_post_norm_models_go_as_far_as_they_can_and_say_why() -> None:
    simulation = rptq(build("opt-350m"))

    told = notes(simulation)
    assert told[f"{LAYER}.final_layer_norm"].startswith("left in order: is added to another tensor in ")
    assert {report.layer.rpartition(".")[2] for report in simulation.reports if report.after is not None} == {
        "fc1",
        "self_attn:qk",
        "self_attn:pv",
        "final_layer_norm",  # the last one, which only project_out reads
    }
    assert fixed(simulation, f"{LAYER}.fc1") is None  # it keeps the recipe's


def test_rotary_embeddings_keep_q_and_k_as_they_are() -> None:
    simulation = rptq(build("llama"))

    assert notes(simulation)["model.layers.0.self_attn:qk"] == (
        "left in order: meets its own other channels in model.layers.0.self_attn"
    )
    assert fixed(simulation, "model.layers.0.self_attn:qk") is None


def test_the_next_transform_meets_reordered_weights_and_the_same_blocks() -> None:
    met: list[Any] = []

    class Look(qsim.Transform):
        name = "look"

        def apply(self, model: nn.Module, context: Context) -> None:
            met.extend([context.weights(), structure_of(context), [block.inputs for block in context.blocks()]])
            next(p for name, p in model.named_parameters() if name.endswith("bias")).add_(1)

    before = build("opt").state_dict()
    model = build("opt")
    qsim.simulate(
        model,
        {"weights": "int8", "activations": "int4", "skip": SKIP, "transforms": ["rptq(4)", Look()]},
        calibration=BATCHES,
    )
    weights, structure, inputs = met

    assert len(weights) == 12
    assert all(w.parameter.shape == before[w.name].shape for w in weights)
    assert not any(torch.equal(w.parameter, before[w.name]) for w in weights)
    assert len(structure.groups) == 4
    assert [len(of_block) for of_block in inputs] == [3, 3]


def test_static_scales_of_the_recipe_do_not_overwrite_its_own() -> None:
    simulation = rptq(build("opt-350m"), activations="tensor(int4, static=true)")

    assert str(fixed(simulation, f"{LAYER}.fc2")) == "rptq(int(4, narrow=false), 4 clusters)"
    assert str(fixed(simulation, f"{LAYER}.fc1")) == "tensor(int4, static=true)"


def test_gradients_pass_inside_the_range() -> None:
    held = fixed(rptq(build("opt"), "1"), f"{LAYER}.fc2")
    x = torch.tensor([[0.0] * 47 + [1e3]], requires_grad=True)

    held(x).sum().backward()

    assert x.grad.tolist() == [[1.0] * 47 + [0.0]]  # type: ignore[union-attr]


@pytest.mark.parametrize("head_clusters", [1, 100])
def test_there_are_no_more_clusters_than_channels(head_clusters: int) -> None:
    simulation = rptq(build("opt"), f"1000, head_clusters={head_clusters}")

    counted = {report.layer: report.note for report in simulation.reports if report.after is not None}
    assert counted[f"{LAYER}.self_attn:qk"] == f"{32 if head_clusters == 100 else 4} clusters of 32 channels"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            {"activations": "e4m3"},
            "rptq(4) finds zero points, which are for integers, and model.decoder.layers.0.self_attn.q_proj has "
            "activations token(e4m3); say int4, or a scheme of it",
        ),
        (
            {"activations": None},
            "rptq(4) changed nothing in this model: left in order: model.decoder.embed_tokens.weight is also read by "
            "embedding: it is tied",
        ),
    ],
)
def test_what_it_cannot_do_is_one_line(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(qsim.RecipeError) as error:
        rptq(build("opt"), "4", **recipe)

    assert str(error.value).partition("; `qsim structure`")[0] == message


def test_only_kv_without_attention_is_an_error() -> None:
    layers = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)
    with pytest.raises(qsim.RecipeError) as error:
        qsim.simulate(
            nn.Sequential(*layers).eval(),
            activations="int4",
            transforms=["rptq(only_kv=true)"],
            calibration=[torch.ones(2, 8)],
        )

    assert str(error.value).startswith("rptq(32, only_kv=true) changed nothing in this model: it found nothing to do;")


def test_what_no_calibration_sample_reaches_is_left_alone_by_name() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.sum() > 0 else self.b(x)  # type: ignore[no-any-return]

    with pytest.raises(qsim.RecipeError) as error:
        qsim.simulate(
            Branches().eval(),
            activations="int4",
            transforms=["rptq"],
            example=-torch.arange(8.0).view(1, 8),
            calibration=[torch.arange(8.0).view(1, 8)],
        )

    message = "rptq(32) changed nothing in this model: left alone: no calibration sample reaches it;"
    assert str(error.value).startswith(message)


def test_without_calibration_data_it_says_what_is_missing() -> None:
    with pytest.raises(qsim.DataError, match=r"^rptq\(32\) needs calibration data"):
        qsim.simulate(build("opt"), activations="int4", transforms=["rptq"], example=BATCHES[0])


def test_a_trained_model_end_to_end(tmp_path: Path) -> None:
    arguments = ["evaluate", "opt-tiny", "--precision", "w8a8", "--plugin", "rptq", "--set", "rptq.clusters=8"]
    outcome = CliRunner().invoke(
        main,
        [
            *arguments,
            "--calibration-samples",
            "2",
            "--limit",
            "1",
            "--json",
            str(tmp_path / "r"),
        ],
    )
    assert outcome.exit_code == 0, outcome.output
    result = json.loads((tmp_path / "r").read_text())

    assert result["recipe"]["transforms"] == ["rptq(8)"]
    assert result["simulated"]["perplexity"] == pytest.approx(result["baseline"]["perplexity"], rel=0.05)
    assert len([layer for layer in result["transforms"] if layer["after"] is not None]) == 20


@pytest.mark.parametrize(
    ("recipe", "p"),
    [
        ({"probabilities": "int6"}, "token(int6)"),
        ({"probabilities": "int4"}, "token(int4)"),
        ({"probabilities": "cast(unit_interval(5))"}, "cast(unit_interval(5))"),
        ({"probabilities": None}, "None"),
        ({"overrides": {f"{LAYER}.self_attn:pv": {"probabilities": "int3"}}}, "token(int3)"),
    ],
)
def test_probabilities_that_the_recipe_names_win(recipe: dict[str, Any], p: str) -> None:
    simulation = rptq(build("opt"), **recipe)

    (site,) = (site for site in simulation.sites.table.values() if f"{LAYER}.self_attn:pv" in site.names)
    assert "input" not in site.fixed
    assert str(site.quantizer("input")) == p
    other = "cast(unit_interval(8))" if "overrides" in recipe else "None"
    assert str(fixed(simulation, "model.decoder.layers.1.self_attn:pv")) == other


def test_each_operand_of_attention_has_the_bits_of_its_role() -> None:
    simulation = rptq(build("opt"), queries="int8", keys="int6", values=None)

    assert str(fixed(simulation, f"{LAYER}.self_attn:qk")) == "rptq(int(8, narrow=false), 8 clusters)"
    assert str(fixed(simulation, f"{LAYER}.self_attn:qk", "input2")) == "rptq(int(6, narrow=false), 8 clusters)"
    assert fixed(simulation, f"{LAYER}.self_attn:pv", "input2") is None
    assert str(fixed(simulation, f"{LAYER}.self_attn.out_proj")) == "rptq(int(4, narrow=false), 8 clusters)"


def test_a_role_with_another_format_is_named() -> None:
    with pytest.raises(qsim.RecipeError) as error:
        rptq(build("opt"), values="e4m3")

    assert str(error.value) == (
        f"rptq(4, head_clusters=2) finds zero points, which are for integers, and {LAYER}.self_attn:matmul.1 has values "
        f"token(e4m3); say int4, or a scheme of it"
    )


class TestUnitInterval(QuantizerSuite):
    text = ("cast(unit_interval)", "cast(unit_interval(4))")


class TestRptq(TransformSuite):
    text = ("rptq(6)", "rptq(3, only_kv=true)")
