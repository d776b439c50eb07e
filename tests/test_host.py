"""The host finds plugins, loads them one by one, and checks each against the contract."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import qsim_core as qsim
from qsim_core.cli.main import main
from qsim_core.cli.recipe_options import compose

Install = Callable[..., None]
PYTHON = sys.executable
"""A Python that has imported nothing."""

GOOD = """
import qsim_core as qsim

class Halves(qsim.Quantizer):
    "Multiples of one half."
    name = "halves"
    def quantize(self, x):
        return (x * 2).round() / 2

@qsim.hookimpl
def qsim_quantizers():
    return [Halves]
"""


@pytest.fixture
def install(quick_processes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """`install("acme", source)`: a distribution qsim-acme 1.2 with one module and one entry point, on the path."""

    def distribution(name: str, source: str = GOOD, dist: str | None = None, module: str | None = None) -> None:
        dist, module = dist or f"qsim-{name}", module or f"plugin_{name}"
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{dist.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[qsim]\n{name} = {module}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)

    monkeypatch.syspath_prepend(str(tmp_path))
    return distribution


def test_a_plugin_is_found_without_being_imported(install: Install) -> None:
    install("acme", "raise RuntimeError('imported')")

    found = qsim.Host().plugins["acme"]

    assert (found.name, found.distribution, found.version) == ("acme", "qsim-acme", "1.2")


def test_an_installed_plugins_component_is_there_by_name(install: Install) -> None:
    install("acme")

    quantizer = qsim.Host().parse("halves")

    assert torch.equal(quantizer(torch.tensor([0.2, 0.3, -1.1])), torch.tensor([0.0, 0.5, -1.0]))


def test_a_plugin_that_is_installed_while_the_program_runs_is_there_by_name(install: Install) -> None:
    with pytest.raises(qsim.SpecError, match="no component 'halves'"):
        qsim.parse("halves")

    install("acme")

    assert str(qsim.parse("halves")) == "halves"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "raise RuntimeError('no licence\\nfound')",
            "plugin 'acme' (qsim-acme 1.2) does not import: RuntimeError: no licence found; "
            "reinstall or upgrade qsim-acme, or uninstall it",
        ),
        (
            "import a_library_nobody_has",
            "plugin 'acme' (qsim-acme 1.2) does not import: ModuleNotFoundError: No module named "
            "'a_library_nobody_has'; reinstall or upgrade qsim-acme, or uninstall it",
        ),
        (
            "import sys; sys.exit(3)",
            "plugin 'acme' (qsim-acme 1.2) does not import: SystemExit: 3; reinstall or upgrade qsim-acme, or "
            "uninstall it",
        ),
        (
            GOOD.replace("qsim_quantizers", "qsim_quantisers"),
            "plugin 'acme' (qsim-acme 1.2) implements an unknown hook 'qsim_quantisers'; did you mean "
            "'qsim_quantizers'? There are: qsim_adapters, qsim_arithmetics, qsim_calibrators, qsim_evaluators, qsim_hardware, "
            "qsim_operations, qsim_quantizers, qsim_transforms",
        ),
        (
            GOOD.replace("@qsim.hookimpl", ""),
            "plugin 'acme' (qsim-acme 1.2): qsim_quantizers lacks its mark; put @qsim_core.hookimpl above it",
        ),
        (
            "answer = 42",
            "plugin 'acme' (qsim-acme 1.2) implements no hook; there are qsim_quantizers, qsim_calibrators, "
            "qsim_transforms, qsim_adapters, qsim_evaluators, qsim_arithmetics, qsim_operations, qsim_hardware",
        ),
        (
            GOOD.replace("return [Halves]", "return 1 / 0"),
            "plugin 'acme' (qsim-acme 1.2): ZeroDivisionError: division by zero; reinstall or upgrade qsim-acme, or "
            "uninstall it",
        ),
        (
            GOOD.replace("return [Halves]", "return Halves"),
            "plugin 'acme' (qsim-acme 1.2): qsim_quantizers returned <class 'plugin_acme.Halves'>; it returns a list "
            "of quantizer classes and presets",
        ),
        (
            GOOD.replace("return [Halves]", "return ['halves']"),
            "plugin 'acme' (qsim-acme 1.2): qsim_quantizers returned 'halves'; it returns a list of quantizer classes "
            "and presets",
        ),
        (
            GOOD.replace("def qsim_quantizers", "def qsim_evaluators"),
            "plugin 'acme' (qsim-acme 1.2): qsim_evaluators returned Halves, which is not a subclass of Evaluator; it returns a "
            "list of evaluator classes and presets",
        ),
        (
            GOOD.replace('name = "halves"', 'name = "one half"'),
            "plugin 'acme' (qsim-acme 1.2): qsim_quantizers returned <class 'plugin_acme.Halves'>: 'one half' is not a "
            "name for a component: use letters, digits and _, but not a constant",
        ),
        (
            GOOD.replace("[Halves]", "[Halves, Halves]"),
            "plugin 'acme' (qsim-acme 1.2) offers 'halves' twice; names are unique within a plugin",
        ),
        (
            GOOD.replace("@qsim.hookimpl", "@qsim.hookimpl(wrapper=True)").replace("return [", "yield [")
            + "\n",
            "plugin 'acme' (qsim-acme 1.2): qsim_quantizers cannot be a wrapper",
        ),
    ],
)  # fmt: skip
def test_a_broken_plugin_is_an_error_for_whoever_needs_it(install: Install, source: str, message: str) -> None:
    install("acme", source)
    host = qsim.Host()

    with pytest.raises(qsim.PluginError) as error:
        host.parse("acme.halves")

    assert str(error.value) == message


def test_two_plugins_of_one_name_are_an_error_when_that_name_is_needed(install: Install) -> None:
    install("acme")
    install("acme", dist="acme-tools", module="plugin_other")
    host = qsim.Host()

    with pytest.raises(qsim.PluginError) as error:
        host.load("acme")

    assert str(error.value) == (
        "plugin 'acme' is claimed by acme-tools 1.2 and qsim-acme 1.2; uninstall all but one of them"
    )
    assert host.parse("int4").bits == 4


def test_two_components_of_one_name_are_no_harm_until_it_is_used(install: Install) -> None:
    install("acme")
    install("other")
    host = qsim.Host()

    assert host.parse("int4").bits == 4
    assert host.parse("acme.halves").name == "halves"
    with pytest.raises(
        qsim.PluginError,
        match=r"^'halves' is offered by plugin 'acme' \(qsim-acme 1.2\) and plugin 'other' \(qsim-other 1.2\); ",
    ):
        host.parse("halves")


def test_an_unknown_name_tells_of_plugins_that_did_not_load(install: Install) -> None:
    install("acme", "import a_library_nobody_has")

    with pytest.raises(
        qsim.SpecError, match=r"\(not searched: plugin 'acme' \(qsim-acme 1.2\) does not import: ModuleNotFoundError: "
    ):
        qsim.Host().parse("halves")


def test_a_component_that_bears_a_broken_plugins_name_is_that_plugins_error(install: Install) -> None:
    install("acme", "import a_library_nobody_has")

    with pytest.raises(qsim.PluginError, match="^plugin 'acme' .qsim-acme 1.2. does not import"):
        qsim.Host().parse("acme(int4)")


def test_a_model_whose_familys_plugin_is_broken_is_that_plugins_error(install: Install, tmp_path: Path) -> None:
    from qsim_core.evaluation.locate import locate

    install("acme", "import a_library_nobody_has")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "acme"}')

    with pytest.raises(qsim.PluginError, match="^plugin 'acme' .qsim-acme 1.2. does not import"):
        locate(str(tmp_path / "model"), qsim.Host())


def test_other_commands_go_on_beside_a_broken_plugin(install: Install) -> None:
    install("acme", "raise RuntimeError('broken')")

    listing = CliRunner().invoke(main, ["components"])
    plugins = CliRunner().invoke(main, ["plugins"])

    assert listing.exit_code == plugins.exit_code == 0
    assert "abfp" in listing.stdout


ENDINGS = {
    "leaves": "import os; os._exit(0)",
    "crashes": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "interrupts": "raise KeyboardInterrupt",
    "raises": GOOD.replace("return [Halves]", "raise type('Odd', (BaseException,), {})('no reason')"),
    "loops": "while True: pass",
    "unreadable": GOOD.replace("[Halves]", "[qsim.Preset('half', None)]"),
}


def test_an_installed_plugin_that_ends_its_process_ends_no_other_run(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qsim_core.components.plugin_process.LIMIT", 2.0)
    for name, source in ENDINGS.items():
        install(name, source)
    host = qsim.Host()

    assert host.parse("int4").name == "int"
    reasons = {name: str(error).partition(": ")[2].partition(";")[0] for name, error in host.check().items()}
    assert reasons == {
        "leaves": "it ends its process, with exit code 0",
        "crashes": "it ends its process, by signal 11",
        "interrupts": "KeyboardInterrupt: ",
        "raises": "Odd: no reason",
        "loops": "it takes more than 2 seconds",
        "unreadable": "qsim_quantizers returned Preset(name='half', text=None, doc='', stands_for_bits=None): the text and "
        "the description of a preset are texts",
    }


@pytest.mark.skipif(sys.platform != "linux", reason="the processes are asked of Linux")
def test_where_a_run_is_killed_its_plugins_end_with_it(install: Install, tmp_path: Path) -> None:
    install("loops", "import os, time\nopen('started', 'w').write(str(os.getpid()))\nwhile True: time.sleep(0.01)")
    run = subprocess.Popen(
        [PYTHON, "-c", "import qsim_core; qsim_core.Host().parse('int4')"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    started = tmp_path / "started"
    while not (started.exists() and started.read_text()):
        time.sleep(0.01)

    run.kill()

    run.wait()
    state = Path("/proc", started.read_text(), "stat")

    def ended() -> bool:
        """Tell if the process has ended; one whose exit code was not asked for yet is a zombie."""
        return not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"

    until = time.monotonic() + 10
    while not ended() and time.monotonic() < until:
        time.sleep(0.01)
    assert ended()


def test_a_plugin_that_nobody_names_is_not_imported_into_the_run(install: Install) -> None:
    install("acme", GOOD + "\nimport torch\ntorch.nn.functional.linear = None")

    assert qsim.Host().parse("abfp(int4)").name == "abfp"

    assert "plugin_acme" not in sys.modules
    assert torch.nn.functional.linear is not None


def test_a_plugin_whose_source_changes_is_looked_at_again(install: Install, tmp_path: Path) -> None:
    install("acme")
    assert "halves" in qsim.Host().offers()
    (tmp_path / "plugin_acme.py").write_text(GOOD.replace('"halves"', '"quarters"'))

    offers = qsim.Host().offers()

    assert "quarters" in offers
    assert "halves" not in offers


def test_a_record_means_the_components_of_the_plugins_that_it_names(install: Install) -> None:
    install("acme")
    install("other")
    host = qsim.Host()

    assert host.plugin_of(host.naming(["other"]).parse("halves")).name == "other"  # type: ignore[union-attr]
    with pytest.raises(qsim.PluginError, match="^no plugin 'gone' is installed"):
        host.naming(["gone"])


MODELS = """
import qsim_core as qsim

