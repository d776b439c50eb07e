import qsim_core as qsim


class Shares(qsim.Operation):
    """A softmax whose exponentials and whose results are whole multiples of 1/255."""

    name = "shares"
    computes = frozenset({"softmax"})

    def compute(self, call):
        x, axis = call.input.float(), call.arguments["dim"]
        exponentials = ((x - x.amax(axis, keepdim=True)).exp() * 255).round()
        return (exponentials * 255 / exponentials.sum(axis, keepdim=True)).round() / 255


@qsim.hookimpl
def qsim_operations():
    return [Shares]
