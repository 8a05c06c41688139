"""Fixtures of all tests."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from mcc.data import Data
from mcc.frontend import capture
from mcc.pipeline import Pipeline
from mcc.rewrite import Pass
from mcc.spec import parse_passes
from mcc.target import parse_target

sys.path.insert(0, str(Path(__file__).parent))
# a first call compiles or imports; a run says the same of the same code, and `--hypothesis-profile search` looks further
settings.register_profile("mcc", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None)
settings.load_profile("mcc")
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores: more threads than those wait for each other
GOLDEN = Path(__file__).parent / "golden"
# tests that take longer, as last measured, are left out where one waits for them: by -m "not slow"
SLOW, LONGEST = Path(__file__).parent / "slow.txt", 0.6  # seconds, on a machine with nothing else to do
measured: dict[str, float] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden")
    parser.addoption("--update-slow", action="store_true", help="rewrite tests/slow.txt by what this run takes")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    listed = set(SLOW.read_text().splitlines())
    for item in items:
        if item.nodeid in listed:
            item.add_marker(pytest.mark.slow)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        measured[report.nodeid] = report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--update-slow") and "PYTEST_XDIST_WORKER" not in os.environ:
        kept = set(SLOW.read_text().splitlines()) - set(measured)
        longer = {name for name, seconds in measured.items() if seconds > LONGEST}
        SLOW.write_text("".join(f"{name}\n" for name in sorted(kept | longer)))


@pytest.fixture(autouse=True)
def _seed(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # the tuner's cache of the machine neither helps nor sees the tests
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp()))


@pytest.fixture
def mcc_data() -> Path:
    """The folder of real data; tests that need it skip without it."""
    folder = os.environ.get("MCC_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real data: set MCC_DATA to its folder")
    return Path(folder)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare text with tests/golden/<name>.txt, or rewrite it under --update-golden."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.write_text(text)
        assert text == path.read_text()

    return check


@pytest.fixture
def check_rewrite() -> Callable[..., None]:
    """Run one pass on a model: text before and after, its guarantee, and its text's round trip."""

    def check(
        model: torch.nn.Module, step: Pass, *, before: str, after: str, inputs: tuple = (), data: Data | None = None
    ):
        graph = capture(model.eval(), inputs, dynamic_shapes=None)
        assert str(graph) == _dedent(before)
        pipeline = Pipeline((step,), parse_target("cpu:avx512vnni"), data or Data())
        changed, _ = pipeline.run(graph, inputs)
        assert str(changed) == _dedent(after)
        assert parse_passes(str(step), {step.pass_name(): type(step)}) == (step,)
        assert parse_passes(step.full_text(), {step.pass_name(): type(step)}) == (step,)

    return check


def _dedent(text: str) -> str:
    return textwrap.dedent(text).strip() + "\n"
