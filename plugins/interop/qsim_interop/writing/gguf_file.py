"""Files of GGUF, which llama.cpp runs: blocks of 32 or 64 columns, each with its scales beside its codes.

Tensors have llama.cpp's names, and rows of q and k its order. The tokenizer lies beside the file, as transformers
writes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qsim_core.errors import ModelError, RecipeError
from qsim_interop.llama_cpp import OF_EXPERTS, WRITTEN, paired, tensors_of
from qsim_interop.writing.bit_patterns import is_format
from qsim_interop.writing.layer import Layer
from qsim_interop.writing.source import Source, state_of
from qsim_interop.writing.target import Target

NOTE = "the file has no tokenizer inside: llama.cpp's convert_hf_to_gguf.py --vocab-only writes one"


@dataclass(frozen=True)
class BlockType:
    """One type of blocks in which llama.cpp stores a weight."""

    type: str
    """Its name in `GGMLQuantizationType`."""
    file: str
    """The name in `LlamaFileType` of a file whose weights have this type."""
    columns: int
    """The columns of a block."""
    pack: Callable[[Layer], Tensor]
    """Packs a layer into bytes [N, bytes of a row]."""


class GGUF(Target):
    """Q4_0, Q8_0, MXFP4 and NVFP4."""

    name: ClassVar[str] = "gguf"
    library: ClassVar[str | None] = "gguf"
    kinds: ClassVar[tuple[str, ...]] = ("Linear", "stacks")
    holds: ClassVar[str] = (
        "block(int4, 32, scale=fp16), block(int8, 32, scale=fp16), mxfp4 and "
        "scaled(e2m1, 16, scale=scaled(e4m3, rule=ceil)), without zero points"
    )

    def check(self, source: Source) -> list[str]:
        family = getattr(getattr(source.model, "config", None), "model_type", type(source.model).__name__)
        if family not in WRITTEN:
            raise ModelError(f"gguf files of {family} are not written; those of {', '.join(WRITTEN)} are")
        _rope_base(source)
        _check_experts(source)
        for layer in source.layers:
            if layer.inputs is not None:
                raise RecipeError(f"{layer.module}: gguf holds weights only; leave activations out")
            self._type(layer)
        _names(source)
        return [NOTE]

    def write(self, source: Source, directory: Path) -> None:
        import gguf

        config: Any = source.model.config
        writer = gguf.GGUFWriter(directory / "model.gguf", WRITTEN[config.model_type])
        types = [self._type(layer) for layer in source.layers]
        _describe(writer, source, types[0].file if len({one.type for one in types}) == 1 else "ALL_F32")
        names = _names(source)
        for layer, block in zip(source.layers, types, strict=True):
            name = _name(names, layer)
            rows = paired(layer.parameter, block.pack(layer), config)
            if layer.stacked:
                rows = rows.unflatten(0, (layer.stacked, -1))
            writer.add_tensor(name, rows.numpy(), raw_dtype=gguf.GGMLQuantizationType[block.type])
            if block.type == "NVFP4":
                writer.add_tensor(name.removesuffix("weight") + "scale", layer.global_scale.numpy())
        for parameter, tensor in source.rest().items():
            parts = names.get(parameter, ())
            rows = paired(parameter, tensor.float(), config)
            rows = rows.squeeze(0) if len(rows) == 1 else rows  # the gate of a shared expert
            for name, part in zip(parts, rows.chunk(len(parts), -2) if len(parts) > 1 else [rows], strict=False):
                writer.add_tensor(name, part.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        for part in state_of(source.loaded):
            part.save_pretrained(directory)

    def _type(self, layer: Layer) -> BlockType:
        """The type of blocks that holds a layer exactly. Raises `RecipeError`."""
        scheme, element = layer.scheme, layer.element
        scale = layer.scale_format
        if not scheme.symmetric or not isinstance(scheme.granularity, int):
            raise self.refused(layer)
        if element.is_integer and element.min < 0 and scheme.granularity == 32 and is_format(scale, "fp16"):
            found = {4: Q4_0, 8: Q8_0}.get(element.width)
        elif is_format(element, "e2m1") and scheme.granularity == 32 and is_format(scale, "e8m0"):
            found = MXFP4
        elif layer.is_nvfp4:
            found = NVFP4
            self._check_factors(layer)
        else:
            found = None
        if found is None:
            raise self.refused(layer)
        if layer.shape[1] % found.columns:
            raise RecipeError(
                f"{layer.module}: blocks of {found.columns} ({found.type}) do not divide its {layer.shape[1]} inputs; "
                f"leave it out with --skip {layer.module}"
            )
        return found

    def _check_factors(self, layer: Layer) -> None:
        """Raise `RecipeError` unless it is the same to multiply by the global scale last, as llama.cpp does."""
        scales = layer.scale_codes.view(torch.float8_e4m3fn).float().repeat_interleave(16, 1)[:, : layer.shape[1]]
        if not torch.equal(layer.numbers * scales * layer.global_scale, layer.weight.decode().float().cpu()):
            raise self.refused(layer, "it multiplies by the global scale last, and rounds in another place")


def _q4_0(layer: Layer) -> Tensor:
    codes = (layer.numbers + 8).to(torch.uint8).unflatten(-1, (-1, 2, 16))
    return _with_scales(layer, codes[..., 0, :] | codes[..., 1, :] << 4)


def _q8_0(layer: Layer) -> Tensor:
    return _with_scales(layer, layer.numbers.to(torch.int8).view(torch.uint8).unflatten(-1, (-1, 32)))


def _with_scales(layer: Layer, blocks: Tensor) -> Tensor:
    """Put the scale of each block, in float16, before its bytes [N, blocks, bytes]: [N, bytes of a row]."""
    scales = layer.scales.half().unsqueeze(-1).view(torch.uint8)
    return torch.cat([scales, blocks], -1).flatten(-2)


def _mxfp4(layer: Layer) -> Tensor:
    codes = layer.codes.unflatten(-1, (-1, 2, 16))
    packed = codes[..., 0, :] | codes[..., 1, :] << 4
    return torch.cat([layer.scale_codes.unsqueeze(-1), packed], -1).flatten(-2)


def _nvfp4(layer: Layer) -> Tensor:
    codes = layer.codes.unflatten(-1, (-1, 4, 2, 8))
    packed = (codes[..., 0, :] | codes[..., 1, :] << 4).flatten(-2)
    return torch.cat([layer.scale_codes.unflatten(-1, (-1, 4)), packed], -1).flatten(-2)


Q4_0 = BlockType("Q4_0", "MOSTLY_Q4_0", 32, _q4_0)
Q8_0 = BlockType("Q8_0", "MOSTLY_Q8_0", 32, _q8_0)
MXFP4 = BlockType("MXFP4", "MOSTLY_MXFP4_MOE", 32, _mxfp4)
NVFP4 = BlockType("NVFP4", "MOSTLY_NVFP4", 64, _nvfp4)


def _names(source: Source) -> dict[str, tuple[str, ...]]:
    """The tensors of the model's parameters; a head that is tied to the embedding has none of its own."""
    config: Any = source.model.config
    names = tensors_of(config, [*(layer.parameter for layer in source.layers), *source.rest()])
    first: dict[tuple[str, ...], str] = {}
    for name, tensors in names.items():
        first.setdefault(tensors, name)
    return {name: tensors for tensors, name in first.items()}


