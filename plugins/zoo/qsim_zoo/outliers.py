"""opt-tiny-outliers: opt-tiny with the activation outliers of large models, and the same function in float32.

In each norm before linear layers, the gain and bias of four channels are multiplied by 20 to 60. The matching columns
of these layers are divided by the same factors. Large language models develop such channels in training (arXiv
2208.07339). A model of this size does not, so the zoo adds them. opt-tiny-outliers-everywhere has one such channel
among each 16, at a random place: no vector of 16 elements or more is without one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from qsim_cache.sealing import damaged, seal
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qsim_core import ModelError
from qsim_core.files import cache, check_own, empty, locked, make_cache_folder

CHANNELS = 4
APART = 16
"""Channels of which one is an outlier, if outliers are everywhere."""
LOWEST, HIGHEST = 20.0, 60.0
CONSUMERS = {
    "self_attn_layer_norm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "final_layer_norm": ("fc1",),
}


def add_outliers(weights: dict[str, Tensor], layers: int, seed: int = 0, everywhere: bool = False) -> dict[str, Tensor]:
    """Return the state dict of an OPT model with outlier channels added: four in a norm, or one among each 16.

    The function of the model stays the same.
    """
    generator = torch.Generator().manual_seed(seed)
    result = {name: tensor.float().clone() for name, tensor in weights.items()}
    for layer in range(layers):
        prefix = f"model.decoder.layers.{layer}"
        for norm, consumers in CONSUMERS.items():
            width = len(result[f"{prefix}.{norm}.weight"])
            if everywhere:
                first = torch.arange(0, width, APART)
                channels = first + torch.randint(APART, first.shape, generator=generator)
            else:
                channels = torch.randperm(width, generator=generator)[:CHANNELS]
            factors = LOWEST + (HIGHEST - LOWEST) * torch.rand(len(channels), generator=generator)
            result[f"{prefix}.{norm}.weight"][channels] *= factors
            result[f"{prefix}.{norm}.bias"][channels] *= factors
            for consumer in consumers:
                result[f"{prefix}.{consumer}.weight"][:, channels] /= factors
    return result


def directory(source: Path, everywhere: bool = False) -> Path:
    """Return a directory with the model, made once from `source` and kept in the user's cache ($QSIM_CACHE)."""
    name = f"opt-tiny-outliers{'-everywhere' if everywhere else ''}"
    weights = source / "model.safetensors"
    stamp = hashlib.sha256(weights.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:16]
    target = cache() / "zoo" / stamp / name
    if not damaged(target):
        check_own(cache() / "zoo")
        return target
    try:
        _make(source, target, everywhere)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or "the disk is full, or not writable"
        raise ModelError(
            f"cannot make {name} under {cache()}: {reason}; set QSIM_CACHE to a directory with 20 MB free"
        ) from None
    return target


def _make(source: Path, target: Path, everywhere: bool) -> None:
    make_cache_folder("zoo", "made of another model")
    target.parent.mkdir(exist_ok=True)
    with locked(target.parent), empty(target.with_name("part")) as part:
        if not damaged(target):  # another process was faster
            return
        shutil.copytree(source, part, dirs_exist_ok=True)
        config = json.loads((part / "config.json").read_text(encoding="utf-8"))
        plain = load_file(source / "model.safetensors")
        made = add_outliers(plain, config["num_hidden_layers"], everywhere=everywhere)
        save_file(made, part / "model.safetensors", metadata={"format": "pt"})
        (part / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2), encoding="utf-8")
        seal(part)
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
