"""Evaluation: adapters, evaluators, and the result of a run."""

from qsim_core.moved import names_of_0_1

__getattr__ = names_of_0_1(__name__)
