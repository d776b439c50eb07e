import torch

import qsim_core as qsim


class Fibonacci(qsim.Format):
    """0, 1, 2, 3, 5, 8, 13 and their negatives."""

    name = "fibonacci"

    def table(self):
        values = torch.tensor([0.0, 1, 2, 3, 5, 8, 13])
        return torch.cat([values, -values[1:]])


@qsim.hookimpl
def qsim_quantizers():
    return [Fibonacci]
