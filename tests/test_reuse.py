"""If only formats change, baselines and statistics come from an earlier run, to the last digit."""

from __future__ import annotations

import logging
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from qsim_cache.baselines import cached_baseline
from qsim_cache.entry import CacheEntry
from qsim_cache.fingerprint import Unknowable, of_code, sha256
from qsim_cache.made_from import of_components, of_model
from torch import nn

import qsim_core as qsim
from qsim_core import Metrics, Run
from qsim_core.files import kept

Evaluate = Callable[..., qsim.Result]
TEXT = str(Path(__file__).parent.parent / "README.md")


@pytest.fixture
def evaluate(small: Path) -> Evaluate:
    """`evaluate(work_dir, weights)`: the result of a small model on a text."""

    def evaluated(work_dir: Path | None, weights: str = "int4", **run: Any) -> qsim.Result:
        dtype = run.pop("dtype", "float32")
        recipe = qsim.Recipe.of({"model": str(small), "weights": weights, "evaluate": "perplexity(seqlen=32)"})
        return qsim.evaluate(recipe, data=TEXT, dtype=dtype, run=Run(**({"limit": 3} | run), work_dir=work_dir))

    return evaluated


def numbers(result: qsim.Result) -> dict[str, Any]:
    return result.model_dump(exclude={"seconds", "cached"})


def test_with_another_format_the_baseline_is_taken_and_nothing_else_changes(evaluate: Evaluate, tmp_path: Path) -> None:
    first, second = evaluate(tmp_path, "int4"), evaluate(tmp_path, "int6")

    assert (first.cached, second.cached) == ([], ["baseline"])
    assert first.baseline == second.baseline
    assert numbers(second) == numbers(evaluate(None, "int6"))


def test_what_decides_the_baseline_has_one_of_its_own(evaluate: Evaluate, tmp_path: Path) -> None:
    runs: list[dict[str, Any]] = [{}, {"limit": 2}, {"batch_size": 1}, {"seed": 1}, {"dtype": "bfloat16"}]

    assert [evaluate(tmp_path, **run).cached for run in runs] == [[]] * 5
    assert len(list(tmp_path.glob("baseline/*.kept"))) == 5


def test_a_damaged_baseline_is_computed_again(evaluate: Evaluate, tmp_path: Path) -> None:
    whole = evaluate(tmp_path)
    (file,) = tmp_path.glob("baseline/*.kept")
    content = file.read_bytes()
    for damaged in (content[:-100], content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], b"", b"[]\n"):
        file.write_bytes(damaged)
        assert kept(file) is None

    again = evaluate(tmp_path)

    assert (again.cached, numbers(again)) == ([], numbers(whole))
    assert file.read_bytes() == content


def test_two_runs_at_once_share_a_work_directory(small: Path, tmp_path: Path) -> None:
    command = [
        *forked.python(),
        "-m",
        "qsim_core",
        "evaluate",
        str(small),
        "--data",
        TEXT,
        "--limit",
        "1",
        "--set",
        "perplexity.seqlen=32",
        "--quiet",
        "--work-dir",
        "work",
    ]
    runs = [
        subprocess.Popen([*command, "--weights", format, "--json", f"{format}.json"], cwd=tmp_path)
        for format in ("int4", "int8")
    ]

    assert [run.wait() for run in runs] == [0, 0]
    one, other = (qsim.Result.read(tmp_path / f"{format}.json") for format in ("int4", "int8"))
    assert one.baseline == other.baseline
    assert len(list(tmp_path.glob("work/baseline/*"))) == 1


WRITER = """
import sys
from pathlib import Path
from qsim_core.files import keep
for count in range(200):
    keep(Path(sys.argv[1]), sys.argv[2] * (1 + count))
"""


def test_what_others_are_writing_is_read_whole(tmp_path: Path) -> None:
    path, read = tmp_path / "entry.kept", set()
    writers = [subprocess.Popen([*forked.python(), "-c", WRITER, str(path), letter]) for letter in "ab"]

    while any(writer.poll() is None for writer in writers):
        content = kept(path)
        assert content is not None or not read, "an entry that was there is never missing"
        read |= set() if content is None else {content}

    assert [writer.wait() for writer in writers] == [0, 0]
    assert {len(set(content)) for content in read} == {1}, "nothing is a mixture"
    assert list(tmp_path.rglob("*")) == [path]


