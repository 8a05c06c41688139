"""The examples run; the worked example reaches its figures that do not depend on the clock."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_the_worked_example(tmp_path):
    """Accuracies and sizes of the demo's table, from a whole run of it."""
    command = [sys.executable, str(ROOT / "examples" / "mnist_mlp.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "gives equal outputs in a process without torch" in done.stdout
    rows = {}
    for line in done.stdout.splitlines():
        cells = [c.strip() for c in line.strip("│").split("│")]
        if len(cells) == 8 and "%" in cells[3]:
            rows[cells[0]] = (
                int(cells[1].replace(",", "")),
                int(cells[2].replace(",", "") or 0),
                float(cells[3].rstrip("%")),
            )
    dense = rows["mcc dense fp32"]
    assert dense[2] >= 98.0
    assert rows["mcc pruned 50 %"][2] >= dense[2] - 0.3
    assert rows["mcc pruned 90 % + int8"][2] >= dense[2] - 0.7
    assert rows["mcc pruned 90 % + int8"][1] <= 0.16 * dense[1]
    assert rows["mcc pruned 90 % + int8"][0] <= 0.105 * dense[0]
    weights = int(re.search(r"pruned 90 % \+ int8: .* weights ([\d,]+) bytes", done.stdout)[1].replace(",", ""))
    assert weights <= 0.10 * dense[1]
