"""Record the numbers of today: run small recipes, and write a hash and statistics of each output as JSON.

    python tests/golden/record.py --output FILE          write the record of the installed qsim
    python tests/golden/record.py --compare FILE         compare with a record; exit with 1 if a number differs
    python tests/golden/record.py --only 'schemes/*'     run only the recipes that match a pattern

A recipe is a function that returns its outputs: tensors, which are hashed, and figures, which are kept to the last
digit. The script uses public names of qsim alone, so that it runs on code before and after a refactoring. `spelled` and
`analog_device` are the two places that know of names which differ between versions.

Inputs are drawn with generators of their own and elementwise arithmetic, so that they are the same on every processor.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import hashlib
import json
import math
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qsim_core as qsim

Outputs = dict[str, Any]
"""Outputs by label: a tensor or several, which are hashed together, or a figure."""
GOLDEN = Path(__file__).with_name("golden.json")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Entry:
    """One recipe of the record; `in_ci` says that the test suite runs it, too."""

    name: str
    run: Callable[[], Outputs]
    in_ci: bool = False
    expected_to_change: str = ""
    """The reason why a later version may give other numbers; empty: no number may change."""


ENTRIES: dict[str, Entry] = {}


def golden(name: str, *, ci: bool = False, expected_to_change: str = "") -> Callable[[Callable[[], Outputs]], Any]:
    """Put a function into the record under a name."""

    def add(run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        ENTRIES[name] = Entry(name, run, ci, expected_to_change)
        return run

    return add


# Names that differ between versions


def spelled(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe whose key `arithmetic` has the name that the installed version takes: `arithmetic`, or before `path`."""
    if "arithmetic" not in recipe or "arithmetic" in qsim.Recipe.model_fields:
        return dict(recipe)
    return {("path" if key == "arithmetic" else key): value for key, value in recipe.items()}


def analog_device(
    element: str, n: int, adc: int, gain: float = 1.0, noise: float = 0.0, seed: int = 0
) -> dict[str, Any]:
    """A recipe of ABFP whose products are those of an analog device.

    Before the refactoring the device is a part of the scheme: `abfp(int8, n=16, adc=8, gain=4.0)`. Later it is the
    recipe's arithmetic: `analog(adc=8, gain=4.0, noise=0.5, seed=0)` beside the scheme `abfp(int8, n=16)`. Change the
    second text here if the options of `analog` get other names.
    """
    device = f"adc={adc}, gain={gain}, noise={noise}, seed={seed}"
    if "arithmetic" in qsim.Recipe.model_fields:
        scheme = f"abfp({element}, n={n})"
        return {"weights": scheme, "activations": scheme, "arithmetic": f"analog({device})"}
    scheme = f"abfp({element}, n={n}, {device})"
    return {"weights": scheme, "activations": scheme}


def command(*arguments: object) -> str:
    """The standard output of `qsim` with these arguments. Raises `RuntimeError` if it fails."""
    from click.testing import CliRunner

    (script,) = metadata.entry_points(group="console_scripts", name="qsim")
    outcome = CliRunner().invoke(script.load(), [str(argument) for argument in arguments])
    if outcome.exit_code:
        raise RuntimeError(f"qsim {' '.join(map(str, arguments))}: {outcome.output}") from outcome.exception
    return outcome.stdout


# Inputs and models


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Bell-shaped float32 noise of standard deviation 1: the sum of four uniform numbers."""
    drawn = torch.rand(4, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((drawn[0] + drawn[1] + drawn[2] + drawn[3] - 2) * 1.75).float()


def heavy(*shape: int, seed: int = 0) -> Tensor:
    """Noise with outliers, whose rows have magnitudes from 2^-4 to 2^4."""
    x = noise(*shape, seed=seed)
    rows = torch.pow(2.0, torch.arange(shape[-2], dtype=torch.float64) % 9 - 4).float().unsqueeze(-1)
    return x * x * x * rows


def specials() -> Tensor:
    """Rows of zeros, of ±0 and subnormal numbers, of huge numbers, with Inf, with NaN, of ties, and of noise."""
    x = heavy(12, 75, seed=7)
    x[0] = 0
    x[1] = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 6e-8, -3e-5, 2.0**-126, 1e-10, 1.0, -1.0] * 8)[:75]
    x[2] = x[2] * 2.0**100
    x[3, 5], x[3, 40] = torch.inf, -torch.inf
    x[4, 70] = torch.nan
    x[5] = torch.arange(75) / 4 - 9
    x[6] = torch.arange(75) * 3.0 - 100
    x[7, :64] = 0
    return x


def tokens(seed: int = 1, length: int = 12) -> Tensor:
    """Two sequences of tokens."""
    return torch.randint(5, 90, (2, length), generator=torch.Generator().manual_seed(seed))


def filled(model: Any, seed: int = 0) -> Any:
    """The model in eval mode, every parameter and every running mean and variance drawn anew."""
    with torch.no_grad():
        for place, module in enumerate(model.modules()):
            kind = type(module).__name__
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                drawn = noise(*tensor.shape, seed=1000 * seed + 17 * place + len(name)) if tensor.dim() else None
                if name in ("running_mean", "running_var"):
                    tensor.copy_(0.2 * drawn if name == "running_mean" else 1 + 0.1 * drawn * drawn)
                elif not isinstance(tensor, nn.Parameter) or drawn is None:
                    continue
                elif tensor.dim() > 1:
                    fan = 1 if isinstance(module, nn.Embedding) else tensor[0].numel()
                    tensor.copy_(drawn / math.sqrt(fan))
                else:
                    tensor.copy_(0.1 * drawn + ("Norm" in kind and name == "weight"))
    return model.eval()


def causal_model(family: str, attention: str = "eager", **options: Any) -> Any:
    """A tiny language model of transformers."""
    import transformers

    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    gpt = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    grouped = {**sizes, "intermediate_size": 48, "num_key_value_heads": 2}
    made: dict[str, tuple[str, dict[str, Any]]] = {
        "opt": ("OPT", {**sizes, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
        "llama": ("Llama", grouped),
        "gpt2": ("GPT2", {**gpt, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}),
        "codegen": ("CodeGen", {**gpt, "rotary_dim": 4}),
        "mixtral": ("Mixtral", {**grouped, "num_local_experts": 4}),
    }
    name, values = made[family]
    head = "LMHeadModel" if family == "gpt2" else "ForCausalLM"
    config = getattr(transformers, f"{name}Config")(**values | options)
    return filled(getattr(transformers, name + head)._from_config(config, attn_implementation=attention))


def batches(many: int = 4) -> list[dict[str, Any]]:
    """Calibration data of a language model; the first is its example."""
    return [{"input_ids": tokens(seed), "use_cache": False} for seed in range(many)]


def mlp() -> nn.Sequential:
    """Three linears with activation functions and a norm between them."""
    made: nn.Sequential = filled(
        nn.Sequential(nn.Linear(48, 40), nn.ReLU(), nn.LayerNorm(40), nn.Linear(40, 24), nn.GELU(), nn.Linear(24, 8))
    )
    return made


# Running a recipe


def answered(model: nn.Module, example: Any) -> Any:
    """The model's output for an example."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a model's answer, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for inner in value.values() for tensor in tensors_in(inner)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [tensor for inner in value for tensor in tensors_in(inner)]
    return []


def figures_of(simulation: Any) -> Outputs:
    """The reports of transforms about each layer, and the number of reports."""
    numbers = [
        float(value) for report in simulation.reports for value in (report.before, report.after) if value is not None
    ]
    return {"reports": torch.tensor(numbers, dtype=torch.float64)} if numbers else {}