def _name(names: dict[str, tuple[str, ...]], layer: Layer) -> str:
    """The tensor of a layer, which may be one of those that a stack of experts joins."""
    return names[layer.parameter][layer.part]


def _check_experts(source: Source) -> None:
    """Raise `ModelError` for experts that llama.cpp would run in another way."""
    config: Any = source.model.config
    if config.model_type not in OF_EXPERTS:
        return
    if config.norm_topk_prob is not (config.model_type == "qwen3_moe"):
        raise ModelError(f"llama.cpp runs {config.model_type} with norm_topk_prob={not config.norm_topk_prob} alone")
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise ModelError(f"of {config.model_type}, gguf files are written with experts in every layer alone")


def _rope_base(source: Source) -> float:
    """The base of the rotary embedding. Raises `ModelError` for a scaled one."""
    config: Any = source.model.config
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise ModelError(f"rotary embeddings of type {kind} are not written to gguf")
    return float(rope.get("rope_theta", getattr(config, "rope_theta", 10000.0)))


def _describe(writer: Any, source: Source, file_type: str) -> None:
    """Write what llama.cpp has to know of the model beside its tensors."""
    import gguf

    config: Any = source.model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(config.name_or_path or config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(_rope_base(source))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type in OF_EXPERTS:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if config.model_type == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType[file_type])
