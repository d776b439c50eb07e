"""Time a simulated forward, against the float32 model's and a bfloat16 copy's.

    python benchmarks/forward.py [--shape 125m|1.3b] [--batch N] [--layers N] [--rounds N] [--device cuda] [FORMAT …]

The model is OPT blocks with random weights, and the hidden size, heads and FFN of OPT-125M or OPT-1.3B. Attention is
transformers' default (`sdpa`). The input is BATCH x 512 tokens. Each round runs all models in turn, in one process.
Medians are printed, as ratios to the float32 forward. With --others other simulators run too, if they are installed.
With --thread torch runs on one thread, and the processor's time is measured, which other programs change little.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
from collections.abc import Callable

import torch
from qsim_fast.kernels import native
from timing import machine, seconds, thread_seconds
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

import qsim_core as qsim

SHAPES = {"125m": (768, 12, 3072), "1.3b": (2048, 32, 8192)}
FORMATS: dict[str, dict[str, str]] = {
    "int8": {"weights": "int8", "activations": "int8"},
    "w4a8": {"weights": "int4", "activations": "int8"},
    "abfp": {"weights": "abfp(int4)", "activations": "abfp(int8)"},
    "mxint8": {"weights": "mxint8", "activations": "mxint8"},
    "mxfp8": {"weights": "mxfp8_e4m3", "activations": "mxfp8_e4m3", "outputs": "bf16"},
    "mxfp4": {"weights": "mxfp4", "activations": "mxfp4", "outputs": "bf16"},
    "nvfp4": {"weights": "nvfp4", "activations": "nvfp4"},
}


def model_of(shape: str, layers: int, vocabulary: int = 512) -> OPTForCausalLM:
    """Make an OPT. By default it has a small vocabulary, because the benchmark measures the blocks."""
    hidden, heads, ffn = SHAPES[shape]
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        num_attention_heads=heads,
        ffn_dim=ffn,
        num_hidden_layers=layers,
        max_position_embeddings=512,
    )
    return OPTForCausalLM(config).eval()


def torchao_int8(model: nn.Module) -> nn.Module:
    """Quantize by torchao: dynamic int8 activations and int8 weights."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def brevitas_int8(model: nn.Module) -> nn.Module:
    """Quantize by Brevitas' QuantLinear: dynamic per-row int8 activations and per-channel int8 weights."""
    from brevitas.nn import QuantLinear
    from brevitas.quant.scaled_int import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    for name, child in model.named_children():
        if isinstance(child, nn.Linear):
            quantized = QuantLinear(
                child.in_features,
                child.out_features,
                bias=child.bias is not None,
                weight_quant=Int8WeightPerChannelFloat,
                input_quant=Int8ActPerTensorFloat,
            )
            quantized.load_state_dict(child.state_dict(), strict=False)
            setattr(model, name, quantized.eval())
        else:
            brevitas_int8(child)
    return model


def modelopt(config: str) -> Callable[[nn.Module], nn.Module]:
    """Make a function that quantizes by NVIDIA ModelOpt, with one of its configurations."""

    def quantize(model: nn.Module) -> nn.Module:
        import modelopt.torch.quantization as mtq

        ids = torch.zeros(1, 8, dtype=torch.long)
        return mtq.quantize(model, getattr(mtq, config), lambda m: m(ids))  # type: ignore[no-any-return]

    return quantize


def microxcaling(element: str) -> Callable[[nn.Module], nn.Module]:
    """Make a function that replaces torch's linears with those of Microsoft's MX library."""

    def quantize(model: nn.Module) -> nn.Module:
        import mx

        specs = mx.finalize_mx_specs(
            {"w_elem_format": element, "a_elem_format": element, "block_size": 32, "bfloat": 16, "scale_bits": 8}
        )
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    other = mx.Linear(child.in_features, child.out_features, child.bias is not None, mx_specs=specs)
                    other.load_state_dict(child.state_dict())
                    setattr(parent, name, other.eval())
        return model

    return quantize


OTHERS: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {
    "torchao int8": ("torchao", torchao_int8),
    "brevitas int8": ("brevitas", brevitas_int8),
    "modelopt int8": ("modelopt", modelopt("INT8_DEFAULT_CFG")),
    "modelopt mxfp8": ("modelopt", modelopt("MXFP8_DEFAULT_CFG")),
    "microxcaling mxfp8": ("mx", microxcaling("fp8_e4m3")),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--shape", choices=SHAPES, default="125m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--others", action="store_true", help="run other simulators too, if they are installed")
    parser.add_argument("--arithmetic", default="auto", help="qsim's arithmetic: auto, float32, int8, …")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    parser.add_argument("--thread", action="store_true", help="one thread, and the processor's time")
    given = parser.parse_args()
    measure = thread_seconds if given.thread else seconds
    torch.set_num_threads(1 if given.thread else torch.get_num_threads())
    wrong = [name for name in given.formats if name not in FORMATS]
    if wrong:
        parser.error(f"no format {wrong[0]!r}; there are {', '.join(FORMATS)}")

    base = model_of(given.shape, given.layers).to(given.device)
    ids = torch.randint(0, 512, (given.batch, 512), generator=torch.Generator().manual_seed(0)).to(given.device)
    models: dict[str, nn.Module] = {"float32": base, "bfloat16": copy.deepcopy(base).bfloat16()}
    arithmetics: dict[str, str] = {}
    for name in given.formats or FORMATS:
        models[name] = copy.deepcopy(base)
        recipe = qsim.Recipe(**FORMATS[name], arithmetic=given.arithmetic, skip=("lm_head",))  # type: ignore[arg-type]
        simulation = qsim.simulate(models[name], recipe, example={"input_ids": ids[:1, :64]}, keep=False)
        with torch.no_grad():
            models[name](ids[:1])
        used = {site.arithmetic for site in simulation.audit().sites if not site.skipped}
        arithmetics[name] = ", ".join(sorted(used))
    for name, (package, make) in OTHERS.items() if given.others else ():
        if importlib.util.find_spec(package) is None:
            continue
        other = copy.deepcopy(base)
        try:
            with torch.no_grad():
                make(other)(ids[:1])
        except Exception as error:  # it needs a GPU, or another torch
            print(f"{name} cannot run here: {' '.join(str(error).split())[:100]}")
        else:
            models[name] = other

    def forward(model: nn.Module) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]

    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode(False), torch.no_grad(), native.only(True):
        for _ in range(given.rounds + 1):
            for name, model in models.items():
                times[name].append(measure(lambda model=model: forward(model)))  # type: ignore[misc]
    medians = {name: statistics.median(measured[1:]) for name, measured in times.items()}
    print(f"{given.layers} blocks of OPT-{given.shape.upper()}, {given.batch} x 512 tokens, {machine(given.device)}")
    for name, median in medians.items():
        print(f"{name:20} {median:7.4f} s  {median / medians['float32']:.2f}  {arithmetics.get(name, '')}")


if __name__ == "__main__":
    main()
