"""Weights in safetensors files, rounded to a number format: `qsim quantize`.

from qsim_tensorfile.rounding import quantize_file
"""
