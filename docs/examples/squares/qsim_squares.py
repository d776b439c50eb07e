from pydantic import Field, PositiveInt

import qsim_core as qsim


class Squares(qsim.Scheme):
    """One scale for each tile of n rows and n columns: a matrix and its transpose have the same scales."""

    name = "squares"
    element: qsim.Format = Field("int8", description="the number format of the scaled values")
    n: PositiveInt = Field(16, description="rows and columns of a tile")

    @property
    def granularity(self):
        return (self.n, self.n)


@qsim.hookimpl
def qsim_quantizers():
    return [Squares]
