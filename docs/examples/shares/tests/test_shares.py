from qsim_core.testing import OperationSuite


class TestShares(OperationSuite):
    text = "shares"
