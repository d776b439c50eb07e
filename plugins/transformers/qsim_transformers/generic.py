"""The adapter for families of transformers that no other adapter names."""

from __future__ import annotations

from typing import ClassVar

from qsim_core import ModelError
from qsim_transformers.configuration import architecture, family
from qsim_transformers.pretrained import Pretrained


class Generic(Pretrained):
    """Loads the class that a checkpoint names, of any family of transformers. No site is left alone by default."""

    name = "generic"
    fallback: ClassVar[bool] = True

    def family(self, source: str) -> str:
        """The `model_type` of a model of transformers, or "diffusers". Raises `ModelError`."""
        return family(source)

    def recognizes(self, source: str) -> bool:
        """True if transformers has the class that the checkpoint names. Raises `ModelError` with the reason if not."""
        try:
            self.model_class(source)
        except ImportError as error:
            raise ModelError(str(error)) from None
        return True

    def note(self, source: str) -> str:
        """A line that names the family and the class that was loaded."""
        return (
            f"no adapter for {family(source)!r} models is installed: loaded as {architecture(source)}, and no site is "
            f"left alone unless --skip says so"
        )
