from qsim_core.testing import EvaluatorSuite


class TestAgreement(EvaluatorSuite):
    text = "agreement"
