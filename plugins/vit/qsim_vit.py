"""ViT (`model_type` "vit", arXiv 2010.11929), DeiT, and CLIP's image encoder."""

from __future__ import annotations

from qsim_transformers.pretrained import Pretrained

from qsim_core import Adapter, hookimpl


class ViT(Pretrained):
    """Image encoders. Classifiers are evaluated by accuracy; a model without a head gives embeddings."""

    name = "vit"
    families = ("clip_vision_model", "deit")
    heads = ("ForImageClassification", "ForImageClassificationWithTeacher", "Model", "ModelWithProjection")


@hookimpl
def qsim_adapters() -> list[type[Adapter]]:
    return [ViT]
