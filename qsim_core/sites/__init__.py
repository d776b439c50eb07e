"""Sites: the places in a model where tensors are quantized."""

from qsim_core.moved import names_of_0_1

__getattr__ = names_of_0_1(__name__)