class Models(qsim.Adapter):
    "Knows a model by name."
    name = "models_of_acme"
    def models(self):
        return {"opt-tiny": qsim.NamedModel(lambda: None, lambda: None)}
    def load(self, model, dtype):
        raise NotImplementedError

@qsim.hookimpl
def qsim_adapters():
    return [Models]
"""


def test_a_model_that_two_plugins_name_is_an_error_until_one_is_said(install: Install) -> None:
    from qsim_listing.plugins import rivals

    from qsim_core.evaluation.locate import default_model, locate

    install("acme", MODELS)
    host = qsim.Host()

    with pytest.raises(qsim.ModelError, match=r"^'opt-tiny' is named by .*; write acme.opt-tiny or zoo.opt-tiny$"):
        locate("opt-tiny", host)
    assert default_model(host) == locate("zoo.opt-tiny", host).name == "zoo.opt-tiny"
    assert dict(rivals(host)).keys() == {"acme", "zoo"}


class Thirds(qsim.Quantizer):
    """Multiples of one third."""

    name = "thirds"

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 3).round() / 3


def test_an_embedder_registers_inline_objects_on_a_host_of_its_own() -> None:
    mine, other = qsim.Host(), qsim.Host()

    mine.register(Thirds, qsim.Preset("third_of_ints", "abfp(int3)"))

    assert mine.parse("thirds") == Thirds()
    assert mine.parse("third_of_ints").element.bits == 3
    with pytest.raises(qsim.SpecError, match="no component 'thirds'"):
        other.parse("thirds")


def test_an_object_with_hooks_can_be_registered() -> None:
    module = types.ModuleType("mine")

    @qsim.hookimpl
    def qsim_quantizers() -> list[Any]:
        return [Thirds]

    module.qsim_quantizers = qsim_quantizers  # type: ignore[attr-defined]
    host = qsim.Host(discover=False)
    host.register(module, name="mine")

    assert host.parse("mine.thirds") == Thirds()


def test_what_cannot_be_used_is_refused_at_once() -> None:
    host = qsim.Host(discover=False)

    with pytest.raises(qsim.PluginError, match="inline.* offers 'thirds' twice"):
        host.register(Thirds, Thirds)
    with pytest.raises(qsim.PluginError, match="a plugin named 'core' is there already"):
        host.register(Thirds, name="core")
    with pytest.raises(qsim.QsimError, match="is neither a preset nor a subclass of Quantizer, Calibrator"):
        host.register(object())
    host.register(Thirds)
    assert host.parse("thirds") == Thirds()


def test_a_text_default_is_resolved_by_the_host_that_builds_the_component() -> None:
    class Int4(Thirds):
        """An int4 of another plugin."""

        name = "int4"

    host = qsim.Host()
    host.register(Int4)

    with pytest.raises(
        qsim.PluginError,
        match=r"'int4' is offered by plugin 'inline' \(inline 0\) and plugin 'int' \(qsim-int .*\); write inline.int4 or int.int4",
    ):
        host.parse("int4")
    assert host.parse("abfp").element.name == "int"  # an element is a format, and inline's int4 is not a format


def test_a_rival_to_a_name_that_only_a_plugin_wrote_changes_nothing(host: qsim.Host) -> None:
    """The default of abfp is the int4 of its own dependency, also if another plugin offers an int4; so is --precision's."""

    class Other(qsim.Format):
        name = "int4"

        def table(self) -> torch.Tensor:
            return torch.tensor([0.0, 1.0])

    before = host.parse("abfp")
    host = qsim.Host()
    host.register(Other)

    abfp, precise = host.parse("abfp"), compose(host, {}, [], "w4a8").weights

    assert abfp == before
    assert (str(abfp), str(precise)) == ("abfp(int.int4)", "channel(int.int4)")
    assert host.parse(str(abfp)) == abfp
    assert str(host.parse("inline.int4")) == "inline.int4"


