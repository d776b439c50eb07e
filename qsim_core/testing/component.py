"""Tests for the components of every hook: found, written, read back, checked, copied."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from qsim_core.components.component import Component, options_of
from qsim_core.components.host import installed
from qsim_core.components.syntax import read
from qsim_core.errors import QsimError, SpecError

CLONES: dict[str, Callable[[Any], Any]] = {
    "copied": copy.deepcopy,
    "pickled": lambda thing: pickle.loads(pickle.dumps(thing)),
}


class ComponentSuite:
    """The base of the suites: tests of one component after another, each found by its text."""

    base: ClassVar[type[Component]]
    """The class that its hook asks for."""
    text: ClassVar[str | Sequence[str]] = ()
    """The component under test, or several of them."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Each test that takes `component` runs for each text."""
        texts = [self.text] if isinstance(self.text, str) else list(self.text)
        if not texts:
            pytest.fail(f'{type(self).__name__} has to say what it tests, like text = "name"', pytrace=False)
        if "component" in metafunc.fixturenames:
            metafunc.parametrize("component", texts, indirect=True)

    @pytest.fixture
    def component(self, request: pytest.FixtureRequest) -> Any:
        """The component that the text means to a host of the installed plugins."""
        try:
            return installed().parse(request.param, self.base)
        except QsimError as error:
            pytest.fail(
                f"{request.param} is not found: {error}. Is the distribution installed (pip install -e .), with an "
                f'entry point in group "qsim" whose module has the hook of a {self.base.kind}?',
                pytrace=False,
            )

    def test_it_is_found_through_an_entry_point(self, component: Any) -> None:
        host, name = installed(), read(str(component)).name or ""
        plugin, _, bare = name.rpartition(".")
        offering = {offer.plugin for offer in host.offers(self.base).get(bare, ()) if plugin in ("", offer.plugin)}
        entries = {where for where in offering if where == "core" or host.plugins[where].entry is not None}

        assert entries, f'{component} was registered by hand; its plugin needs an entry point in group "qsim"'

    def test_its_text_reads_back(self, component: Any) -> None:
        again = installed().parse(str(component), self.base)

        assert again == component, f"{component} reads back as {again!r}, which is not equal to {component!r}"
        assert str(again) == str(component), f"{component} reads back and is written as {again}"
        assert hash(again) == hash(component), f"two {component} that are equal have different hashes"

    def test_its_options_are_checked(self, component: Component) -> None:
        """A nonsensical value is refused by the text form, in one line that names the option."""
        name = _full_name(component, self.base)
        for option in options_of(type(component)):
            error = _error(installed().parse, f"{name}({option}=[[[true]]])", self.base)
            assert isinstance(error, SpecError), (
                f"{component.name} takes {option}=[[[true]]]{_instead(error)}; give the option a type that refuses it"
            )
            assert "\n" not in str(error), f"{component.name} refuses a wrong {option} in more than one line: {error}"

    def test_an_option_that_it_has_not_is_refused(self, component: Any) -> None:
        name = _full_name(component, self.base)
        error = _error(installed().parse, f"{name}(no_such_option=1)", self.base)

        assert isinstance(error, SpecError), f"{component.name} takes no_such_option=1{_instead(error)}"

    def test_it_holds_options_and_no_tensors(self, component: Component) -> None:
        held = [option for option in options_of(type(component)) if isinstance(getattr(component, option), Tensor)]

        assert held == [], f"{component} holds a tensor in {held[0]}; what is found in data lives at the site"

    def test_it_cannot_be_changed(self, component: Component) -> None:
        for option in options_of(type(component)):
            error = _error(setattr, component, option, getattr(component, option))
            assert error is not None, f"{component}.{option} can be assigned to; components are frozen"

    def test_it_says_what_it_is(self, component: Any) -> None:
        assert type(component).__doc__, f"{type(component).__name__} has no docstring; `qsim components` shows it"

    @pytest.mark.parametrize("clone", CLONES)
    def test_a_copy_is_equal(self, component: Any, clone: str) -> None:
        other = CLONES[clone](component)

        assert other == component and str(other) == str(component), f"{component}, {clone}, is {other!r}"


@contextmanager
def global_randomness_untouched(component: Any, does: str) -> Iterator[None]:
    """Fail if what runs inside draws from torch's global generator, or depends on its seed by seeding it."""
    before = torch.random.get_rng_state()
    yield
    untouched = torch.equal(torch.random.get_rng_state(), before)
    torch.random.set_rng_state(before)
    assert untouched, f"{component} {does} with torch's global random numbers; use a torch.Generator with a seed"


def one_line(component: Any, act: Callable[[], Any], what: str) -> None:
    """Fail unless an act works or ends in a `QsimError` of one line."""
    error = _error(act)

    assert error is None or isinstance(error, QsimError), (
        f"{component} ends in {type(error).__name__} {what}: {error}; raise a qsim_core.QsimError that says what to do"
    )
    assert error is None or "\n" not in str(error), f"{component} says in more than one line {what}: {error}"


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def identical(x: Tensor, y: Tensor) -> bool:
    """Tell if two tensors have one shape, one dtype and equal values; NaN equals NaN."""
    return x.shape == y.shape and x.dtype == y.dtype and bool(((x == y) | (x.isnan() & y.isnan())).all())


def _full_name(component: Any, base: type[Component]) -> str:
    """The class's name with its plugin's, so that presets and rivals do not matter."""
    for where, offered in installed().components(base).get(component.name, ()):
        if offered is type(component):
            return f"{where}.{component.name}"
    raise AssertionError(f"{component}: its class {type(component).__name__} is not offered by any plugin")


def _error(act: Callable[..., Any], *arguments: Any) -> Exception | None:
    """The error that an act raises."""
    try:
        act(*arguments)
    except Exception as error:
        return error
    return None


def _instead(error: Exception | None) -> str:
    return "" if error is None else f" with {type(error).__name__} ({error}) instead of a SpecError"