def simulated(
    model: nn.Module, example: Any, recipe: Mapping[str, Any], *, calls: int = 1, audit: bool = False, **options: Any
) -> Outputs:
    """A model's answers under a recipe, with the reports of its transforms; the model is restored afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qsim.CalibrationWarning)
        simulation = qsim.simulate(model, spelled(recipe), example=example, **options)
    with simulation, torch.no_grad():
        found: Outputs = {"answer": [tensor for _ in range(calls) for tensor in tensors_in(answered(model, example))]}
        found |= figures_of(simulation)
        if audit:
            found |= audited(simulation)
    return found


def audited(simulation: Any) -> Outputs:
    """The audit's counts, bits, and the error that was measured at each site."""
    audit = simulation.audit()
    roles = ("input", "output", "weight")  # newer audits have attention's roles besides
    measured = [site.measured[role].sqnr_db for site in audit.sites for role in roles if role in site.measured]
    return {
        "covered": audit.covered,
        "found": audit.found,
        "bits per weight": audit.bits_per_weight or 0.0,
        "bits per activation": audit.bits_per_activation or 0.0,
        "sqnr": torch.tensor([value for value in measured if value is not None], dtype=torch.float64),
    }


def cases(**recipes: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Recipes by label."""
    return recipes


def labelled(label: str, outputs: Outputs) -> Outputs:
    """Outputs whose labels begin with another one."""
    return {f"{label}: {key}": value for key, value in outputs.items()}


# Number formats

VARIANTS = {
    "int": [f"int{bits}" for bits in range(2, 17)],
    "uint": [f"uint{bits}" for bits in range(2, 17)],
    "int options": [
        "int(8, narrow=false)", "int(4, narrow=false, convention=gptq)", "int8(fraction=6)", "int(4, convention=power_of_two)",
        "int(6, signed=false, fraction=3)",
    ],
    "float": [
        "bf16", "fp16", "tf32", "e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz", "e4m3b11fnuz", "e3m4", "e3m2", "e2m3", "e2m1",
        "e1m2", "e3m0", "e8m0",
    ],
    "float options": [
        "e4m3(saturate=false)", "e5m2(saturate=true)", "e4m3(subnormals=false)", "e2m1(signed=false)", "float(5, 2, bias=11)",
        "float(8, 10, specials=ieee, subnormals=false)", "float(3, 15)", "float(4, 3, specials=p3109, signed=false)",
    ],
    "p3109": [f"binary8p{p}{suffix}" for p in range(1, 8) for suffix in ("", "f")],
    "codebook": ["nf4", "codebook([-1, 0, 1])", "codebook([-3, -0.7, 0, 0.2, 0.9, 4])"],
    "exotic": ["log2", "log2(8)", "log2(5, signed=false)", "posit", "posit(16)", "posit(8, es=0)", "posit(6, es=1)"],
    "scales": ["e5m3", "e6m2"],
    "p3109 by name": [f"p3109(binary{name})" for name in ("3p1se", "4p2sf", "5p2ue", "6p3se", "7p4uf", "10p5se", "15p8sf")],
}  # fmt: skip


def formats_alone(texts: Iterable[str]) -> Outputs:
    """Each format on noise and specials, in three dtypes."""
    inputs = [x.to(dtype) for x in (specials(), heavy(9, 64)) for dtype in FLOATS]
    return {text: [qsim.parse(text)(x) for x in inputs] for text in texts}


for _kind, _texts in VARIANTS.items():
    golden(f"formats/{_kind}", ci=True)(functools.partial(formats_alone, _texts))


@golden("formats/rounding", ci=True)
def formats_rounding() -> Outputs:
    """Every rounding of formats that round in different ways."""
    texts = ["int4", "int8(fraction=6)", "e4m3", "e2m1", "e8m0", "bf16", "e3m0", "nf4", "log2", "uint8"]
    modes = ["away", "zero", "stochastic", "stochastic, seed=7"]
    written = [f"{name})" if name.endswith(")") else name for name in texts]
    merged = [
        text[:-2] + f", rounding={mode})" if text.endswith("))") else f"{text}(rounding={mode})"
        for text in written
        for mode in modes
    ]
    return formats_alone(merged)


@golden("formats/codes", ci=True)
def formats_codes() -> Outputs:
    """Codes as they would be stored, packed bits, and the values that codes stand for."""
    found: Outputs = {}
    for text in ("int4", "uint5", "e4m3", "e5m2", "e2m1", "binary8p3", "nf4", "log2", "posit", "e8m0", "int(16)"):
        quantizer, x = qsim.parse(text), heavy(7, 30)
        encoded = quantizer.encode(x)
        decoded = quantizer.decode(encoded)
        back = qsim.unpack(qsim.pack(encoded.codes, encoded.width), encoded.width, x.shape)
        found[text] = [encoded.codes, decoded, encoded.packed(), back]
        found[f"{text} bits"] = float(encoded.bits)
    return found


# Schemes

SCHEMES = {
    "plain": [
        "tensor(int4)", "channel(int4)", "token(int8)", "block(int4, 16)", "block(e2m1, 7)", "cast(e4m3)", "cast(bf16)",
        "channel(e4m3)", "token(nf4)", "tensor(posit)", "block(log2, 32)", "channel(uint4)", "block(int3, [4, 16])",
        "block(e4m3, [128, 128])", "channel(int(4, narrow=false, convention=gptq))", "channel(int(4, convention=power_of_two))",
        "scaled(int8, tensor)", "scaled(int4, [2, 9])",
    ],
    "abfp": [
        "abfp(int4)", "abfp(int8, n=128)", "abfp(e4m3, n=16)", "abfp(e2m1, n=32, scale=none)", "abfp(int4, scale=e8m0)",
        "abfp(int4, n=16, scale=scaled(int8, channel))", "abfp(nf4, n=24)", "abfp(int4, n=16, scale=e4m3)",
    ],
    "mx": [
        "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "mxint8", *(f"msfp{bits}" for bits in range(11, 17)),
        "nvfp4", "deepseek_weights", "deepseek_activations", "mx(int4, n=8)", "mx(e2m1, n=5)",
    ],
    "nested": [
        "scaled(e2m1, 16, scale=scaled(e4m3, tensor))", "scaled(int4, 64, scale=bf16)", "channel(int4, scale=fp16)",
        "scaled(int4, 8, scale=scaled(int8, 4))", "scaled(int4, 16, scale=scaled(e4m3, channel, scale=bf16))",
        "block(int4, 16, scale=abfp(int8, n=4))", "scaled(e2m1, 16, scale=e5m2)",
    ],
    "rules": [
        f"mx({element}, rule={rule})" for element in ("e2m1", "int4", "e4m3") for rule in ("floor", "ceil", "even", "rceil", "divide")
    ] + ["channel(int4, rule=ceil)", "tensor(e4m3, rule=even)", "abfp(int4, rule=floor, scale=none)"],
    "zero points": [
        "tensor(int8, symmetric=false)", "channel(int4, symmetric=false)", "token(uint8, symmetric=false)",
        "block(int3, 16, symmetric=false)", "abfp(int4, n=32, symmetric=false)", "block(int4, [4, 16], symmetric=false)",
        "channel(int4, symmetric=false, scale=fp16)", "token(int8, symmetric=false, range=percentile(99))",
    ],
    "ranges": [
        f"{scheme}, range={calibrator})"
        for scheme in ("tensor(int4", "channel(e2m1", "block(int4, 32", "token(int4, symmetric=false")
        for calibrator in ("minmax", "absmax", "percentile(90)", "percentile", "mse", "mse(norm=2, steps=20)", "moving_average", "max")
    ] + ["tensor(int8, range=entropy)", "channel(int4, range=entropy(bits=4))", "mx(e2m1, range=mse(steps=10))"],
    "stochastic": [
        "channel(int4(rounding=stochastic))", "token(e2m1(rounding=stochastic, seed=3))", "abfp(int4(rounding=stochastic), n=16)",
        "mx(e2m1(rounding=stochastic))", "tensor(int8(rounding=stochastic), symmetric=false)", "cast(bf16(rounding=stochastic))",
        "scaled(int4(rounding=away), 16, scale=bf16(rounding=stochastic))", "block(int4(rounding=zero), 16)",
    ],
    "chosen by block": [
        "nvfp4_adaptive", "if4", "razer", "razer_weights", "hif4", "mx4", "mx6", "mx9", "mxfp4_mr_gptq", "nvfp4(scale=e5m3)",
    ],
}  # fmt: skip


def schemes_alone(texts: Iterable[str]) -> Outputs:
    """Each scheme on matrices, on three axes, on one row, on short last blocks, and in four dtypes."""
    inputs = [
        heavy(6, 200),
        noise(2, 3, 72, seed=1).bfloat16(),
        heavy(5, 40, seed=2).half(),
        heavy(4, 33, seed=3).double(),
    ]
    return {text: [qsim.parse(text)(x) for x in (*inputs, noise(1, 16))] for text in texts}


for _kind, _texts in SCHEMES.items():
    golden(f"schemes/{_kind}", ci=_kind != "ranges")(functools.partial(schemes_alone, _texts))


@golden("schemes/specials", ci=True)
def schemes_specials() -> Outputs:
    """Zeros, subnormal and huge numbers, Inf and NaN, under scales of every granularity."""
    texts = [
        "tensor(int4)", "channel(int4)", "channel(e4m3)", "block(int4, 16)", "abfp(int4)", "mxfp4", "mxfp8_e5m2", "nvfp4",
        "token(int8, symmetric=false)", "block(int4, [4, 16])", "channel(int4, range=percentile(95))", "cast(e5m2)",
    ]  # fmt: skip
    return {text: [qsim.parse(text)(specials().to(dtype)) for dtype in FLOATS] for text in texts}


@golden("schemes/codes", ci=True)
def schemes_codes() -> Outputs:
    """Codes, scales and zero points as they would be stored, and bits per element."""
    found: Outputs = {}
    texts = [
        "channel(int4)", "abfp(int4, n=16)", "mxfp4", "nvfp4", "token(int8, symmetric=false)", "block(e4m3, [2, 8])",
        "scaled(int4, 8, scale=scaled(int8, 4))", "tensor(nf4)", "abfp(int4, n=16, symmetric=false)",
    ]  # fmt: skip
    for text in texts:
        quantizer, x = qsim.parse(text), heavy(6, 40)
        encoded = quantizer.encode(x)
        level, stored = encoded, []
        while isinstance(level, qsim.Encoded):
            stored += [level.codes, level.packed(), *([] if level.zero_points is None else [level.zero_points])]
            level = level.scales
        found[text] = [*stored, *tensors_in(level), quantizer.decode(encoded)]
        found[f"{text} bits"] = [float(encoded.bits), float(quantizer.bits_per_element(x.shape))]
    return found


@golden("schemes/layouts", ci=True)
def schemes_layouts() -> Outputs:
    """Inputs that do not lie in memory row by row, an empty one, and one of a single axis."""
    x = heavy(2, 12, 40)
    inputs = [
        x.transpose(1, 2),
        x[:, ::2, ::3],
        x.expand(2, 2, 12, 40),
        x[..., 1:],
        x.permute(2, 0, 1),
        x[:, :0],
        x[0, 0],
    ]
    texts = ["channel(int4)", "abfp(int4, n=8)", "mxfp4", "tensor(e4m3)", "nvfp4", "token(int8, symmetric=false)"]
    return {text: [qsim.parse(text)(view) for view in inputs] for text in texts}


# Products under each arithmetic


class Products(nn.Module):
    """Every function that multiplies tensors; with `matrices` only those that multiply two matrices."""

    def __init__(self, matrices: bool = False) -> None:
        super().__init__()
        self.matrices = matrices
        self.linear, self.weight = nn.Linear(40, 24), nn.Parameter(noise(24, 16))
        self.bias, self.forms = nn.Parameter(noise(16, seed=5)), nn.Parameter(noise(6, 16, 16, seed=6))
        filled(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.linear(x)
        y = torch.addmm(self.bias, y.flatten(0, 1), self.weight, beta=0.5, alpha=2).unflatten(0, x.shape[:2])
        scores = torch.baddbmm(y.mean((1, 2), keepdim=True), y, y.transpose(1, 2), beta=2.0, alpha=0.5)
        attended = scores.softmax(-1) @ y
        if self.matrices:
            return torch.bmm(attended, y.transpose(1, 2)), attended @ y[0, 0], torch.mm(attended[0], y[1].T)
        mixed = torch.einsum("bij,bkj->bik", attended, y)
        outer = torch.einsum("bij,hjk,bik->bh", attended, self.forms, y)
        last = torch.mm(attended[0], y[1].T), torch.mv(attended[0], y[0, 0]), torch.dot(y[0, 0], y[1, 1])
        return torch.bmm(attended, y.transpose(1, 2)), mixed, outer, *last, torch.tensordot(y, self.weight, ([2], [1]))


ARITHMETICS = {
    "auto": cases(
        int8={"weights": "int8", "activations": "int8"}, w4a8={"weights": "int4", "activations": "int8", "outputs": "bf16"},
        mx={"weights": "mxfp4", "activations": "mxfp8_e4m3", "outputs": "bf16"}, abfp={"weights": "abfp(int4)", "activations": "abfp(int8)"},
        nvfp4={"weights": "nvfp4", "activations": "nvfp4", "outputs": "bf16"},
    ),
    "float32": cases(
        int8={"weights": "int8", "activations": "int8"}, mx={"weights": "mxfp4", "activations": "mxfp4", "outputs": "bf16"},
        zero={"weights": "channel(int4, symmetric=false)", "activations": "token(int8, symmetric=false)"},
    ),
    "int8": cases(
        int8={"weights": "int8", "activations": "int8"}, w4={"weights": "channel(int4, range=mse(steps=10))", "activations": "tensor(int8)"},
        zero={"weights": "int4", "activations": "token(int8, symmetric=false)"},
        outputs={"weights": "int8", "activations": "token(uint8, symmetric=false)", "outputs": "token(int8)"},
    ),
    "bf16": cases(
        mx={"weights": "mxfp4", "activations": "mxfp8_e4m3", "outputs": "bf16"}, int4={"weights": "int4", "activations": "int4", "outputs": "bf16"},
        abfp={"weights": "abfp(int4)", "activations": "abfp(e4m3)", "outputs": "bf16"},
    ),
    "blockwise": cases(abfp={"weights": "abfp(int4)", "activations": "abfp(int4)"}, mx={"weights": "mxfp4", "activations": "mxfp4"}),
    "tf32": cases(e4m3={"weights": "channel(e4m3)", "activations": "token(e4m3)"}),
    "fp8": cases(e4m3={"weights": "channel(e4m3)", "activations": "token(e4m3)"}),
}  # fmt: skip


def under_arithmetic(name: str) -> Outputs:
    """Linears, all products of matrices, and convolutions, computed in one arithmetic.

    A CPU has no `blockwise`, `tf32` and `fp8`: it computes in float32 then.
    """
    found: Outputs = {}
    for label, recipe in ARITHMETICS[name].items():
        named = {**recipe, "arithmetic": name}
        found |= labelled(f"{label} linears", simulated(mlp(), heavy(20, 48), named))
        found |= labelled(f"{label} products", simulated(Products(), noise(3, 5, 40), named))
        found |= labelled(f"{label} convolutions", simulated(convolutions(), noise(2, 6, 12, 10), named))
        found |= labelled(f"{label} opt", simulated(causal_model("opt", "sdpa"), batches()[0], named))
    return found


for _kind in ARITHMETICS:
    golden(f"arithmetic/{_kind}", ci=_kind in ("float32", "int8"))(functools.partial(under_arithmetic, _kind))

DEVICES = {
    "plain": analog_device("int4", 16, 8), "gain": analog_device("int8", 8, 6, gain=4.0),
    "noise": analog_device("int8", 16, 8, gain=2.0, noise=0.5), "seed": analog_device("int4", 32, 8, noise=1.0, seed=5),
    "float": analog_device("e4m3", 16, 10),
}  # fmt: skip


@golden("arithmetic/analog linears", ci=True)
def analog_linears() -> Outputs:
    """An analog device's linears, two calls each, so that noise goes on."""
    found: Outputs = {}
    for label, recipe in DEVICES.items():
        found |= labelled(label, simulated(mlp(), heavy(12, 48), recipe, calls=2))
        found |= labelled(f"{label} with outputs", simulated(mlp(), heavy(12, 48), {**recipe, "outputs": "bf16"}))
    return found


@golden("arithmetic/analog products and convolutions")
def analog_products() -> Outputs:
    """An analog device's products of matrices, convolutions and attention."""
    found: Outputs = {}
    for label, recipe in DEVICES.items():
        found |= labelled(f"{label} products", simulated(Products(matrices=True), noise(3, 5, 40), recipe))
        found |= labelled(f"{label} convolutions", simulated(flat_convolutions(), noise(2, 6, 12, 10), recipe))
        found |= labelled(f"{label} opt", simulated(causal_model("opt", "sdpa"), batches()[0], recipe))
        found |= labelled(f"{label} llama", simulated(causal_model("llama"), batches()[0], recipe))
    return found


# Convolutions


def flat_convolutions() -> nn.Sequential:
    """Convolutions of two axes with strides, dilation and groups."""
    made: nn.Sequential = filled(
        nn.Sequential(
            nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, (3, 2), dilation=(2, 1), groups=2, bias=False),
            nn.ReLU(), nn.Conv2d(8, 12, (5, 3), padding="same", dilation=(1, 2)), nn.ReLU(), nn.Conv2d(12, 12, 1, groups=12),
        )
    )  # fmt: skip
    return made


