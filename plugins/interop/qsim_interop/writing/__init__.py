"""Simulated models as files that other programs run: `export(simulation, loaded, "gguf", directory)`."""

from qsim_interop.writing.export import export as export
from qsim_interop.writing.export import formats as formats
