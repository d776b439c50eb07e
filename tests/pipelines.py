"""A Stable Diffusion small enough for tests: random weights, words of letters, images of 8 by 8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIZE, LONGEST = 8, 8
LAYERS = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = LAYERS | {
    "vocab_size": 54, "max_position_embeddings": LONGEST, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1
}  # fmt: skip


def tokenizer() -> Any:
    """CLIP's tokenizer, with single letters as its only tokens."""
    from transformers import CLIPTokenizer

    letters = [chr(97 + n) for n in range(26)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[], model_max_length=LONGEST)


def write_stable_diffusion(directory: Path) -> Path:
    """Save a text encoder, a U-Net and an autoencoder as diffusers does."""
    import diffusers
    import transformers

    library: Any = diffusers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        library.StableDiffusionPipeline(
            vae=library.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4),
            text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)),
            tokenizer=tokenizer(),
            unet=library.UNet2DConditionModel(
                sample_size=SIZE, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=24,
                attention_head_dim=4, norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            ),
            scheduler=library.DDIMScheduler(clip_sample=False, steps_offset=1),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        ).save_pretrained(directory)  # fmt: skip
    return directory