def convolutions() -> nn.Sequential:
    """A convolutional network with batch norm, group norm and reflected padding."""
    made: nn.Sequential = filled(
        nn.Sequential(
            nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, padding_mode="reflect"), nn.GroupNorm(4, 16), nn.SiLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1), nn.Flatten(), nn.Linear(240, 10),
        )
    )  # fmt: skip
    return made


class OtherConvolutions(nn.Module):
    """Convolutions of one and three axes, and transposed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(6, 9, 5, stride=3, padding=2, groups=3)
        self.cube = nn.Conv3d(2, 4, 3, padding=1)
        self.back = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.line_back = nn.ConvTranspose1d(6, 4, 4, stride=2)
        filled(self)

    def forward(self, line: Tensor, plane: Tensor, cube: Tensor) -> tuple[Tensor, ...]:
        return self.line(line), self.cube(cube), self.back(plane), self.line_back(line)


SITES = cases(
    channel={"weights": "int4", "activations": "int8", "outputs": "bf16"},
    abfp={"weights": "abfp(int4, n=16)", "activations": "abfp(e4m3, n=16)"},
    zero={"weights": "channel(int4, symmetric=false)", "activations": "tensor(int8, symmetric=false)", "outputs": "tensor(int8)"},
    nvfp4={"weights": "nvfp4", "activations": "nvfp4"},
    tiles={"weights": "block(e4m3, [8, 8])", "activations": "block(e4m3, 8)", "outputs": "e5m2"},
)  # fmt: skip


def at_every_site(make: Callable[[], nn.Module], example: Any, **options: Any) -> Outputs:
    """A model under each recipe of `SITES`."""
    found: Outputs = {}
    for label, recipe in SITES.items():
        found |= labelled(label, simulated(make(), example, recipe, **options))
    return found


@golden("sites/convolutions", ci=True)
def site_convolutions() -> Outputs:
    """Convolutions of every kind with weights, inputs and outputs rounded."""
    others = (noise(2, 6, 20), noise(2, 6, 7, 5), noise(1, 2, 5, 6, 4))
    return {
        **labelled("net", at_every_site(convolutions, noise(2, 6, 12, 10), audit=True)),
        **labelled("flat", at_every_site(flat_convolutions, noise(2, 6, 12, 10))),
        **labelled("others", at_every_site(OtherConvolutions, others)),
    }


@golden("sites/products", ci=True)
def site_products() -> Outputs:
    """addmm, baddbmm, bmm, mm, mv, dot, einsum of two and three operands, tensordot."""
    return at_every_site(Products, noise(3, 5, 40), audit=True)


# Attention


class Fused(nn.Module):
    """`scaled_dot_product_attention` under one kind of mask; with `groups` k and v have fewer heads."""

    def __init__(self, mask: str, groups: int = 1) -> None:
        super().__init__()
        self.mask, self.groups = mask, groups
        self.q, self.kv, self.out = nn.Linear(32, 32), nn.Linear(32, 64 // groups), nn.Linear(32, 12)
        filled(self)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, 4, 8).transpose(1, 2)
        k, v = (t.view(batch, length, -1, 8).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        grouped: dict[str, Any] = {"enable_gqa": True} if self.groups > 1 else {}
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        masks: dict[str, dict[str, Any]] = {
            "none": {}, "causal": {"is_causal": True}, "bool": {"attn_mask": causal}, "scale": {"scale": 0.2},
            "float": {"attn_mask": noise(batch, 4, length, length, seed=9).masked_fill(~causal, -torch.inf)},
            "padding": {"attn_mask": (torch.arange(length) < torch.tensor([[length], [length - 3]]))[:, None, None, :]},
        }  # fmt: skip
        y = F.scaled_dot_product_attention(q, k, v, **masks[self.mask], **grouped)
        made: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return made


ATTENTION = cases(
    int8={"weights": "int4", "activations": "int8", "outputs": "bf16"},
    abfp={"weights": "abfp(int4, n=16)", "activations": "abfp(int4, n=8)"},
    head={"activations": "token(int4)", "value_axis": "head"},
    blocks={"activations": "block(e4m3, 4)", "outputs": "e4m3", "value_axis": "head"},
    overrides={"activations": "int8", "overrides": {"*:pv": {"activations": "tensor(int4)"}, "*:qk": {"outputs": "e4m3"}, "out": {"weights": "int3"}}},
)  # fmt: skip


@golden("attention/fused", ci=True)
def fused_attention() -> Outputs:
    """torch's fused attention under every mask, with grouped queries too."""
    found: Outputs = {}
    for label, recipe in ATTENTION.items():
        for mask in ("none", "causal", "bool", "float", "padding", "scale"):
            found |= labelled(f"{label}, {mask}", simulated(Fused(mask), noise(2, 9, 32), recipe))
        found |= labelled(f"{label}, grouped", simulated(Fused("causal", 2), noise(2, 9, 32), recipe))
    return found


