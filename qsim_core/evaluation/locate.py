"""From a model's name to its adapter.

A name is looked for among the models that adapters know by name, then as a directory, or as a file that an adapter
loads. Any other name goes to the fallback adapters, which may ask a hub. A directory that has the name of a known model
is written `./NAME`.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from qsim_core.components.catalogue import Offer
from qsim_core.components.component import Component
from qsim_core.components.discovery import added
from qsim_core.components.host import Host
from qsim_core.errors import ModelError, did_you_mean, file_did_you_mean
from qsim_core.evaluation import configuration
from qsim_core.evaluation.adapter import Adapter, NamedModel, StoredRecipe, TrainedModel
from qsim_core.evaluation.data import Data
from qsim_core.files import place

RECORD = "qsim.json"
"""The file of a model's directory that says what it was trained under."""


@dataclass(frozen=True)
class Located:
    """A model that was found: its adapter, its directory or name, and its data."""

    name: str
    source: str
    adapter: Adapter
    components: tuple[Component, ...]
    """The adapters that had a part in finding it."""
    data: Callable[[], Data] | None = None
    calibration: Callable[[], Data] | None = None
    evaluator: str | None = None
    """Text of the evaluator for these data."""
    trained: TrainedModel | None = None
    """The record of the training, if the model was trained under a recipe."""

    @functools.cached_property
    def stored(self) -> StoredRecipe | None:
        """The recipe that it was trained under, or in which its weights are stored for good; none for most models."""
        return self.trained or self.adapter.stored_quantization(self.source)

    def notes(self, dtype: str, as_stored: bool = True) -> list[str]:
        """Lines for the reader of a result: how the model was loaded, and in which dtype it is computed.

        `as_stored` says that it runs under the recipe that it was trained under or stored in.
        """
        note, stored = self.adapter.note(self.source), self.adapter.stored_dtype(self.source)
        notes = [] if note is None else [note]
        quantized = configuration.quantization(self.adapter.configuration(self.source))
        if self.stored is not None:
            notes += self.stored.lines(self.name, as_stored)
        elif quantized is not None:
            notes.append(
                f"its checkpoint is quantized, as {quantized}: the baseline has these values, and the recipe rounds "
                f"them again; the checkpoint that it was made from has the unrounded ones"
            )
        if dtype == "float32" and stored in ("bfloat16", "float16"):
            notes.append(
                f"its weights are stored in {stored} and computed in float32, which takes twice their memory; "
                f"--dtype {stored} leaves them as they are"
            )
        return notes


def named_models(host: Host) -> dict[str, list[Offer]]:
    """The adapters that know a model by name, for each such name; no adapter is imported."""
    found: dict[str, list[Offer]] = {}
    for offer in _adapters(host):
        for name in offer.models:
            found.setdefault(name, []).append(offer)
    return found


def default_model(host: Host) -> str:
    """The model of a recipe that names none: the one that an installed adapter declares. Raises `ModelError`."""
    named = named_models(host)
    declared = [
        name if len(named[name]) == 1 else f"{offer.plugin}.{name}"
        for offer in host.preferred(_adapters(host))
        for name, is_default in offer.models.items()
        if is_default
    ]
    if len(declared) != 1:
        several = f" ({' and '.join(declared)} are each declared as the default)" if declared else ""
        raise ModelError(f"no model is named, and there is no default model{several}; name one{host.not_looked_at()}")
    return declared[0]


def named_model(name: str, host: Host) -> tuple[str, Adapter, NamedModel] | None:
    """The model that an adapter knows as `name` or `plugin.name`, and its name; None if no adapter does.

    Raises `ModelError` for a name that several plugins have.
    """
    named = named_models(host)
    plugin, _, bare = name.rpartition(".")
    if plugin in host.plugins and bare in named:
        offers = [offer for offer in named[bare] if offer.plugin == plugin]
    else:
        bare, offers = name, host.preferred(named.get(name, []))
    if len(offers) > 1:
        plugins = " and ".join(str(host.plugins[offer.plugin]) for offer in offers)
        raise ModelError(
            f"{name!r} is named by {plugins}; write {' or '.join(f'{offer.plugin}.{name}' for offer in offers)}"
        )
    if not offers:
        return None
    adapter = _made(offers[0], host)
    return (bare if len(named[bare]) == 1 else f"{offers[0].plugin}.{bare}"), adapter, adapter.models()[bare]


def locate(name: str, host: Host) -> Located:
    """Find a model and the adapter of its family. Raises `ModelError`."""
    named = named_models(host)
    if (found := named_model(name, host)) is not None:
        known_as, library, model = found
        directory = str(model.directory())
        adapter = _adapter(directory, name, host)
        return Located(known_as, directory, adapter, (adapter, library), model.data, model.calibration, model.evaluator)
    if not name.strip():
        raise ModelError(f"an empty name is not a model{did_you_mean(name, named)}")
    path = _path(place(name), host)
    if not path.is_dir() and not _loading(path, host):
        _check_name(name, path, named, host)
        adapter = _adapter(name, name, host)
        return Located(name, name, adapter, (adapter,))
    source = str(path.resolve())  # a record must mean the same from any directory
    trained = _trained(path)
    adapter = _adapter(source, name, host)
    return Located(source, source, adapter, (adapter,)) if trained is None else _as(trained, source, adapter, host)


def _trained(directory: Path) -> TrainedModel | None:
    """The record of the training in a directory; None if there is none. Raises `QsimError` if it cannot be read."""
    record = directory / RECORD
    if not record.is_file():
        return None
    found: TrainedModel = added("trained_model", f"reads {record}, the record of a training")(directory)
    return found


