from qsim_core.testing import CalibratorSuite


class TestDeviations(CalibratorSuite):
    text = "deviations"
