"""Models of transformers and diffusers, from a directory or the hub.

Plugins of families import `qsim_transformers.pretrained`. As a plugin of its own the package offers the adapter
`generic`, for families of transformers that no other adapter names. `QsimConfig` quantizes a model in transformers' own
`from_pretrained`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qsim_core import hookimpl

if TYPE_CHECKING:
    from qsim_core import Adapter
    from qsim_transformers.quantization import QsimConfig as QsimConfig

__all__ = ["QsimConfig"]


@hookimpl
def qsim_adapters() -> list[type[Adapter]]:
    from qsim_transformers.generic import Generic

    return [Generic]


def __getattr__(name: str) -> Any:
    """Import `QsimConfig` when it is first used, so that the command line stays fast."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qsim_transformers import quantization

    return getattr(quantization, name)
