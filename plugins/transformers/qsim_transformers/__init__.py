"""Models of transformers and diffusers, from a directory or the hub.

Plugins of families import `qsim_transformers.pretrained`. As a plugin of its own the package offers the adapter
`generic`, for families of transformers that no other adapter names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qsim_core import hookimpl

if TYPE_CHECKING:
    from qsim_core import Adapter


@hookimpl
def qsim_adapters() -> list[type[Adapter]]:
    from qsim_transformers.generic import Generic

    return [Generic]
