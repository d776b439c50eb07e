"""The forwards of a model without values: a prompt at once, then one token at a time with a cache.

Tensors are on the meta device, so a forward of any size takes no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from qsim_core import ModelError, QsimError, Recipe, SiteWork, Transform, simulate
from qsim_core.errors import one_line
from qsim_core.simulation.work import work_beside
from qsim_hardware.forward import CACHED, Phase, cache_argument, cache_of, forward, generates, main_input


@dataclass(frozen=True)
class Shapes:
    """The sequences that are computed together, the tokens of each prompt, and the tokens that follow it."""

    batch: int
    prompt: int
    generate: int


def phases(model: Any, recipe: Recipe, shapes: Shapes, operations: bool = True) -> list[Phase]:
    """Count the work of a prompt, and of the first and the last token after it; of other models that of one forward.

    The prompt of an encoder and decoder is all that its encoder reads, and its decoder's first token. Without
    `operations` products are counted alone.

    Raises `ModelError` for a model that cannot run without values, and `RecipeError` for a recipe that does not fit.
    """
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")  # others look at the values of masks
    with simulate(model, recipe) as simulation, _without_values(model, shapes):
        start = 1 if _encodes(model) else shapes.prompt
        prompt, before = forward("prompt", simulation, _inputs(model, shapes, start), operations)
        if before is None:
            return [replace(prompt, name="forward")]
        found, read = [prompt], start
        for name, length in _lengths(start, shapes.generate).items():
            if length > read:
                _, before = forward(name, simulation, _inputs(model, shapes, length), False)
            found.append(forward(name, simulation, _next_token(model, shapes, before), operations)[0])
        return found


def with_factors(phase: Phase, model: Any, transforms: Sequence[Transform]) -> Phase:
    """Add the factors that transforms put beside quantized matrices: these depend on sizes alone."""
    found = []
    for one in phase.work:
        found.append(one)
        if one.weight is None or one.operands[1].format is None or model.get_parameter(one.weight).dim() != 2:
            continue
        for transform in transforms:
            factors = transform.beside(one.product.n, one.product.k)
            found += [] if factors is None else work_beside(factors, one)
    return replace(phase, work=found)


def _encodes(model: Any) -> bool:
    """True for an encoder and a decoder: the encoder reads the prompt once, the decoder begins with one token."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def notes(model: Any, shapes: Shapes) -> Iterator[str]:
    """Lines about what can hardly be meant."""
    yield from _too_long(model, shapes)
    if not generates(model):
        yield "the model does not continue texts: one forward is counted, and no decoding"


def _too_long(model: Any, shapes: Shapes) -> list[str]:
    """A line about tokens without positions; none where all have one."""
    tokens = shapes.prompt + shapes.generate * generates(model)
    positions = getattr(model.config, "max_position_embeddings", None)
    if main_input(model) == "input_ids" and isinstance(positions, int) and tokens > positions:
        return [f"{tokens} tokens are more than the {positions} positions that the model was made for"]
    return []


def cached_bytes(model: Any, work: Sequence[SiteWork]) -> float:
    """Count the bytes of the keys and values of all layers, scales included; an encoder's own are not kept."""
    encoder = {
        f"{name}." for name, module in model.named_modules() if _encodes(model) and module is model.get_encoder()
    }
    kept = (one for one in work if not one.site.startswith(tuple(encoder)))
    return sum(operand.bytes for one in kept for operand in one.operands if operand.role in CACHED)


def _lengths(start: int, generate: int) -> dict[str, int]:
    """The tokens that lie before the first and before the last token that is generated."""
    if generate < 2:
        return {"token": start} if generate else {}
    return {"first token": start, "last token": start + generate - 1}


def _tokens(batch: int, tokens: int) -> torch.Tensor:
    return torch.zeros(batch, tokens, dtype=torch.long, device="meta")


def _next_token(model: Any, shapes: Shapes, before: Any) -> dict[str, Any]:
    """Inputs of one more token after a forward that gave `before`."""
    known = {cache_argument(model): cache_of(model, before), "use_cache": True}
    if not _encodes(model):
        return {"input_ids": _tokens(shapes.batch, 1), **known}
    return {
        "encoder_outputs": (before.encoder_last_hidden_state,),
        "decoder_input_ids": _tokens(shapes.batch, 1),
        **known,
    }


def _inputs(model: Any, shapes: Shapes, tokens: int) -> dict[str, Any]:
    """Inputs of the model's own kind: tokens, or images of the size in its configuration. Raises `ModelError`.

    `tokens` is what the part that makes text has read.
    """
    batch = shapes.batch
    match main_input(model):
        case "input_ids" if _encodes(model):
            ids = _tokens(batch, shapes.prompt)
            return {"input_ids": ids, "decoder_input_ids": _tokens(batch, tokens), "use_cache": True}
        case "input_ids":
            return {"input_ids": _tokens(batch, tokens), **({"use_cache": True} if generates(model) else {})}
        case "pixel_values":
            size, config = model.config.image_size, model.config
            height, width = size if isinstance(size, list | tuple) else (size, size)
            shape = (batch, getattr(config, "num_channels", 3), height, width)
            return {"pixel_values": torch.zeros(shape, dtype=model.dtype, device="meta")}
    raise ModelError(
        f"the inputs of {type(model).__name__} are neither tokens nor images; from Python, hardware.cost("
        f"simulate(model, …).work(example)) prices any model"
    )


@contextmanager
def _without_values(model: Any, shapes: Shapes) -> Iterator[None]:
    """Turn what goes wrong inside, in inputs of any size and in the model's own code, into a `ModelError`."""
    try:
        yield
    except QsimError:
        raise
    except Exception as error:  # of any class, as a model that looks at values likes
        why = "; ".join([one_line(error), *_too_long(model, shapes)])
        raise ModelError(f"{type(model).__name__} cannot run without values: {why}") from None
