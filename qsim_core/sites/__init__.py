"""Sites: the places in a model where tensors are quantized, and the executor that computes a matmul there."""

from qsim_core.moved import names_of_0_1

__getattr__ = names_of_0_1(__name__)