@pytest.mark.parametrize(
    ("metrics", "times"),
    [
        ({"score": 0.1}, 1),
        (Metrics({"score": torch.tensor([0.1, 0.7])}, in_order=True), 1),
        (Metrics({"score": torch.tensor([0.1, 0.7])}, outputs="what the simulated run is compared with"), 2),
    ],
)
def test_metrics_are_kept_unless_the_simulated_run_needs_more(
    metrics: dict[str, float], times: int, tmp_path: Path
) -> None:
    ran = []
    for _ in range(2):
        found, _ = cached_baseline(CacheEntry(tmp_path, "baseline", ["key"]), lambda: ran.append(1) or metrics)

    assert (len(ran), dict(found)) == (times, dict(metrics))
    if isinstance(metrics, Metrics):
        assert (found.size, found.in_order) == (2, metrics.in_order)
        assert torch.equal(found.left_out()["score"], metrics.left_out()["score"])


def test_where_nothing_can_be_kept_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "baseline").write_text("no directory")

    with caplog.at_level(logging.WARNING):
        CacheEntry(tmp_path, "baseline", ["key"]).put("content")

    assert caplog.messages[0].startswith("nothing is kept for later runs: [Errno 17] File exists")


def test_a_work_directory_that_cannot_be_one_is_told_at_once(evaluate: Evaluate, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(qsim.QsimError, match=r"^cannot use .*file as work directory: File exists$"):
        evaluate(tmp_path / "file")


class Counted(nn.Sequential):
    """A model that counts its forwards."""

    forwards = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).forwards += 1
        result: torch.Tensor = super().forward(x)
        return result


class Doubled(qsim.Transform):
    """A transform that changes a weight."""

    name = "doubled"

    def apply(self, model: nn.Module, context: qsim.Context) -> None:
        model.get_parameter("0.weight").mul_(2)
        context.report("0")


def static(work_dir: Path | None, scheme: str, seed: int = 0, width: float = 1.0, **more: Any) -> qsim.Simulation:
    torch.manual_seed(0)
    model = Counted(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model[0].weight.data[0, 0] = width
    torch.manual_seed(seed)
    batches = [torch.randn(16, 8) for _ in range(4)]
    run = Run(work_dir=work_dir)
    return qsim.simulate(model, activations=f"{scheme}, static=true)", calibration=batches, run=run, **more)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("tensor(int8, range=mse", "tensor(int4, range=mse"),
        ("tensor(int8, range=mse", "tensor(e4m3, range=percentile(99)"),
        ("tensor(int8", "tensor(int3, symmetric=false, range=absmax"),
        ("scaled(int8, 3", "scaled(int4, 3, scale=bf16"),
    ],
)
def test_statistics_serve_another_format_and_calibrator(first: str, second: str, tmp_path: Path) -> None:
    static(tmp_path, first)
    Counted.forwards = 0

    again = static(tmp_path, second)

    assert (again.cached, Counted.forwards) == (["statistics"], 1), "the example alone went through the model"
    fresh, x = static(None, second), torch.randn(5, 8)
    assert torch.equal(again.model(x), fresh.model(x))
    assert again.warnings == fresh.warnings


@pytest.mark.parametrize(
    ("scheme", "changed"),
    [
        ("tensor(int8, range=mse", {"seed": 1}),
        ("tensor(int8, range=mse", {"width": 1.0001}),
        ("tensor(int8, range=mse", {"skip": ["2"]}),
        ("tensor(int8, range=mse", {"outputs": "tensor(int8, static=true)"}),
        ("tensor(int8, range=mse", {"transforms": [Doubled()]}),
        ("tensor(int8, range=minmax", {}),
        ("tensor(int8, range=moving_average(0.5)", {}),
        ("scaled(int8, 4, range=mse", {}),
    ],
)
@pytest.mark.filterwarnings("ignore::qsim_core.errors.CalibrationWarning")
def test_other_statistics_are_gathered_anew(scheme: str, changed: dict[str, Any], tmp_path: Path) -> None:
    static(tmp_path, "tensor(int8, range=mse")
    if "moving" in scheme:
        static(tmp_path, "tensor(int8, range=moving_average(0.9)")

    assert static(tmp_path, scheme, **changed).cached == []


