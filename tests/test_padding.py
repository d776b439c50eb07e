"""Calibration on padded batches against the same texts one by one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import qsim_core as qsim

LENGTHS = (30, 9, 17)
PAD = 0


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 64, (length,), generator=generator) for length in LENGTHS]


def padded(left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, both `[texts, positions]`."""
    ids = torch.full((len(LENGTHS), max(LENGTHS)), PAD)
    for row, text in zip(ids, texts(), strict=True):
        row[slice(-len(text), None) if left else slice(len(text))] = text
    return ids, (ids != PAD).long()


@pytest.fixture(scope="module")
def model() -> Any:
    """A Llama whose embedding of the padding token is unlike all others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                attention_bias=True,
                mlp_bias=True,
            )
        ).eval()
    made.model.embed_tokens.weight.data[PAD, 3] = 50.0
    return made


def outcome(model: Any, batches: list[Any], *transforms: str) -> dict[str, Tensor]:
    """The static scales, or the weights after transforms."""
    recipe: dict[str, Any] = {"weights": "int4", "activations": "tensor(int8)", "transforms": transforms}
    if not transforms:
        recipe["activations"] = "tensor(int8, static=true)"
    simulation = qsim.simulate(copy.deepcopy(model), recipe, calibration=batches)
    return simulation.model.state_dict() if transforms else simulation.state_dict()


def masked(mask: Tensor) -> Tensor:
    """The causal mask `[texts, 1, positions, positions]` of a mask of positions."""
    return mask[:, None, None, :].bool() & torch.ones(mask.shape[1], mask.shape[1]).tril().bool()


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "by name": lambda ids, mask: {"input_ids": ids, "attention_mask": mask},
    "by place": lambda ids, mask: (ids, mask),
    "squares": lambda ids, mask: {"input_ids": ids, "attention_mask": masked(mask)},
    "added to scores": lambda ids, mask: {
        "input_ids": ids,
        "attention_mask": torch.zeros(()).where(masked(mask), torch.finfo(torch.float32).min),
    },
}


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("form", FORMS)
def test_padded_texts_give_the_static_scales_of_the_texts_one_by_one(model: Any, form: str, left: bool) -> None:
    alone = outcome(model, [{"input_ids": text[None]} for text in texts()])

    together = outcome(model, [FORMS[form](*padded(left))])

    assert together.keys() == alone.keys()
    assert all(torch.allclose(together[name], alone[name], rtol=1e-5) for name in alone)


@pytest.mark.filterwarnings("ignore::qsim_core.errors.CalibrationWarning")
@pytest.mark.parametrize(
    "method", ["smoothquant", "gptq", "awq", "rptq", "bias_correction", "wush(8)", "qronos(0.01)", "imatrix"]
)
def test_padded_texts_give_every_transform_what_the_texts_one_by_one_give(model: Any, method: str) -> None:
    alone = outcome(model, [{"input_ids": text[None]} for text in texts()], method)

    together = outcome(model, [FORMS["by name"](*padded(left=False))], method)

    assert all(torch.allclose(together[name], alone[name], rtol=1e-3, atol=1e-5) for name in alone)


def test_the_audit_counts_what_the_mask_keeps(model: Any) -> None:
    batch = FORMS["by name"](*padded(left=True))
    simulation = qsim.simulate(copy.deepcopy(model), activations="tensor(int8)", example=batch)
    second = FORMS["by name"](*(part[1:2] for part in padded(left=False)))

    measured = simulation.audit(second)

    assert measured.sites == simulation.audit({"input_ids": texts()[1][None]}).sites
    assert simulation.audit().sites[0].calls == len(LENGTHS)


def test_each_mask_of_an_encoder_and_a_decoder_cuts_its_own_tokens() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
        model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    (ids, mask), (answers, kept) = padded(False), (part.flip(0) for part in padded(False))
    both = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": answers, "decoder_attention_mask": kept}
    single = zip(texts(), reversed(texts()), strict=True)

    alone = outcome(model, [{"input_ids": a[None], "decoder_input_ids": b[None]} for a, b in single])

    assert all(torch.allclose(value, alone[name], rtol=1e-5) for name, value in outcome(model, [both]).items())


class Pooled(nn.Module):
    """A model whose second layer has one row for each text."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, patches: Any = None) -> Tensor:
        hidden = self.first(self.table(input_ids))
        counted = attention_mask[..., None].to(hidden)
        return self.second((hidden * counted).sum(1) / counted.sum(1))


def test_a_row_that_is_no_position_stays_and_a_text_without_tokens_goes() -> None:
    ids, mask = padded(False)
    mask = mask * torch.tensor([[1], [0], [1]])
    alone = [(text[None], torch.ones(1, len(text))) for text in (texts()[0], texts()[2])]
    model = Pooled().eval()

    together = outcome(model, [(ids, mask)])

    assert all(torch.allclose(value, together[name], rtol=1e-5) for name, value in outcome(model, alone).items())


def test_a_batch_that_cannot_be_cut_is_taken_whole_and_named() -> None:
    ids, mask = padded(False)

    with pytest.warns(qsim.CalibrationWarning) as said:
        qsim.simulate(
            Pooled().eval(), activations="tensor(int8, static=true)", calibration=[(ids, mask, torch.ones(7, 4))]
        )

    assert str(said[0].message) == (
        "calibration batch 0: masked positions count, as patches (7, 4) has no axis of 3 texts"
    )


class Pipeline(nn.Module):
    """A model that pads texts itself, and makes their mask."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Pooled()

    def forward(self, words: list[Tensor]) -> Tensor:
        ids = nn.utils.rnn.pad_sequence(words, batch_first=True)
        return self.encoder(ids, attention_mask=(ids > 0).long())  # type: ignore[no-any-return]


MADE_INSIDE = (
    "calibration: masked positions count, 35% of those in encoder on the example: its attention_mask is made inside "
    "the model"
)


@pytest.mark.parametrize(("shortest", "said"), [(9, [MADE_INSIDE]), (30, [])])
def test_a_mask_that_is_made_inside_is_named(shortest: int, said: list[str]) -> None:
    words = [torch.ones(length, dtype=torch.long) for length in (30, shortest)]

    with warnings.catch_warnings(record=True, action="always") as lines:
        qsim.simulate(Pipeline().eval(), activations="tensor(int8, static=true)", calibration=[{"words": words}])

    assert [str(line.message) for line in lines] == said


def test_batches_without_padding_stay_as_they_are(model: Any) -> None:
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 5)}

    simulation = qsim.simulate(copy.deepcopy(model), activations="tensor(int8, static=true)", calibration=[batch])

    assert simulation.example is batch


def test_a_list_is_arguments_in_their_order_as_a_loader_gives_them() -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x), 4)

    given = (outcome(nn.Linear(4, 4), batches) for batches in (loader, [(x[:4],), (x[4:],)]))

    assert len({str(scales) for scales in given}) == 1


def test_a_loader_with_labels_is_one_line() -> None:
    loader = DataLoader(TensorDataset(torch.randn(8, 4), torch.ones(8)), 4)

    with pytest.raises(
        qsim.DataError,
        match=r"^a batch has 2 arguments, and Linear takes 1 \(input\); leave the others, such as labels, out$",
    ):
        outcome(nn.Linear(4, 4), loader)  # type: ignore[arg-type]