def _as(trained: TrainedModel, source: str, adapter: Adapter, host: Host) -> Located:
    """A trained model, with the data of the model that it was made from if that is still there."""
    try:
        base = locate(trained.base, host)
    except ModelError:
        return Located(source, source, adapter, (adapter,), evaluator=trained.evaluator, trained=trained)
    return Located(
        source, source, adapter, (adapter, *base.components), base.data, base.calibration, trained.evaluator, trained
    )


def _path(path: Path, host: Host) -> Path:
    """A path; for a directory without configuration the one file in it that an adapter loads. Raises `ModelError`."""
    if not path.is_dir() or any((path / name).is_file() for name in configuration.FILES):
        return path
    files = sorted(file for file in path.iterdir() if _loading(file, host))
    if len(files) > 1:
        raise ModelError(f"{path} holds {len(files)} models, {files[0].name} and {files[1].name} among them; name one")
    return files[0] if files else path


def _loading(path: Path, host: Host) -> list[Offer]:
    """The adapters that load a file; none for a directory."""
    return [offer for offer in _adapters(host) if path.suffix in offer.endings] if path.is_file() else []


def _check_name(name: str, path: Path, named: Iterable[str], host: Host) -> None:
    """Raise `ModelError` for a name that can only be a mistake: an adapter that asks a hub would answer late."""
    if path.is_file():
        raise ModelError(f"{name} is a file; a model is a directory that save_pretrained wrote")
    if name.startswith((".", "/", "~")) or path.suffix in {".safetensors", ".bin", ".json"}:
        raise ModelError(f"there is no directory {name}{file_did_you_mean(path)}")
    if "/" not in name and difflib.get_close_matches(name, named):
        raise ModelError(f"no model {name!r}{did_you_mean(name, named)}{host.not_looked_at()}")


def _adapters(host: Host) -> list[Offer]:
    """Every adapter of an installed plugin."""
    return [offer for found in host.offers(Adapter).values() for offer in found]


def _made(offer: Offer, host: Host) -> Adapter:
    """Import an adapter and make it, with its default options. Raises `PluginError`."""
    return host.parse(f"{offer.plugin}.{offer.name}", Adapter)  # type: ignore[no-any-return]


def _adapter(source: str, name: str, host: Host) -> Adapter:
    """The one adapter that bears the family's name, or has it among its `families`; else a fallback adapter."""
    of_file = _loading(Path(source), host)
    family = Path(source).suffix if of_file else _stored_as(source, host) or _family(source, name, host)
    of_family = family.replace("-", "_")
    offers = _adapters(host)
    fitting = of_file or [offer for offer in offers if of_family == offer.name or family in offer.families]
    fitting = host.preferred(fitting)
    if len(fitting) > 1:
        plugins = " and ".join(str(host.plugins[offer.plugin]) for offer in fitting)
        raise ModelError(f"{name} is a {family!r} model, which {plugins} load; uninstall all but one of them")
    if fitting:
        return _made(fitting[0], host)
    if (failure := host.check().get(of_family)) is not None:
        raise failure
    return _fallback(source, name, family, host)


def _fallbacks(host: Host) -> list[Adapter]:
    """The fallback adapters; no other adapter is imported."""
    return [_made(offer, host) for offer in _adapters(host) if offer.fallback]


def _stored_as(source: str, host: Host) -> str | None:
    """The method by which a directory's weights were quantized, if an adapter takes such weights as final."""
    directory = Path(source)
    method = configuration.quantization_method(configuration.read_directory(directory)) if directory.is_dir() else None
    return method if any(method in offer.families for offer in _adapters(host)) else None


def _family(source: str, name: str, host: Host) -> str:
    """The family that a directory's configuration names, or that a fallback adapter finds. Raises `ModelError`."""
    directory, refused = Path(source), None
    found = configuration.family(configuration.read_directory(directory)) if directory.is_dir() else None
    for adapter in _fallbacks(host) if found is None else []:
        try:
            found = found or adapter.family(source)
        except ModelError as error:
            refused = refused or error
    if found is not None:
        return found
    if refused is not None:
        raise refused
    if directory.is_dir():
        raise ModelError(f"{source}/config.json names no model_type")
    raise ModelError(
        f"no model {name!r}: it is neither a directory nor a model that a plugin names, and no installed adapter looks "
        f"elsewhere{host.not_looked_at()}"
    )


def _fallback(source: str, name: str, family: str, host: Host) -> Adapter:
    """The one fallback adapter that recognizes a model. Raises `ModelError` if there is none, or more than one."""
    recognizing, reasons = [], []
    for adapter in _fallbacks(host):
        try:
            if adapter.recognizes(source):
                recognizing.append(adapter)
        except ModelError as error:
            reasons.append(str(error))
    if len(recognizing) > 1:
        plugins = " and ".join(str(host.plugin_of(adapter)) for adapter in recognizing)
        raise ModelError(f"{name} is a {family!r} model, which {plugins} load; uninstall all but one of them")
    if recognizing:
        return recognizing[0]
    why = f": {'; '.join(reasons)}" if reasons else ""
    known = ", ".join(offer.name for offer in _adapters(host) if not offer.fallback) or "none"
    raise ModelError(
        f"{name} is a {family!r} model, no adapter of that name is installed (there are: {known}), and it cannot be "
        f"loaded without one{why}; from Python, qsim_core.simulate takes any model"
    )