def test_statistics_that_lie_damaged_are_gathered_again(tmp_path: Path) -> None:
    static(tmp_path, "tensor(int8")
    (file,) = tmp_path.glob("statistics/*.kept")
    file.write_bytes(file.read_bytes()[:-1])

    assert static(tmp_path, "tensor(int4").cached == []
    assert static(tmp_path, "tensor(int4").cached == ["statistics"]


class Squares(nn.Module):
    """A model with a product and without parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ x.mT


def test_statistics_of_a_model_without_parameters_serve_too(tmp_path: Path) -> None:
    runs = [
        qsim.simulate(
            Squares(),
            activations=f"tensor({format}, static=true)",
            calibration=[torch.eye(3)],
            run=Run(work_dir=tmp_path),
        )
        for format in ("int8", "int4")
    ]

    assert [run.cached for run in runs] == [[], ["statistics"]]


def test_a_fingerprint_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    alive = []

    def tensors() -> Iterator[torch.Tensor]:
        for _ in range(4):
            alive.append(sum(tensor() is not None for tensor in made))
            tensor = torch.ones(4)
            made.append(weakref.ref(tensor))
            yield tensor

    CacheEntry(tmp_path, "baseline", tensors())

    assert max(alive) == 1


def test_a_model_is_its_tensors_and_what_its_modules_say() -> None:
    def digest(epsilon: float = 1e-5, bias: float = 0.0, activation: type[nn.Module] = nn.ReLU, **settings: Any) -> str:
        model = nn.Sequential(nn.LayerNorm(4, eps=epsilon), activation())
        model[0].bias.data[3] = bias
        vars(model).update(settings)
        return sha256(of_model(model))

    modules = [digest(), digest(epsilon=1e-6), digest(bias=1e-30), digest(activation=nn.GELU)]
    settings = [digest(scale=0.5), digest(scale=2.0), digest(act=torch.relu), digest(act=torch.tanh), digest(steps=[1])]

    assert digest(scale=0.5, seen=object()) == digest(scale=0.5)
    assert len({*modules, *settings}) == 9


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with a class, in a directory of its own."""
    (tmp_path / "written_today").mkdir()
    (tmp_path / "written_today" / "__init__.py").write_text("class Mine: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "written_today"
    sys.modules.pop("written_today", None)


def test_code_that_was_edited_is_other_code(package: Path) -> None:
    import written_today  # type: ignore[import-not-found]

    before = sha256(of_code(written_today.Mine))
    (package / "more.py").write_text("value = 1\n")

    assert sha256(of_code(written_today.Mine)) != before
    assert before != sha256(of_code())


def test_of_code_that_was_typed_in_nothing_is_kept(tmp_path: Path) -> None:
    program = f"""
import pathlib, torch, qsim_core as qsim
class Typed(torch.nn.Linear): ...
qsim.simulate(Typed(4, 4), activations="tensor(int8, static=true)", calibration=[torch.ones(2, 4)],
              run=qsim.Run(work_dir=pathlib.Path({str(tmp_path)!r})))
"""
    subprocess.run([*forked.python(), "-c", program], check=True)

    assert list(tmp_path.iterdir()) == []


class Told(qsim.Evaluator):
    """An evaluator with a directory of files as its option."""

    name = "told"
    directory: Path

    def evaluate(self, loaded: qsim.LoadedModel, data: qsim.Data, run: Run) -> dict[str, float]:
        return {}


def test_the_files_that_a_component_names_are_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("metric: accuracy")
    before = sha256(of_components(Told(directory=tmp_path)))

    (tmp_path / "task.yaml").write_text("metric: exact match")

    assert sha256(of_components(Told(directory=tmp_path))) != before


def test_of_a_plain_function_the_code_is_not_known() -> None:
    recipe = qsim.Recipe.of({"weights": lambda x: x.round()})

    with pytest.raises(Unknowable, match="^the code of a plain function is not known$"):
        sha256(of_components(recipe))
