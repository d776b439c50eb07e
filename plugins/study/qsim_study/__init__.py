"""Studies: many recipes on many models, compared with each other.

Each name below is imported when it is first used, so that the command line stays fast.
"""

from qsim_core.lazy import names_of

__getattr__, __all__ = names_of(__name__, __file__)
