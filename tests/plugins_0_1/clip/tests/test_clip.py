from qsim_core.testing import TransformSuite


class TestClip(TransformSuite):
    text = "clip"
