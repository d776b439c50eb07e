"""Models of transformers and diffusers, from a directory or the hub.

Plugins of families import `qsim_transformers.pretrained`. As a plugin of its own the package offers the adapter
`generic`, for families of transformers that no other adapter names. `QsimConfig` quantizes a model in transformers' own
`from_pretrained`, and `save_pretrained` writes a simulation as that reads it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qsim_core import hookimpl

if TYPE_CHECKING:
    from qsim_core import Adapter
    from qsim_transformers.quantization import QsimConfig as QsimConfig
    from qsim_transformers.quantization import save_pretrained as save_pretrained

__all__ = ["QsimConfig", "save_pretrained"]


@hookimpl
def qsim_adapters() -> list[type[Adapter]]:
    from qsim_transformers.generic import Generic

    return [Generic]


def __getattr__(name: str) -> Any:
    """Import `QsimConfig` and `save_pretrained` when they are first used, so that the command line stays fast."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qsim_transformers import quantization

    return getattr(quantization, name)
