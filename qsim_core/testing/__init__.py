"""Conformance suites for plugin authors, one for each hook; a plugin's test is an empty subclass.

    class TestPowers(QuantizerSuite):
        text = "powers(bits=4)"

`text` is the component, or several of them; the distribution has to be installed (`pip install -e .`), as it is found
through its entry point. What a suite cannot know, such as a checkpoint for an adapter, a subclass gives by overriding
one method. The fixture `both_ways` runs a test with the installed accelerators, and from the reference. This package
needs pytest, and nothing else of qsim imports it.
"""

from __future__ import annotations

from qsim_core.testing.adapter import AdapterSuite
from qsim_core.testing.arithmetic import ArithmeticSuite
from qsim_core.testing.both_ways import both_ways
from qsim_core.testing.calibrator import CalibratorSuite
from qsim_core.testing.evaluator import EvaluatorSuite
from qsim_core.testing.hardware import HardwareSuite
from qsim_core.testing.operation import OperationSuite
from qsim_core.testing.quantizer import QuantizerSuite
from qsim_core.testing.transform import TransformSuite

__all__ = [
    "AdapterSuite",
    "ArithmeticSuite",
    "CalibratorSuite",
    "EvaluatorSuite",
    "HardwareSuite",
    "OperationSuite",
    "QuantizerSuite",
    "TransformSuite",
    "both_ways",
]
