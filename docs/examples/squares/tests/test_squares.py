from qsim_core.testing import QuantizerSuite


class TestSquares(QuantizerSuite):
    text = "squares"
    shapes = ((6, 40), (3, 5, 33), (2, 2, 3, 8))  # a tile has rows and columns