class Multihead(nn.Module):
    """`nn.MultiheadAttention` with masks, then an encoder layer of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(32, 4, batch_first=True, add_bias_kv=True)
        self.layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
        filled(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        length = x.shape[1]
        padding = torch.arange(length) >= torch.tensor([[length], [length - 3]])
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)
        y, weights = self.attend(x, x, x, key_padding_mask=padding)
        z, _ = self.attend(x, y, x, attn_mask=causal, need_weights=False)
        return y, weights, self.layer(z, src_mask=causal, src_key_padding_mask=padding)


@golden("attention/multihead")
def multihead_attention() -> Outputs:
    """torch's own modules of attention."""
    found: Outputs = {}
    for label in ("int8", "abfp", "head", "blocks"):
        found |= labelled(label, simulated(Multihead(), noise(2, 9, 32), ATTENTION[label]))
    return found


def family(name: str, attention: str) -> Outputs:
    """A tiny language model under each recipe, on whole sequences and on padded ones."""
    ids = tokens(length=14)
    padding = (torch.arange(14) >= torch.tensor([[0], [4]])).long()
    examples = {
        "whole": {"input_ids": ids, "use_cache": False},
        "padded": {"input_ids": ids, "attention_mask": padding, "use_cache": False},
    }
    found: Outputs = {}
    for label in ("int8", "abfp", "head", "blocks"):
        for kind, example in examples.items():
            outputs = simulated(causal_model(name, attention), example, ATTENTION[label], audit=kind == "whole")
            found |= labelled(f"{label}, {kind}", outputs)
    return found


