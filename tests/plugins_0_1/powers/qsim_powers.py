from pydantic import Field

import qsim_core as qsim


class Powers(qsim.Quantizer):
    """Zero and the powers of two up to 1, in codes of `bits` bits, one of them the sign; NaN and Inf become NaN."""

    name = "powers"
    bits: int = Field(4, ge=2, le=8)

    def quantize(self, x):
        mantissa, exponent = x.float().frexp()  # x = mantissa * 2^exponent, 1/2 <= |mantissa| < 1
        nearest = (exponent - (mantissa.abs() < 0.75).int()).clamp(max=0)
        return ((nearest > 1 - 2 ** (self.bits - 1)) * mantissa.sgn().ldexp(nearest) + 0 * x).to(x.dtype)


@qsim.hookimpl
def qsim_quantizers():
    return [Powers]
