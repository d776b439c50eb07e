"""The BERT adapter on directories that the test writes: each family, each head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import SIZES, WORD, pretrained, write

import qsim_core as qsim
from qsim_core.evaluation.locate import locate
from qsim_core.testing import AdapterSuite
from qsim_core.transforms.forward import as_in_evaluation, call

DISTIL = {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
CHECKPOINTS = {
    "BertForMaskedLM": (SIZES, "masked_lm", 18),
    "BertModel": (SIZES, "fidelity", 17),
    "BertForTokenClassification": (SIZES, "fidelity", 17),
    "RobertaForSequenceClassification": (SIZES, "accuracy", 18),
    "XLMRobertaForMaskedLM": (SIZES, "masked_lm", 18),
    "DistilBertForQuestionAnswering": (DISTIL, "question_answering", 17),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_class_that_a_checkpoint_names_is_loaded_and_says_how_it_is_evaluated(name: str, tmp_path: Path) -> None:
    options, evaluator, matmuls = CHECKPOINTS[name]
    model = pretrained(name, **options)().eval()

    located = locate(str(write(model, tmp_path)), qsim.Host())

    assert (located.adapter.name, located.adapter.evaluator_of(located.source)) == ("bert", evaluator)
    loaded = located.adapter.load(located.source, torch.float32)
    assert type(loaded.model).__name__ == name
    assert loaded.tokenizer("AB").input_ids == [33, 34]
    with as_in_evaluation(model):
        assert torch.equal(call(loaded.model, WORD)[0], call(model, WORD)[0])
    audit = qsim.simulate(loaded.model, weights="int8", activations="int8", example=WORD).audit()
    assert (audit.covered, audit.found, audit.uncovered) == (matmuls, matmuls, [])


@pytest.mark.parametrize(
    ("architectures", "message"),
    [
        (["BertForPreTraining"], "{} is of class BertForPreTraining, and adapter bert loads …ForMaskedLM, …ForQuestionAnswering, "
         "…ForSequenceClassification, …ForTokenClassification, …Model; from Python, qsim_core.simulate takes any model"),
        (["GPT2Model"], "{} is said to be of class GPT2Model and of family 'bert', which do not go together"),
        (["EvilModel"], "{} is of class EvilModel, which transformers "),
        ([], "{}/config.json names no architecture, like `\"architectures\": [\"OPTForCausalLM\"]`"),
    ],
)  # fmt: skip
def test_a_class_that_is_not_the_familys_is_refused_in_one_line(
    architectures: list[str], message: str, tmp_path: Path
) -> None:
    config = write(pretrained("BertModel", **SIZES)(), tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": architectures}))

    with pytest.raises(qsim.ModelError) as error:
        qsim.parse("bert").load(str(tmp_path), torch.float32)

    assert str(error.value).startswith(message.format(tmp_path))


class TestBert(AdapterSuite):
    text = "bert"

    def checkpoint(self, folder: Path) -> Path:
        return write(pretrained("BertForMaskedLM", **SIZES)(), folder)