for _kind in ("opt", "llama", "gpt2", "codegen", "mixtral"):
    for _attention in ("eager", "sdpa") if _kind != "codegen" else ("eager",):
        golden(f"families/{_kind} {_attention}", ci=(_kind, _attention) == ("llama", "eager"))(
            functools.partial(family, _kind, _attention)
        )


@golden("families/half precision")
def half_precision() -> Outputs:
    """A model in bfloat16 and float16, with grouped queries."""
    found: Outputs = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for label in ("int8", "abfp", "head"):
            model = causal_model("llama", "sdpa").to(dtype)
            found |= labelled(f"{label} {dtype}", simulated(model, batches()[0], ATTENTION[label]))
        found |= labelled(
            f"net {dtype}", simulated(convolutions().to(dtype), noise(2, 6, 12, 10).to(dtype), SITES["abfp"])
        )
    return found


@golden("families/autocast")
def under_autocast() -> Outputs:
    """A float32 model under autocast to bfloat16."""
    found: Outputs = {}
    for label in ("int8", "abfp"):
        with torch.autocast("cpu", torch.bfloat16):
            found |= labelled(label, simulated(causal_model("opt", "sdpa"), batches()[0], ATTENTION[label]))
    return found


@golden("families/generate")
def generate() -> Outputs:
    """Tokens and logits of greedy decoding with a cache of keys and values."""
    found: Outputs = {}
    for name in ("opt", "llama", "gpt2"):
        for label in ("int8", "abfp", "head"):
            model = causal_model(name, "sdpa")
            with qsim.simulate(model, spelled(ATTENTION[label])), torch.no_grad():
                made = model.generate(
                    tokens()[:, :5], max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True,
                    attention_mask=torch.ones(2, 5, dtype=torch.long), pad_token_id=0,
                )  # fmt: skip
            found[f"{name} {label}"] = [made.sequences, *made.logits]
    return found


class Experts(nn.Module):
    """Weights of several experts in one parameter, multiplied by `bmm`, `einsum` and `_grouped_mm`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(noise(3, 16, 24)), nn.Parameter(noise(3, 24, 8))
        filled(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        ends = torch.tensor([2, 4, 6], dtype=torch.int32)
        hidden = torch.bmm(x.view(3, 2, 16), self.first).relu()
        return (
            hidden @ self.second,
            torch.einsum("eni,eio->eno", hidden, self.second),
            torch._grouped_mm(x, self.first, ends),
        )


@golden("families/experts", ci=True)
def experts() -> Outputs:
    """Experts in one parameter; `tensor(F)` is left out, see `families/experts per tensor`."""
    chosen = {label: SITES[label] for label in ("channel", "abfp", "tiles")}
    found: Outputs = {}
    for label, recipe in chosen.items():
        found |= labelled(label, simulated(Experts(), noise(6, 16, seed=3), recipe, audit=True))
    return found


@golden("families/experts per tensor")
def experts_per_tensor() -> Outputs:
    """A forward through experts under scales of the whole matrix, without any transform: one scale for each expert."""
    x = noise(6, 16, seed=3)
    return {
        **labelled("tensor", simulated(Experts(), x, {"weights": "tensor(int4)", "activations": "tensor(int8)"})),
        **labelled("nvfp4", simulated(Experts(), x, {"weights": "nvfp4", "activations": "nvfp4"})),
    }


@golden(
    "families/experts under bias correction",
    expected_to_change="Context.simulated shares one scale of tensor(F) over experts",
)
def experts_corrected() -> Outputs:
    """Experts under `tensor(int4)` beside a linear whose bias is corrected."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.out = Experts(), nn.Linear(8, 4)
            filled(self)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.out(self.experts(x)[0])
            return made

    data = [1 + noise(6, 16, seed=seed) for seed in range(3)]
    recipe = {"weights": "tensor(int4)", "transforms": ["bias_correction"]}
    return simulated(Both(), data[0], recipe, calibration=data)


@golden("sites/stochastic in a model", ci=True)
def stochastic_model() -> Outputs:
    """Stochastic rounding of weights, inputs and outputs, which draws anew at each call."""
    rounded = "(rounding=stochastic, seed=3)"
    recipe = {"weights": f"channel(int4{rounded})", "activations": f"token(int8{rounded})", "outputs": f"bf16{rounded}"}
    return {
        **labelled("linears", simulated(mlp(), noise(8, 48), recipe, calls=3)),
        **labelled("experts", simulated(Experts(), noise(6, 16, seed=3), recipe, calls=2)),
        **labelled("net", simulated(convolutions(), noise(2, 6, 12, 10), recipe, calls=2)),
    }


@golden("sites/skip and overrides", ci=True)
def skipped() -> Outputs:
    """Sites left alone and sites with quantizers of their own; plain callables; a recipe in YAML."""
    yaml = "weights: int4\nactivations: token(int8)\nskip: ['5']\noverrides:\n  '0': {weights: 'abfp(e2m1)', outputs: bf16}\n"
    x = noise(8, 48)
    found = labelled(
        "yaml", simulated(mlp(), x, qsim.Recipe.from_yaml(yaml).model_dump(mode="json", exclude_unset=True), audit=True)
    )
    with (
        qsim.simulate(mlp(), weights=lambda w: (w * 4).round() / 4, activations="int8", example=x) as simulation,
        torch.no_grad(),
    ):
        found["callable"] = simulation.model(x)
    with (
        qsim.simulate(
            mlp(), weights="int4", outputs="e4m3", overrides={"3": {"weights": None}}, keep=True
        ) as simulation,
        torch.no_grad(),
    ):
        found["parts"] = simulation.model(x)
    return found


@golden("sites/state and folding", ci=True)
def states() -> Outputs:
    """`folded_state_dict`, what sites hold, a simulation that starts from it, and `keep=False`."""
    recipe = {"weights": "channel(int4, symmetric=false)", "activations": "tensor(int8, static=true, symmetric=false)"}
    x, model, again = noise(8, 48), mlp(), mlp()
    found: Outputs = {}
    with qsim.simulate(model, recipe, calibration=[x, 2 * x]) as simulation, torch.no_grad():
        held = simulation.state_dict()
        found["held"] = [value for _, value in sorted(held.items())]
        folded, left = simulation.folded_state_dict()
        found["folded"], found["left"] = [folded[name] for name in sorted(folded)], len(left)
    with qsim.simulate(again, recipe, example=x, state=held), torch.no_grad():
        found["again"] = again(x)
    lost = causal_model("opt")
    qsim.simulate(lost, weights="abfp(int4)", activations="int8", keep=False, example=batches()[0])
    with torch.no_grad():
        found["not kept"] = lost(**batches()[0]).logits
    tied = qsim.simulate(causal_model("opt"), weights="int4", example=batches()[0])
    folded, left = tied.folded_state_dict()
    found["tied"], found["tied, left"] = [folded[name] for name in sorted(folded)], len(left)
    return found


# Static scales


def static_scales(scheme: str) -> Outputs:
    """Scales found in calibration data by every calibrator."""
    found: Outputs = {}
    calibrators = (
        "minmax",
        "absmax",
        "percentile(99)",
        "mse(steps=20)",
        "moving_average",
        "moving_average(0.5)",
        "entropy",
        "max",
    )
    for calibrator in calibrators:
        recipe = {"weights": "int4", "activations": scheme.format(f"static=true, range={calibrator}")}
        data = [noise(8, 48, seed=seed) * (1 + seed) for seed in range(4)]
        found |= labelled(f"{calibrator} linears", simulated(mlp(), data[0], recipe, calibration=data))
        if "8," in scheme:
            model = causal_model("opt", "sdpa")
            found |= labelled(f"{calibrator} opt", simulated(model, batches()[0], recipe, calibration=batches()))
    return found


