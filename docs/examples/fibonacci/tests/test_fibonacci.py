from qsim_core.testing import QuantizerSuite


class TestFibonacci(QuantizerSuite):
    text = "fibonacci"
