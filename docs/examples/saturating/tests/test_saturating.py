from qsim_core.testing import ArithmeticSuite


class TestSaturating(ArithmeticSuite):
    text = "saturating"
