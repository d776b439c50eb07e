"""ViT (`model_type` "vit", arXiv 2010.11929), DeiT, and the vision half of CLIP."""

from __future__ import annotations

from qsim_transformers.pretrained import Pretrained

from qsim_core import Adapter, hookimpl


class ViT(Pretrained):
    """Encoders of images: classifiers by their accuracy, a plain encoder is held to its own embeddings."""

    name = "vit"
    families = ("clip_vision_model", "deit")
    heads = ("ForImageClassification", "ForImageClassificationWithTeacher", "Model", "ModelWithProjection")


@hookimpl
def qsim_adapters() -> list[type[Adapter]]:
    return [ViT]
