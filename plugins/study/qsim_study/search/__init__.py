"""Allot number formats by site under a budget.

    >>> from qsim_study.search import Budget, search
    >>> found = search("opt-tiny", weights=["int2", "int4", "int8"], budget=Budget(bits=4.5))     # doctest: +SKIP
    >>> print(found.recipe)                                                                      # doctest: +SKIP

Each name below is imported when it is first used, so that the command line stays fast.
"""

from qsim_core.lazy import names_of

__getattr__, __all__ = names_of(__name__, __file__)
