"""SmoothQuant against its formula, and for what it promises: the same function, flatter activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qsim_core as qsim
from qsim_core.testing import TransformSuite
from qsim_core.testing import both_ways as both_ways

SIZES = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def model(family: str, **options: Any) -> Any:
    """A tiny seeded model whose norms have two outlier channels."""
    import transformers

    sizes = {
        "OPT": {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
        },
        "Llama": LLAMA,
        "Mixtral": {**LLAMA, "num_local_experts": 4},
    }[family]
    config = getattr(transformers, f"{family}Config")(**SIZES | sizes | options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = getattr(transformers, f"{family}ForCausalLM")._from_config(config).eval()
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.dim() < 2:
                    parameter.add_(0.2 * torch.randn_like(parameter))
                if "norm" in name:
                    parameter[[3, 17]] *= 30
    return made


BATCHES = [
    {"input_ids": torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(i)), "use_cache": False}
    for i in range(3)
]


def logits(made: Any) -> Tensor:
    with torch.no_grad():
        return made(**BATCHES[0]).logits  # type: ignore[no-any-return]


def smooth(made: Any, text: str = "smoothquant", **more: Any) -> qsim.Simulation:
    """Only smoothed: the quantizers are so fine that they change nothing that matters."""
    recipe = {"weights": "cast(float(8, 10, specials=ieee))", "activations": "cast(float(8, 10, specials=ieee))"} | more
    return qsim.simulate(made, recipe | {"transforms": [text]}, calibration=BATCHES)


@pytest.mark.parametrize(
    "text", ["smoothquant", "smoothquant(0.9)", "smoothquant(preset=llmc)", "smoothquant(1, preset=modelopt)"]
)
@pytest.mark.parametrize(
    ("family", "options"),
    [("OPT", {}), ("OPT", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}), ("Llama", {}), ("Mixtral", {})],
)
def test_the_function_stays(family: str, options: dict[str, Any], text: str) -> None:
    made = model(family, **options)
    before = logits(made)

    simulation = smooth(made, text)
    simulation.sites.quantizing = False

    assert (logits(made) - before).abs().max() <= 1e-4 * before.abs().max()
    assert len([r for r in simulation.reports if r.after is not None]) == (
        1 if options else 4 if family == "OPT" else 5
    )


def test_factors_are_the_papers() -> None:
    """Equation 4 for q, k and v of the first layer, by hand."""
    made = model("OPT")
    layer = made.model.decoder.layers[0]
    inputs = []
    handle = layer.self_attn_layer_norm.register_forward_hook(
        lambda module, args, output: inputs.append(output.detach())
    )
    with torch.no_grad():
        for batch in BATCHES:
            made(**batch)
    handle.remove()
    largest = torch.cat([x.flatten(0, -2) for x in inputs]).abs().amax(0).double()
    weights = torch.cat([getattr(layer.self_attn, f"{p}_proj").weight for p in "qkv"]).abs().amax(0).double()
    expected = largest.clamp(min=1e-5) ** 0.5 / weights.clamp(min=1e-5) ** 0.5
    gain = layer.self_attn_layer_norm.weight.detach().clone()

    smooth(made)

    assert torch.allclose(gain.double() / layer.self_attn_layer_norm.weight.double(), expected, rtol=1e-5)


def test_outliers_are_gone() -> None:
    simulation = smooth(model("OPT"))

    changed = [report for report in simulation.reports if report.after is not None]
    assert all(report.before > 15 and report.after < report.before / 3 for report in changed)  # type: ignore[operator]
    assert {report.measure for report in changed} == {"largest channel over the median one"}


@pytest.mark.usefixtures("both_ways")
def test_quantizing_hurts_less_afterwards() -> None:
    exact = logits(model("OPT"))

    def error(*transforms: str) -> float:
        made = model("OPT")
        skip = ["*out_proj", "*fc2", "*:qk", "*:pv", "lm_head"]  # what no norm feeds
        recipe = {"weights": "int8", "activations": "token(int4)", "skip": skip, "transforms": transforms}
        qsim.simulate(made, recipe, calibration=BATCHES)
        return float((logits(made) - exact).norm() / exact.norm())

    assert error("smoothquant(0.5)") < 0.7 * error()


def test_what_cannot_be_folded_is_reported_with_the_reason() -> None:
    simulation = smooth(model("OPT", do_layer_norm_before=False, word_embed_proj_dim=16))

    notes = {report.layer: report.note for report in simulation.reports if report.after is None}
    assert len(notes) == 3
    assert all("left alone: is added to another tensor in " in note for note in notes.values())


def test_a_model_in_which_nothing_can_be_folded_is_an_error() -> None:
    with pytest.raises(
        qsim.RecipeError,
        match=r"^smoothquant\(0.5\) changed nothing in this model: it found nothing to do; `qsim structure` shows what",
    ):
        qsim.simulate(
            torch.nn.Sequential(torch.nn.Linear(4, 4)),
            weights="int8",
            transforms=["smoothquant"],
            calibration=[torch.ones(1, 4)],
        )


def test_norms_that_no_quantizer_concerns_stay() -> None:
    made = model("Llama", tie_word_embeddings=False)
    before = made.model.norm.weight.detach().clone()

    smooth(made, skip=("lm_head",))

    assert torch.equal(made.model.norm.weight, before)


def test_without_calibration_data_it_says_what_is_missing() -> None:
    with pytest.raises(qsim.DataError, match=r"^smoothquant\(0.5\) needs calibration data"):
        qsim.simulate(model("OPT"), weights="int8", transforms=["smoothquant"], example=BATCHES[0])


class TestSmoothquant(TransformSuite):
    text = ("smoothquant", "smoothquant(0.8)")
