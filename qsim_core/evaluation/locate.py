"""From a model's name to its adapter.

A name is looked for among the models that adapters know (the zoo's), then as a directory, then on the hub. So a
directory that happens to be called like a model of the zoo is `./opt-tiny`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsim_core.components.component import Component
from qsim_core.components.host import Host
from qsim_core.errors import ModelError, did_you_mean, file_did_you_mean
from qsim_core.evaluation.adapter import Adapter, NamedModel
from qsim_core.evaluation.data import Data
from qsim_core.evaluation.trained import Trained
from qsim_core.transformers.configuration import family, stored_dtype
from qsim_core.transformers.pretrained import Generic


@dataclass(frozen=True)
class Located:
    """A model that was found: what loads it, from where, and the data that goes with it."""

    name: str
    source: str
    adapter: Adapter
    components: tuple[Component, ...]
    """The adapters that had a part in finding it."""
    data: Callable[[], Data] | None = None
    calibration: Callable[[], Data] | None = None
    evaluator: str | None = None
    """Text of the evaluator that goes with these data."""
    trained: Trained | None = None
    """What it says about the training that it comes from, if it comes from one of qsim's."""

    def notes(self, dtype: str) -> list[str]:
        """What a reader must know about how it was found, and is computed."""
        notes = [self.adapter.note(self.source)] if isinstance(self.adapter, Generic) else []
        stored = stored_dtype(self.source)
        if dtype == "float32" and stored in ("bfloat16", "float16"):
            notes.append(
                f"its weights are stored in {stored} and computed in float32, which takes twice their memory; "
                f"--dtype {stored} leaves them as they are"
            )
        return notes


def named_models(host: Host) -> dict[str, tuple[Adapter, NamedModel]]:
    """Every model that an installed adapter knows by name."""
    adapters = [offered for found in host.components(Adapter).values() for _, offered in found]
    made = [adapter() for adapter in adapters if isinstance(adapter, type)]
    return {name: (a, model) for a in made if isinstance(a, Adapter) for name, model in a.models().items()}


def locate(name: str, host: Host) -> Located:
    """Find a model and the adapter of its family. Raises `ModelError`."""
    named = named_models(host)
    if name in named:
        library, model = named[name]
        directory = str(model.directory())
        adapter = _adapter(directory, name, host)
        return Located(name, directory, adapter, (adapter, library), model.data, model.calibration, model.evaluator)
    if not name.strip():
        raise ModelError(f"an empty name is no model{did_you_mean(name, named)}")
    path = Path(name).expanduser()
    if path.is_file():
        raise ModelError(f"{name} is a file; a model is a directory that save_pretrained wrote")
    if not path.is_dir() and (name.startswith((".", "/", "~")) or path.suffix in {".safetensors", ".bin", ".json"}):
        raise ModelError(f"there is no directory {name}{file_did_you_mean(path)}")
    if not path.is_dir():
        _check_it_may_be_on_the_hub(name, named, host)
    source = str(path.resolve()) if path.is_dir() else name  # a record must mean the same from any directory
    adapter = _adapter(source, name, host)
    trained = Trained.of(path) if path.is_dir() else None
    return Located(source, source, adapter, (adapter,)) if trained is None else _as(trained, source, adapter, host)


def _as(trained: Trained, source: str, adapter: Adapter, host: Host) -> Located:
    """A trained model, with the data that go with the one that it was made from, if that is still there."""
    try:
        base = locate(trained.base, host)
    except ModelError:
        return Located(source, source, adapter, (adapter,), evaluator=trained.evaluator, trained=trained)
    return Located(
        source, source, adapter, (adapter, *base.components), base.data, base.calibration, trained.evaluator, trained
    )


def _check_it_may_be_on_the_hub(name: str, named: dict[str, Any], host: Host) -> None:
    """A name that nearly is one of the zoo's is a slip: the hub, which answers late if at all, need not be asked."""
    if "/" not in name and (difflib.get_close_matches(name, named)):
        raise ModelError(f"no model {name!r}{did_you_mean(name, named)}{host.not_looked_at()}")


def _adapter(source: str, name: str, host: Host) -> Adapter:
    """The one adapter that bears the family's name, or names it among its `families`; else the generic one."""
    of = family(source)
    offers = [(plugin, offered) for found in host.components(Adapter).values() for plugin, offered in found]
    fitting = [(p, o) for p, o in offers if of.replace("-", "_") == o.name or of in getattr(o, "families", ())]
    if len(fitting) > 1:
        plugins = " and ".join(str(host.plugins[plugin]) for plugin, _ in fitting)
        raise ModelError(f"{name} is a {of!r} model, which {plugins} load; uninstall all but one of them")
    if fitting:
        ((plugin, offered),) = fitting
        return host.parse(f"{plugin}.{offered.name}", Adapter)  # type: ignore[no-any-return]
    if (failure := host.check().get(of.replace("-", "_"))) is not None:
        raise failure
    try:
        Generic().model_class(source)
    except (ModelError, ImportError) as error:
        known = ", ".join(host.components(Adapter)) or "none"
        raise ModelError(
            f"{name} is a {of!r} model, no adapter of that name is installed (there are: {known}), and it cannot be "
            f"loaded without one: {error}; from Python, qsim_core.simulate takes any model"
        ) from None
    return Generic()
