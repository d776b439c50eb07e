from qsim_core.testing import QuantizerSuite


class TestPowers(QuantizerSuite):
    text = "powers"
