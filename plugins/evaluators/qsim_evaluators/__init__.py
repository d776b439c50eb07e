"""Evaluators: they compute metrics from a model and data, and describe their protocol in words."""

from __future__ import annotations

from qsim_core import Evaluator, hookimpl


@hookimpl
def qsim_evaluators() -> list[type[Evaluator]]:
    from qsim_evaluators.accuracy import Accuracy
    from qsim_evaluators.clip_score import ClipScore
    from qsim_evaluators.denoising import Denoising
    from qsim_evaluators.fidelity import Fidelity
    from qsim_evaluators.frechet import Frechet
    from qsim_evaluators.masked_lm import MaskedLM
    from qsim_evaluators.pass_at_k import PassAtK
    from qsim_evaluators.perplexity import Perplexity
    from qsim_evaluators.question_answering import QuestionAnswering
    from qsim_evaluators.retrieval import Retrieval

    return [
        Accuracy,
        ClipScore,
        Denoising,
        Fidelity,
        Frechet,
        MaskedLM,
        PassAtK,
        Perplexity,
        QuestionAnswering,
        Retrieval,
    ]
