from qsim_core.testing import HardwareSuite


class TestMultipliers(HardwareSuite):
    text = "multipliers"