def test_installing_a_plugin_imports_nothing_for_help_and_the_list(install: Install, tmp_path: Path) -> None:
    install("acme", "import pathlib; pathlib.Path(__file__).with_name('imported').touch()")
    program = (
        "import sys; from qsim_core.cli.main import main; main(sys.argv[1:], standalone_mode=False); "
        "print('torch' in sys.modules, 'qsim_int' in sys.modules)"
    )
    for command in (["--help"], ["plugins"], ["plugins", "--json"], ["evaluate", "--help"]):
        run = subprocess.run(
            [PYTHON, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {program}", *command],
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.splitlines()[-1] == "False False"
    assert not (tmp_path / "imported").exists()


def test_a_preset_means_the_component_of_its_own_plugin_whatever_its_kind() -> None:
    class Doubled(qsim.Arithmetic):
        """Twice the product."""

        name = "doubled"
        times: int = 2

        def multiply(self, left: Any, right: Any) -> torch.Tensor:
            return self.times * (left.values @ right.values.transpose(-1, -2))

    class Other(qsim.Transform):
        """A method of the same name."""

        name = "doubled"

        def apply(self, model: torch.nn.Module, context: Any) -> None: ...

    host = qsim.Host(discover=False)
    host.register(Other, name="method")

    class Products:
        @staticmethod
        @qsim.hookimpl
        def qsim_arithmetics() -> list[Any]:
            return [Doubled]

        @staticmethod
        @qsim.hookimpl
        def qsim_quantizers() -> list[Any]:
            return [qsim.Preset("trebled", "doubled(3)")]

    host.register(Products(), name="products")

    assert (type(host.parse("trebled")), host.parse("trebled").times) == (Doubled, 3)
