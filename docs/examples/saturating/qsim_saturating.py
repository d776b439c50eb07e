import qsim_core as qsim


class Saturating(qsim.Accumulator):
    """Sums of integer codes in 16 bits, one product after the other, which saturate at each addition."""

    name = "saturating"
    integers = True

    def add_up(self, left, right):
        total = 0
        for x, w in zip(left.unbind(-1), right.unbind(-1), strict=True):
            total = (total + x.unsqueeze(-1) * w.unsqueeze(-2)).clamp(-(2**15), 2**15 - 1)
        return total


@qsim.hookimpl
def qsim_arithmetics():
    return [Saturating]
