"""EleutherAI's lm-evaluation-harness as an evaluator: `lm_eval([piqa, arc_easy])`."""

from __future__ import annotations

from qsim_core import Evaluator, hookimpl


@hookimpl
def qsim_evaluators() -> list[type[Evaluator]]:
    from qsim_lm_eval.evaluator import LMEval

    return [LMEval]
