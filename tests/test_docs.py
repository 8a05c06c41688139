"""Every Python snippet of README and docs runs as it stands."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = [
    pytest.param(text, id=f"{page.name}-{k}")
    for page in PAGES
    for k, text in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_runs(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "snippet.py"
    path.write_text(snippet)
    runpy.run_path(str(path))


def test_the_custom_pass_of_the_readme_is_at_most_fifteen_lines():
    (text,) = re.findall(r"(@dataclass\(frozen=True\)\nclass .*?)\n\n\n", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(text.splitlines()) <= 15


def test_pages_link_to_pages_that_are_there():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
