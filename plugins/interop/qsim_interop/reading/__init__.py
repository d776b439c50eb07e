"""Read quantized checkpoints: codes, scales, zero points, and the recipe that they stand for.

    >>> from qsim_interop.reading import open_checkpoint
    >>> checkpoint = open_checkpoint("DIR")                                       # doctest: +SKIP
    >>> weight = checkpoint.read(checkpoint.layers[0]).dequantize()               # doctest: +SKIP

Each name below is imported when it is first used, so that the command line stays fast.
"""

from qsim_core.lazy import names_of

__getattr__, __all__ = names_of(__name__, __file__)