for _kind, _scheme in {
    "tensor": "tensor(int8, {})", "tensor, zero points": "tensor(int8, symmetric=false, {})", "vectors": "abfp(int4, n=16, {})",
    "float": "tensor(e4m3, {})", "block, zero points": "block(int8, 8, symmetric=false, {})",
}.items():  # fmt: skip
    golden(f"static/{_kind}", ci=_kind == "vectors")(functools.partial(static_scales, _scheme))


@golden("static/outputs and attention")
def static_outputs() -> Outputs:
    """Static scales of outputs, of q, k, P and v, and of convolutions."""
    fixed = "tensor(int8, static=true, range=mse(steps=20))"
    recipe = {"weights": "int8", "activations": fixed, "outputs": fixed}
    images = [noise(2, 6, 12, 10, seed=seed) for seed in range(3)]
    return {
        **labelled(
            "llama", simulated(causal_model("llama", "sdpa"), batches()[0], recipe, calibration=batches(), audit=True)
        ),
        **labelled("net", simulated(convolutions(), images[0], recipe, calibration=images)),
        **labelled(
            "fused",
            simulated(
                Fused("causal"), noise(2, 9, 32), recipe, calibration=[noise(2, 9, 32, seed=s) for s in range(3)]
            ),
        ),
    }


# Transforms

TRANSFORMS = {
    "smoothquant": [["smoothquant"], ["smoothquant(0.8, preset=llmc)"], ["smoothquant(preset=modelopt)"]],
    "gptq": [["gptq"], ["gptq(act_order=true)"], ["gptq(static_groups=true, true_sequential=true, block=16)"]],
    "rptq": [["rptq(4, head_clusters=2)"], ["rptq(4, head_clusters=2, preset=paper)"], ["rptq(4, head_clusters=2, only_kv=true, p_bits=none)"]],
    "awq": [["awq(grid=8)"], ["awq(grid=8, clip=false)"]],
    "hadamard": [["hadamard"], ["hadamard(3, attention=false)"], ["hadamard(fold_norms=false)"]],
    "bias_correction": [["bias_correction"], ["bias_correction(activations=true)"]],
    "composed": [["smoothquant", "gptq"], ["rptq(4, head_clusters=2)", "gptq"], ["hadamard", "gptq(act_order=true)"], ["awq(grid=8)", "gptq"], ["hadamard", "bias_correction"]],
}  # fmt: skip


def transformed(name: str) -> Outputs:
    """Tiny models after a transform: the answer, what the transform reports, and the weights that it left."""
    found: Outputs = {}
    for methods in TRANSFORMS[name]:
        for kind, weights, activations in (("opt", "int4", "int8"), ("llama", "abfp(int4, n=16)", "tensor(int8)")):
            if kind == "llama" and "bias_correction" in str(methods):
                continue  # llama has no biases
            model = causal_model(kind)
            recipe = {"weights": weights, "activations": activations, "transforms": methods}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", qsim.CalibrationWarning)
                simulation = qsim.simulate(model, recipe, calibration=batches())
            with simulation, torch.no_grad():
                label = f"{', '.join(methods)} on {kind}"
                found[f"{label}: answer"] = model(**batches()[0]).logits
                found[f"{label}: weights"] = [value for _, value in sorted(model.state_dict().items())]
                found |= labelled(label, figures_of(simulation))
    return found


for _kind in TRANSFORMS:
    golden(f"transforms/{_kind}", ci=_kind in ("smoothquant", "gptq"))(functools.partial(transformed, _kind))


@golden("transforms/convolutions and other models")
def transformed_others() -> Outputs:
    """Transforms on a convolutional network, on linears with a norm, and on GPT-2's transposed weights."""
    images = [noise(2, 6, 12, 10, seed=seed) for seed in range(3)]
    rows = [heavy(32, 48, seed=seed) for seed in range(3)]
    small: dict[str, Any] = {"weights": "channel(int3)", "activations": "int8"}
    return {
        **labelled("net gptq", simulated(convolutions(), images[0], {**small, "transforms": ["gptq"]}, calibration=images)),
        **labelled("net bias", simulated(convolutions(), images[0], {**small, "transforms": ["bias_correction"]}, calibration=images)),
        **labelled("mlp smooth", simulated(mlp(), rows[0], {**small, "transforms": ["smoothquant", "gptq"]}, calibration=rows)),
        **labelled("mlp awq", simulated(mlp(), rows[0], {**small, "transforms": ["awq"]}, calibration=rows)),
        **labelled("mlp rotated", simulated(mlp(), rows[0], {**small, "transforms": ["hadamard"]}, calibration=rows)),
        **labelled("gpt2", simulated(causal_model("gpt2"), batches()[0], {**small, "transforms": ["gptq"]}, calibration=batches())),
        **labelled("mixtral", simulated(causal_model("mixtral"), batches()[0], {**small, "transforms": ["smoothquant"]}, calibration=batches())),
        **labelled("static", simulated(causal_model("opt"), batches()[0], {
            "weights": "int4", "activations": "tensor(int8, static=true, range=mse(steps=20))", "transforms": ["smoothquant", "gptq"],
        }, calibration=batches())),
    }  # fmt: skip


@golden("transforms/grids of gptq")
def gptq_grids() -> Outputs:
    """GPTQ on the grids of every kind of scheme."""
    grids = [
        "channel(int4, symmetric=false)", "channel(int(4, narrow=false, convention=gptq))", "tensor(int4)", "block(int4, 16)",
        "mxfp4", "nvfp4", "abfp(e2m1, n=8)", "block(int3, 16, symmetric=false)", "channel(nf4)", "channel(int3, range=mse(steps=20))",
    ]  # fmt: skip
    rows = [noise(40, 48, seed=seed) for seed in range(2)]
    found: Outputs = {}
    for grid in grids:
        found |= labelled(grid, simulated(mlp(), rows[0], {"weights": grid, "transforms": ["gptq"]}, calibration=rows))
    return found


# Training


