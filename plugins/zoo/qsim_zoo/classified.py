"""bert-tiny-classifier: classify docstrings by the kind of object that they document."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertForMaskedLM, BertForSequenceClassification, BertTokenizer

from qsim_zoo import trained
from qsim_zoo.task import Task
from qsim_zoo.text import KINDS, labelled

BODY = "bert-tiny"


class BertTinyClassifier(Task):
    """Trains the body of bert-tiny further, with a classification head in place of that of the language model."""

    name = "bert-tiny-classifier"
    steps = 1000
    measure = "validation_loss"
    peak_rate = 3e-4
    context: int = 64
    batch: int = 32

    def prepare(self, directory: Path) -> None:
        """Write bert-tiny's tokenizer, and read the docstrings of both splits."""
        directory.mkdir(parents=True, exist_ok=True)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(trained(BODY) / file, directory)
        self.tokenizer: Any = BertTokenizer.from_pretrained(directory)
        self.train_texts, self.train_kinds = labelled("train")
        self.valid_texts, self.valid_kinds = labelled("valid")

    def make(self) -> nn.Module:
        body: Any = BertForMaskedLM.from_pretrained(trained(BODY), dtype=torch.float32)
        config = body.config
        config.id2label = dict(enumerate(KINDS))
        config.label2id = {kind: label for label, kind in enumerate(KINDS)}
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.1
        model: Any = BertForSequenceClassification(config)
        model.bert.load_state_dict(body.bert.state_dict(), strict=False)  # bert-tiny has no pooler
        made: nn.Module = model
        return made

    def loss(self, model: Any) -> Tensor:
        """Compute the cross-entropy of random docstrings."""
        chosen = torch.randint(len(self.train_texts), (self.batch,)).tolist()
        return self._loss(model, [self.train_texts[n] for n in chosen], [self.train_kinds[n] for n in chosen])

    def validate(self, model: Any) -> float:
        """Compute the cross-entropy over the validation split."""
        total = 0.0
        for start in range(0, len(self.valid_texts), self.batch):
            texts, kinds = (part[start : start + self.batch] for part in (self.valid_texts, self.valid_kinds))
            total += self._loss(model, texts, kinds).item() * len(texts)
        return total / len(self.valid_texts)

    def report(self, loss: float) -> float:
        """Return the loss itself, in nats per docstring."""
        return loss

    def _loss(self, model: Any, texts: list[str], kinds: list[str]) -> Tensor:
        inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=self.context, return_tensors="pt")
        loss: Tensor = model(**inputs, labels=torch.tensor([KINDS.index(kind) for kind in kinds])).loss
        return loss
