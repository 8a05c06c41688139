"""What no linter counts: lengths of files and functions, names, symlinks, open ends."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    p for folder in ("mcc", "passes", "backends", "examples") for p in (ROOT / folder).rglob("*.py")
    if "mcc/passes" not in str(p) and "mcc/backends" not in str(p)
)  # fmt: skip
LONGEST_FILE, LONGEST_FUNCTION = 500, 50


def test_sources_are_found():
    assert len(SOURCES) > 50


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_and_its_functions_are_short_enough_to_read(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
            documented = ast.get_docstring(node) is not None
            first = node.body[0].end_lineno if documented else node.body[0].lineno - 1
            assert node.end_lineno - first <= LONGEST_FUNCTION, f"{path.name}:{node.lineno} {node.name}"


def test_no_file_is_an_attic():
    attics = {"utils", "util", "helpers", "helper", "common", "misc", "base"}
    assert [p for p in SOURCES if p.stem in attics] == []


def test_nothing_is_left_to_do_and_nothing_commented_out():
    for path in SOURCES:
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text()), path


def test_the_packages_are_linked_for_editable_installs():
    for name in ("passes", "backends"):
        assert (ROOT / "mcc" / name).resolve() == (ROOT / name).resolve()


def test_the_top_level_holds_what_it_should():
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    assert folders - {"build", "dist", "site", "mcc.egg-info"} <= {
        "mcc",
        "passes",
        "backends",
        "tests",
        "examples",
        "docs",
    }


def test_tests_that_are_listed_as_slow_are_there():
    for line in (ROOT / "tests" / "slow.txt").read_text().splitlines():
        path, _, name = line.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(), line