def trained(
    model: nn.Module, example: Any, loss: Callable[[nn.Module], Tensor], recipe: Mapping[str, Any], **options: Any
) -> Outputs:
    """Losses, and parameters with learned steps, of five steps of SGD with momentum, and the answer afterwards."""
    simulation = qsim.simulate(model.train(), spelled(recipe), example=example, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    found: Outputs = {"losses": losses, "parameters": [p.detach().clone() for _, p in sorted(model.named_parameters())]}
    model.eval()
    with torch.no_grad():
        found["answer"] = tensors_in(answered(model, example))
    simulation.restore()
    return found


def fitted(model: nn.Module) -> Tensor:
    return F.mse_loss(model(noise(32, 48)), noise(32, 8, seed=4))


def continued(model: nn.Module) -> Tensor:
    made: Tensor = model(input_ids=tokens(3), labels=tokens(3), use_cache=False).loss
    return made


def qat(gradient: str) -> Outputs:
    """Linears and a language model, trained with one gradient of rounding."""
    learned = gradient == "lsq"
    recipes = {
        "channel": {"weights": f"channel(int4, gradient={gradient})", "activations": f"tensor(int8, gradient={gradient})", "outputs": "bf16"},
        "blocks": {"weights": f"block(int3, 8, gradient={gradient})", "activations": f"abfp(int4, n=8, gradient={gradient})"},
        "zero": {"weights": f"channel(int4, symmetric=false, gradient={gradient})", "activations": f"tensor(int8, symmetric=false, gradient={gradient})"},
        "float": {"weights": f"channel(e2m1, gradient={gradient})", "activations": "token(e4m3)"},
    }  # fmt: skip
    found: Outputs = {}
    for label, recipe in recipes.items():
        found |= labelled(f"linears, {label}", trained(mlp(), noise(32, 48), fitted, recipe))
    recipe = (
        recipes["channel"] if learned else {**recipes["channel"], "activations": f"token(int8, gradient={gradient})"}
    )
    return found | labelled("opt", trained(causal_model("opt", "sdpa"), batches()[0], continued, recipe))


for _kind in ("clipped", "identity", "piecewise", "lsq"):
    golden(f"training/{_kind}", ci=_kind in ("clipped", "lsq"))(functools.partial(qat, _kind))


@golden("training/others")
def training_others() -> Outputs:
    """Training under stochastic rounding, MX, NVFP4 and an analog device, of convolutions and experts, after dnf."""
    x = noise(32, 48)
    stochastic = {"weights": "channel(int4(rounding=stochastic))", "activations": "token(int8(rounding=stochastic))"}

    def images(model: nn.Module) -> Tensor:
        return F.mse_loss(model(noise(4, 6, 12, 10)), noise(4, 10, seed=4))

    def first(model: nn.Module) -> Tensor:
        made: Tensor = model(noise(6, 16, seed=3))[0].square().mean()
        return made

    device = analog_device("int8", 16, 8, noise=0.5)
    rows = [noise(32, 48, seed=seed) for seed in range(2)]
    return {
        **labelled("stochastic", trained(mlp(), x, fitted, stochastic)),
        **labelled("mx", trained(mlp(), x, fitted, {"weights": "mxfp4", "activations": "mxfp4"})),
        **labelled("nvfp4", trained(mlp(), x, fitted, {"weights": "nvfp4", "activations": "nvfp4"})),
        **labelled("analog", trained(mlp(), x, fitted, device)),
        **labelled("dnf", trained(mlp(), x, fitted, {**device, "transforms": ["dnf(64)"]}, calibration=rows)),
        **labelled("net", trained(convolutions(), noise(4, 6, 12, 10), images, {"weights": "int4", "activations": "int8"})),
        **labelled("experts", trained(Experts(), noise(6, 16, seed=3), first, {"weights": "int4", "activations": "int8"})),
        **labelled("smooth", trained(causal_model("opt"), batches()[0], continued, {"weights": "int4", "activations": "int8", "transforms": ["smoothquant"]}, calibration=batches())),
    }  # fmt: skip


@golden("transforms/dnf", ci=True)
def differential_noise() -> Outputs:
    """dnf: a model in evaluation, and in training, where noise stands for the errors."""
    recipe = {**analog_device("int8", 16, 4, noise=0.5), "transforms": ["dnf(64, seed=2)"]}
    rows = [noise(40, 48, seed=seed) for seed in range(3)]
    model = mlp()
    with qsim.simulate(model, spelled(recipe), calibration=rows), torch.no_grad():
        return {"evaluation": model(rows[0]), "training": [model.train()(rows[0]) for _ in range(2)]}


# Files and commands


@golden("files/quantize", ci=True)
def quantized_files() -> Outputs:
    """`qsim quantize`: each tensor of the file that it writes, and the errors that it reports."""
    from safetensors.torch import load_file, save_file

    contents = {
        "fc.weight": heavy(8, 100), "fc.bias": noise(8), "half.weight": noise(6, 64).bfloat16(), "conv.weight": noise(5, 4, 3, 3),
        "experts": noise(2, 6, 32), "embed.weight": noise(10, 16).half(), "ids": torch.arange(12).view(3, 4), "empty": torch.empty(0, 4),
    }  # fmt: skip
    found: Outputs = {}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.safetensors", Path(folder) / "out.safetensors"
        save_file(contents, source, metadata={"format": "pt"})
        for weights in (
            "abfp(int4, n=16)",
            "int8",
            "nvfp4",
            "tensor(int4)",
            "block(e4m3, [4, 16])",
            "channel(int4, symmetric=false)",
        ):
            report = json.loads(
                command(
                    "quantize", source, target, "--weights", weights, "--skip", "*embed*", "--conv1d", "exp*", "--json"
                )
            )
            out = load_file(target)
            found[weights] = [out[name] for name in sorted(out)]
            found[f"{weights} figures"] = [
                float(row[key]) for row in report for key in ("sqnr_db", "bits") if row[key] is not None
            ]
            target.unlink()
    return found


def metrics_of(result: Any) -> Outputs:
    """The metrics of both runs, their intervals, the audit and the reports of transforms."""
    found: Outputs = {f"baseline {name}": value for name, value in sorted(result.baseline.items())}
    found |= {f"simulated {name}": value for name, value in sorted(result.simulated.items())}
    found["bits"] = [float(result.audit.bits_per_weight or 0), float(result.audit.bits_per_activation or 0)]
    found["matmuls"] = [result.audit.covered, result.audit.found]
    numbers = [
        float(value) for report in result.transforms for value in (report.before, report.after) if value is not None
    ]
    return found | ({"reports": torch.tensor(numbers, dtype=torch.float64)} if numbers else {})


def words(many: int = 600) -> str:
    """A text of drawn words."""
    known = ["the", "a", "module", "class", "function", "returns", "object", "of", "with", "list", "value", "is", "not"]
    drawn = torch.randint(len(known), (many,), generator=torch.Generator().manual_seed(11)).tolist()
    return " ".join(known[place] for place in drawn)


def evaluated(limit: int, length: int | None = 48, own_text: bool = False, **recipe: Any) -> Outputs:
    """The metrics of a model of the zoo on its own data, or on a text that no version of Python changes."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore", qsim.CalibrationWarning)
        data = Path(folder) / "words.txt"
        data.write_text(words())
        source = str(data) if own_text else None
        seen = qsim.Calibration(source=source, samples=2, length=length)
        result = qsim.evaluate(spelled(recipe), data=source, run=qsim.Run(limit=limit, batch_size=4), calibration=seen)
    return metrics_of(result)


ABFP4 = {"weights": "abfp(int4)", "activations": "abfp(int4)", "outputs": "bf16"}
W4A8 = {"weights": "int4", "activations": "int8"}
PERPLEXITY = {"evaluate": "perplexity(64)"}
ZOO: dict[str, dict[str, Any]] = {
    "opt-tiny": {"limit": 2, **ABFP4, **PERPLEXITY},
    "opt-tiny on words": {"limit": 2, "own_text": True, **ABFP4, **PERPLEXITY, "transforms": ["smoothquant"]},
    "opt-tiny-outliers": {"limit": 2, "model": "opt-tiny-outliers", **W4A8, **PERPLEXITY, "transforms": ["smoothquant"]},
    "codegen-tiny": {"limit": 2, "model": "codegen-tiny", **ABFP4, **PERPLEXITY},
    "bert-tiny": {"limit": 4, "model": "bert-tiny", **ABFP4},
    "bert-tiny-classifier": {"limit": 8, "model": "bert-tiny-classifier", **W4A8},
    "vit-tiny": {"limit": 16, "model": "vit-tiny", "length": None, "weights": "int4", "activations": "tensor(int8, static=true, range=mse(steps=20))"},
    "ddpm-tiny": {"limit": 2, "model": "ddpm-tiny", "evaluate": "denoising(3, samples=2)", **W4A8},
    "minilm": {"limit": 4, "model": "minilm", "weights": "nvfp4", "activations": "nvfp4"},
    "fidelity": {"limit": 2, "evaluate": "fidelity(perplexity(64), samples=2)", **W4A8},
    "opt-tiny gptq": {"limit": 2, "own_text": True, **W4A8, **PERPLEXITY, "transforms": ["smoothquant", "gptq"]},
    "opt-tiny rptq": {"limit": 2, "own_text": True, **W4A8, **PERPLEXITY, "transforms": ["rptq"]},
    "opt-tiny awq": {"limit": 2, "own_text": True, **W4A8, **PERPLEXITY, "transforms": ["awq(grid=4)"]},
    "opt-tiny hadamard": {"limit": 2, "own_text": True, **W4A8, **PERPLEXITY, "transforms": ["hadamard", "bias_correction"]},
    "opt-tiny static": {"limit": 2, "own_text": True, "weights": "int4", "activations": "tensor(int8, static=true, range=moving_average)", "value_axis": "head", **PERPLEXITY},
    "opt-tiny analog": {"limit": 2, **analog_device("int8", 64, 8, gain=4.0, noise=0.5), **PERPLEXITY},
}  # fmt: skip
for _kind, _recipe in ZOO.items():
    golden(f"zoo/{_kind}", ci=_kind in ("vit-tiny", "opt-tiny on words"))(functools.partial(evaluated, **_recipe))


@golden("files/commands")
def commands() -> Outputs:
    """`qsim evaluate` in bfloat16, and `qsim finetune` of two steps, as JSON."""
    seen = ["--calibration-samples", 2, "--calibration-seqlen", 32]
    few = ["--limit", 2, "--evaluator", "perplexity(32)"]
    options = ["--precision", "w4a8", "--plugin", "smoothquant", "--static", "mse", *seen]
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        text = Path(folder) / "words.txt"
        text.write_text(words())
        few += ["--data", text, "--calibration-data", text]
        found = labelled("evaluate", metrics_of(qsim.Result.model_validate_json(command(
            "evaluate", "opt-tiny", *options, *few, "--dtype", "bfloat16", "--json", "-"
        ))))  # fmt: skip
        learned = [
            "--weights",
            "channel(int4, gradient=lsq)",
            "--activations",
            "abfp(int8, gradient=lsq)",
            "--outputs",
            "bf16",
        ]
        record = json.loads(command(
            "finetune", "opt-tiny", *learned, *few, *seen, "--eval-data", text, "--seqlen", 32, "--batch-size", 2, "--steps", 2, "--output", Path(folder) / "out", "--json", "-"
        ))  # fmt: skip
        for when in ("before", "after"):
            found |= labelled(f"finetune, {when}", metrics_of(qsim.Result.model_validate(record[when])))
    return found


# The record


def described(value: Any) -> dict[str, Any] | float | list[float]:
    """A hash and statistics of tensors; a figure as it is.

    NaN and ±Inf are counted and do not enter the statistics. The hash tells -0 from 0, and takes every NaN for the same.
    """
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, Sequence) and value and all(isinstance(v, int | float) for v in value):
        return [float(v) for v in value]
    digest, flat = hashlib.sha256(), []
    for tensor in [value] if isinstance(value, Tensor) else value:
        plain = tensor.detach().cpu().contiguous()
        if plain.is_floating_point():
            plain = plain.masked_fill(plain.isnan(), torch.nan)
        digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
        flat.append(plain.double().flatten())
    numbers = torch.cat(flat)
    finite = numbers[numbers.isfinite()]
    return {
        "sha256": digest.hexdigest(),
        "count": numbers.numel(),
        "nan": int(numbers.isnan().sum()),
        "inf": int(numbers.isinf().sum()),
        "negative_zeros": int(((numbers == 0) & numbers.signbit()).sum()),
        "sum": float(finite.sum()),
        "abs_sum": float(finite.abs().sum()),
        "norm": float((finite / 2.0**64).norm()) * 2.0**64,
        "max": float(finite.abs().max()) if finite.numel() else 0.0,
    }


def measured(entry: Entry) -> dict[str, Any]:
    """The record of one recipe: what stands for each of its outputs."""
    return {label: described(value) for label, value in entry.run().items()}


def environment() -> dict[str, str]:
    """The versions and the processor that hashes depend on."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "diffusers", "numpy", "tokenizers")}
    return {"python": platform.python_version(), **versions, "processor": torch.backends.cpu.get_cpu_capability()}


def disagreements(found: Mapping[str, Any], stored: Mapping[str, Any], tolerance: float | None = None) -> list[str]:
    """The differences between two records of one recipe, in words.

    Without a tolerance hashes and figures have to be equal; with one, statistics and figures may differ by that share,
    the sum by that share of the sum of magnitudes, and hashes are not compared.
    """
    lines = [f"{label}: is missing" for label in stored if label not in found]
    for label, now in found.items():
        if label not in stored:
            lines.append(f"{label}: is not in the record")
            continue
        before = stored[label]
        if isinstance(now, dict) and isinstance(before, dict):
            if tolerance is None and now["sha256"] != before["sha256"]:
                changed = [
                    f"{key} {before[key]!r} -> {now[key]!r}"
                    for key in now
                    if key != "sha256" and now[key] != before[key]
                ]
                lines.append(f"{label}: the bytes differ; {', '.join(changed) or 'the statistics do not'}")
            for key in now if tolerance is not None else ():
                if key != "sha256" and not _near(
                    now[key], before[key], tolerance or 0, before["abs_sum"] if key == "sum" else None
                ):
                    lines.append(f"{label}: {key} {before[key]!r} -> {now[key]!r}")
            continue
        pairs = list(zip(_several(now), _several(before), strict=False))
        same = len(_several(now)) == len(_several(before)) and all(_near(a, b, tolerance or 0) for a, b in pairs)
        if not same:
            lines.append(f"{label}: {before!r} -> {now!r}")
    return lines


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _near(now: float, before: float, tolerance: float, size: float | None = None) -> bool:
    if now == before or (math.isnan(now) and math.isnan(before)):
        return True
    return abs(now - before) <= tolerance * (abs(before) if size is None else size)


def written(record: Mapping[str, Any]) -> str:
    """The record as JSON, one line for each output."""
    lines = [f'{{\n "environment": {json.dumps(record["environment"])},\n "recipes": {{']
    for place, (name, outputs) in enumerate(record["recipes"].items()):
        inner = ",\n".join(f"   {json.dumps(label)}: {json.dumps(value)}" for label, value in outputs.items())
        lines.append(f"{',' if place else ''}\n  {json.dumps(name)}: {{\n{inner}\n  }}")
    return "".join(lines) + "\n }\n}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Record or compare the numbers of qsim.")
    parser.add_argument("--output", type=Path, help="write the record here")
    parser.add_argument("--only", default="*", help="run the recipes whose names match this pattern")
    parser.add_argument("--ci", action="store_true", help="run only the recipes that the test suite runs")
    parser.add_argument("--compare", type=Path, help="a record to compare with; exit with 1 if a number differs")
    parser.add_argument("--tolerance", type=float, help="compare statistics to this share, and no hashes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    chosen = [e for e in ENTRIES.values() if fnmatch.fnmatchcase(e.name, options.only) and (e.in_ci or not options.ci)]
    if not chosen:
        parser.error(f"no recipe matches {options.only!r}")
    recipes: dict[str, Any] = {}
    failed = []
    for entry in chosen:
        started = time.perf_counter()
        try:
            recipes[entry.name] = measured(entry)
        except Exception as error:
            failed.append(f"{entry.name}: {type(error).__name__}: {error}")
            print(f"FAILED {failed[-1]}", file=sys.stderr)
        print(f"{time.perf_counter() - started:6.2f} s  {entry.name}", file=sys.stderr)
    record = {"environment": environment(), "recipes": recipes}
    if options.output:
        options.output.write_text(written(record))
    elif options.compare is None:
        print(written(record), end="")
    return int(_compared(record, options) or bool(failed))


def _compared(record: Mapping[str, Any], options: argparse.Namespace) -> bool:
    """Print each disagreement with a stored record, and say if there was one that is not expected."""
    if options.compare is None:
        return False
    stored, wrong = json.loads(options.compare.read_text()), 0
    if stored["environment"] != record["environment"]:
        print(f"the record was made elsewhere: {stored['environment']}, here: {record['environment']}")
    for name, outputs in record["recipes"].items():
        lines = disagreements(outputs, stored["recipes"].get(name, {}), options.tolerance)
        expected = ENTRIES[name].expected_to_change
        wrong += 0 if expected else len(lines)
        for line in lines:
            print(f"{name}: {line}" + (f" (expected: {expected})" if expected else ""))
    print(f"{len(record['recipes'])} recipes compared, {wrong} disagreements")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
