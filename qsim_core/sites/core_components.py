"""The components that the core itself offers through the hooks: schemes, calibrators and arithmetics."""

from __future__ import annotations

from qsim_core.components.component import Preset
from qsim_core.formats.quantizer import Quantizer
from qsim_core.hookspecs import hookimpl
from qsim_core.quantizers.calibrators import AbsMax, Calibrator, MinMax
from qsim_core.quantizers.standard_schemes import AtScale, Block, Cast, Channel, Scaled, Tensorwise, Token
from qsim_core.sites.arithmetic import Arithmetic, Auto, Float32


@hookimpl
def qsim_quantizers() -> list[type[Quantizer]]:
    return [Scaled, Tensorwise, Channel, Token, Block, AtScale, Cast]


@hookimpl
def qsim_calibrators() -> list[type[Calibrator]]:
    return [MinMax, AbsMax]


@hookimpl
def qsim_arithmetics() -> list[type[Arithmetic] | Preset]:
    return [Auto, Float32, Preset("fp32", "float32", "float32 by its shorter name")]
