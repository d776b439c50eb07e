"""Quantized checkpoints: `qsim check` reads one and says what it holds.

from qsim_interop.reading import open_checkpoint
"""
