"""BERT (`model_type` "bert", arXiv 1810.04805), RoBERTa, DistilBERT; MiniLM's models are BERTs."""

from __future__ import annotations

from qsim_transformers.pretrained import Pretrained

from qsim_core import Adapter, hookimpl


class BERT(Pretrained):
    """Text encoders. The checkpoint's head determines the evaluator; a model without a head gives embeddings."""

    name = "bert"
    families = ("distilbert", "roberta", "xlm-roberta")
    heads = ("ForMaskedLM", "ForQuestionAnswering", "ForSequenceClassification", "ForTokenClassification", "Model")


@hookimpl
def qsim_adapters() -> list[type[Adapter]]:
    return [BERT]
