"""Tiny models of many families, seeded, each with an example of its inputs; the plugins' tests use them too."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from handwritten import EncoderDecoder, Fused, Graphormer, ImageBind, Recurrent
from torch import Tensor, nn

WORDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
SIZES = {**WORDS, **HEADS, "intermediate_size": 48, "max_position_embeddings": 64}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
GPT = {**WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
SEQ2SEQ = {
    **WORDS, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 2,
}  # fmt: skip
IMAGES = {**HEADS, "intermediate_size": 48, "image_size": 32, "patch_size": 8}
SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 4}


def noise(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(length: int = 7) -> Tensor:
    return torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(1))


WORD = {"input_ids": tokens()}
NEXT_WORD = {**WORD, "use_cache": False}
IMAGE = {"pixel_values": noise(2, 3, 32, 32)}
BOTH_SIDES = {**NEXT_WORD, "decoder_input_ids": tokens(5)}
LATENT, STEP, PROMPT = noise(2, 4, 8, 8), torch.tensor([3, 7]), noise(2, 5, 24, seed=3)


@dataclass(frozen=True)
class Family:
    """One tiny model: a function that makes it, an example of its inputs, and the products that no site can meet."""

    field: str
    make: Callable[[], nn.Module]
    example: Any
    uncovered: tuple[str, ...] = ()


def pretrained(name: str, **options: Any) -> Callable[[], nn.Module]:
    """Make a model of transformers from its class name, with a configuration of these options."""

    def make() -> nn.Module:
        import transformers

        cls = getattr(transformers, name)
        return cls(cls.config_class(**options))  # type: ignore[no-any-return]

    return make


def diffuser(name: str, **options: Any) -> Callable[[], nn.Module]:
    """Make a model of diffusers from its class name, with these options."""

    def make() -> nn.Module:
        import diffusers

        return getattr(diffusers, name)(**options)  # type: ignore[no-any-return]

    return make


def language(name: str, **options: Any) -> Family:
    return Family("language", pretrained(name, **options), NEXT_WORD)


def text(name: str, **options: Any) -> Family:
    return Family("text", pretrained(name, **options), WORD)


def vision(name: str, **options: Any) -> Family:
    return Family("vision", pretrained(name, **options), IMAGE)


def maskformer() -> nn.Module:
    from transformers import DetrConfig, MaskFormerConfig, MaskFormerForInstanceSegmentation, MaskFormerSwinConfig

    decoder = DetrConfig(
        d_model=32, **{k: v for k, v in SEQ2SEQ.items() if k.startswith(("enc", "dec")) and "start" not in k}
    )
    backbone = MaskFormerSwinConfig(**SWIN, out_features=["stage1", "stage2"])
    config = MaskFormerConfig(
        fpn_feature_size=32, mask_feature_size=32, num_queries=6, backbone_config=backbone, decoder_config=decoder
    )
    return MaskFormerForInstanceSegmentation(config)


FAMILIES: dict[str, Family] = {
    "OPT": language("OPTForCausalLM", **HEADS, **WORDS, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
    "CodeGen": language("CodeGenForCausalLM", **GPT, rotary_dim=4),
    "GPT-2": language("GPT2LMHeadModel", **GPT),
    "GPT-J": language("GPTJForCausalLM", **GPT, rotary_dim=4),
    "GPT-Neo": language("GPTNeoForCausalLM", **WORDS, hidden_size=32, num_layers=2, num_heads=4,
                        attention_types=[[["global", "local"], 1]], max_position_embeddings=64),
    "GPT-NeoX": language("GPTNeoXForCausalLM", **SIZES),
    "Bloom": language("BloomForCausalLM", **WORDS, hidden_size=32, n_layer=2, n_head=4),
    "MPT": language("MptForCausalLM", vocab_size=64, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    "Falcon": language("FalconForCausalLM", **WORDS, **HEADS, new_decoder_architecture=True, num_kv_heads=2,
                       alibi=False, bias=False),
    "Llama": language("LlamaForCausalLM", **GROUPED),
    "Mistral": language("MistralForCausalLM", **GROUPED),
    "Mixtral": language("MixtralForCausalLM", **GROUPED, num_local_experts=4),
    "Phi": language("PhiForCausalLM", **SIZES),
    "Phi-3": language("Phi3ForCausalLM", **SIZES),
    "Qwen2": language("Qwen2ForCausalLM", **SIZES, num_key_value_heads=2),
    "Qwen2-MoE": language("Qwen2MoeForCausalLM", **SIZES, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
                          moe_intermediate_size=16, shared_expert_intermediate_size=16),
    "Qwen3": language("Qwen3ForCausalLM", **GROUPED),
    "Qwen3-MoE": language("Qwen3MoeForCausalLM", **GROUPED, num_experts=4, num_experts_per_tok=2,
                          moe_intermediate_size=16),
    "Gemma": language("GemmaForCausalLM", **GROUPED),
    "Gemma 2": language("Gemma2ForCausalLM", **GROUPED),
    "Gemma 3": language("Gemma3ForCausalLM", **GROUPED),
    "GPT-OSS": language("GptOssForCausalLM", **GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "DeepSeek-V3": language("DeepseekV3ForCausalLM", **SIZES, q_lora_rank=16, kv_lora_rank=12, qk_rope_head_dim=4,
                            qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=8, n_group=2, topk_group=1,
                            num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1),
    "Mamba": language("MambaForCausalLM", vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
    "T5": Family("text", pretrained("T5ForConditionalGeneration", vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1,
                                    num_heads=4, decoder_start_token_id=0), BOTH_SIDES),
    "BART": Family("text", pretrained("BartForConditionalGeneration", **SEQ2SEQ, max_position_embeddings=64), BOTH_SIDES),
    "BERT": text("BertForMaskedLM", **SIZES),
    "RoBERTa": text("RobertaForSequenceClassification", **SIZES),
    "DistilBERT": text("DistilBertForMaskedLM", vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4),
    "ALBERT": text("AlbertForMaskedLM", **SIZES, embedding_size=16),
    "DeBERTa-v2": text("DebertaV2ForMaskedLM", **SIZES, relative_attention=True, position_buckets=8,
                       norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"],
                       position_biased_input=False),
    "ModernBERT": text("ModernBertForMaskedLM", **SIZES),
    "XLNet": text("XLNetLMHeadModel", vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48),
    "ViT": vision("ViTForImageClassification", **IMAGES),
    "DeiT": vision("DeiTForImageClassification", **IMAGES),
    "CLIP vision": vision("CLIPVisionModel", **IMAGES),
    "DINOv2": vision("Dinov2ForImageClassification", **HEADS, image_size=32, patch_size=8),
    "Swin": vision("SwinForImageClassification", **SWIN),
    "Swin v2": vision("Swinv2ForImageClassification", **SWIN),
    "ConvNeXt": vision("ConvNextForImageClassification", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    "SegFormer": vision("SegformerForSemanticSegmentation", hidden_sizes=[8, 16, 16, 16], depths=[1] * 4,
                        num_attention_heads=[1, 2, 2, 2], decoder_hidden_size=16),
    "MaskFormer": Family("vision", maskformer, IMAGE),
    "CLIP": Family("several", pretrained("CLIPModel", text_config=SIZES, vision_config=IMAGES, projection_dim=16),
                   {**WORD, **IMAGE}),
    "ImageBind-like": Family("several", ImageBind, (noise(2, 3, 16, 16), noise(2, 20, 8))),
    "Whisper": Family("audio", pretrained("WhisperForConditionalGeneration", **SEQ2SEQ, num_mel_bins=8,
                                          max_source_positions=10, max_target_positions=20),
                      {"input_features": noise(2, 8, 20), "decoder_input_ids": tokens(5), "use_cache": False}),
    "wav2vec 2.0": Family("audio", pretrained("Wav2Vec2ForCTC", **{k: v for k, v in SIZES.items() if "max" not in k},
                                              conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3),
                                              num_feat_extract_layers=2, num_conv_pos_embedding_groups=2,
                                              num_conv_pos_embeddings=4), {"input_values": noise(2, 400)}),
    "UNet2D": Family("diffusion", diffuser("UNet2DModel", sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
                                           block_out_channels=(16, 32), norm_num_groups=4, attention_head_dim=4,
                                           down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                                           up_block_types=("AttnUpBlock2D", "UpBlock2D")), (LATENT, STEP)),
    "UNet2DCondition": Family("diffusion", diffuser("UNet2DConditionModel", sample_size=8, block_out_channels=(16, 32),
                                                    layers_per_block=1, cross_attention_dim=24, attention_head_dim=4,
                                                    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                                    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                                                    norm_num_groups=4), (LATENT, STEP, PROMPT)),
    "AutoencoderKL": Family("diffusion", diffuser("AutoencoderKL", block_out_channels=(8,), norm_num_groups=4,
                                                  latent_channels=4), noise(2, 3, 16, 16)),
    "DiT": Family("diffusion", diffuser("DiTTransformer2DModel", num_attention_heads=4, attention_head_dim=8, in_channels=4,
                                        out_channels=8, num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=10),
                  {"hidden_states": LATENT, "timestep": STEP, "class_labels": torch.tensor([1, 2])}),
    "PixArt": Family("diffusion", diffuser("PixArtTransformer2DModel", num_attention_heads=4, attention_head_dim=8,
                                           in_channels=4, out_channels=8, num_layers=2, sample_size=8, patch_size=2,
                                           cross_attention_dim=32, caption_channels=24, use_additional_conditions=False),
                     {"hidden_states": LATENT, "timestep": STEP, "encoder_hidden_states": PROMPT}),
    "Stable Diffusion 3": Family("diffusion", diffuser("SD3Transformer2DModel", sample_size=8, patch_size=2, in_channels=4,
                                                       num_layers=2, attention_head_dim=8, num_attention_heads=4,
                                                       joint_attention_dim=24, caption_projection_dim=32,
                                                       pooled_projection_dim=16, out_channels=4),
                                 {"hidden_states": LATENT, "timestep": STEP, "encoder_hidden_states": PROMPT,
                                  "pooled_projections": noise(2, 16)}),
    "Flux": Family("diffusion", diffuser("FluxTransformer2DModel", patch_size=1, in_channels=4, num_layers=1,
                                         num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                                         joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8]),
                   {"hidden_states": noise(2, 16, 4), "encoder_hidden_states": noise(2, 5, 32),
                    "pooled_projections": noise(2, 32), "timestep": torch.tensor([3.0, 7.0]),
                    "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}),
    "Graphormer-like": Family("by hand", Graphormer, (noise(2, 6, 8), torch.randint(0, 4, (2, 6, 6), generator=torch.Generator().manual_seed(4)))),
    "nn.Transformer": Family("by hand", EncoderDecoder, (noise(2, 7, 32), noise(2, 5, 32))),
    "nn.LSTM, bilinear": Family("by hand", Recurrent, noise(3, 2, 8),
                                (":_trilinear", "lstm:mkldnn_rnn_layer")),
    "custom operator": Family("by hand", Fused, noise(2, 5, 8), (":qsim_tests::fused_attention",)),
}  # fmt: skip


def build(name: str) -> nn.Module:
    """Give a copy of a tiny model in eval mode, which is made once.

    Norms and biases are random too: transformers' ones and zeros hide mistakes.
    """
    return copy.deepcopy(_built(name))


@functools.cache
def _built(name: str) -> nn.Module:
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = FAMILIES[name].make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() < 2:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def write(model: Any, folder: Path) -> Path:
    """Write a directory as `save_pretrained` does, with the tokenizer or processor of its inputs."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, ViTImageProcessor, WhisperFeatureExtractor

    model.save_pretrained(folder)
    if model.main_input_name == "pixel_values":
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    elif model.main_input_name == "input_features":
        WhisperFeatureExtractor(feature_size=8).save_pretrained(folder)
    else:
        vocabulary = {chr(32 + n): n for n in range(64)}
        tokenizer = Tokenizer(models.BPE(vocabulary, []))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=" ").save_pretrained(folder)
    return folder
