"""The command line: every command on a real artifact, help with an example, clear errors and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from mcc.cli.__main__ import app

COMMANDS = ["compile", "inspect", "run", "bench", "tune", "verify", "passes", "targets"]
INPUT = ["-i", "input=f32[batch:4,12]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a module that makes a model, data, and an artifact compiled from them."""
    path = tmp_path_factory.mktemp("cli")
    (path / "tiny_nets.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef make_mlp():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 3))\n\n\nnot_a_model = 3\n"
    )
    random = np.random.default_rng(0)
    np.savez(path / "data.npz", x=random.standard_normal((64, 12)).astype(np.float32), y=random.integers(0, 3, 64))
    np.savez(path / "inputs.npz", input=random.standard_normal((5, 12)).astype(np.float32))
    return path


@pytest.fixture
def mcc(folder, monkeypatch):
    """Run `mcc` in that folder: exit code and output."""
    monkeypatch.chdir(folder)

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.output

    return run


@pytest.fixture
def artifact(mcc, folder):
    if not (folder / "mlp.mcc").exists():
        code, output = mcc("compile", "tiny_nets:make_mlp", *INPUT, "-o", "mlp.mcc", "--tuning", "model")
        assert code == 0, output
    return "mlp.mcc"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(mcc, command):
    code, output = mcc(command, "--help")
    assert code == 0
    assert f"Example: mcc {command}" in output


def test_compile_writes_an_artifact_with_passes_and_data(mcc, folder):
    passes = "prune-weights{ratio=0.8}; fine-tune; quantize"
    code, output = mcc(
        "compile",
        "tiny_nets:make_mlp",
        *INPUT,
        "-p",
        passes,
        "--data",
        "data.npz",
        "-o",
        "small.mcc",
        "--tuning",
        "model",
    )
    assert code == 0
    assert f"small.mcc: {(folder / 'small.mcc').stat().st_size:,} bytes" in output


def test_inspect_shows_layers_before_and_after(mcc):
    code, output = mcc("inspect", "tiny_nets:make_mlp", *INPUT, "-p", "prune-weights{ratio=0.5}", "--graph")
    assert code == 0
    assert "before: 643 parameters" in output
    assert "after: 343 parameters" in output
    assert "%linear_0: f32[batch, 40] = linear(%input_1, @0.weight, @0.bias)" in output


def test_inspect_ranks_layers_by_what_few_bits_do_to_them(mcc, tmp_path):
    inspect = "inspect", "tiny_nets:make_mlp", *INPUT, "--sensitivity"
    code, output = mcc(*inspect)
    assert code == 0
    assert "1 - relative distance of the outputs" in " ".join(output.split())
    found = json.loads(mcc(*inspect, "--json")[1])
    drops = [row["drop"] for row in found["damages"]]
    assert drops == sorted(drops, reverse=True)
    assert {(row["layer"], row["format"]) for row in found["damages"]} == {
        (layer, kind) for layer in ("0", "2") for kind in ("int8", "int4", "int3", "int2")
    }
    assert found["damages"][0]["format"] == "int2"
    data = tmp_path / "data.npz"
    x = np.random.default_rng(0).standard_normal((10, 12)).astype(np.float32)
    np.savez(data, x=x, y=np.zeros(10, np.int64))
    found = json.loads(mcc(*inspect, "--json", "--data", str(data))[1])
    assert found["metric"] == "accuracy"
    assert all(round(row["drop"] * 10) == pytest.approx(row["drop"] * 10) for row in found["damages"])
    for arguments, message in (
        ((*inspect, "--plot", "bars.txt"), "end the name in .svg, .png or .pdf"),
        ((*inspect, "--plot", "none/bars.svg"), "there is no folder none"),
        ((*inspect[:-1], "--plot", "bars.svg"), "add --sensitivity"),
        ((*inspect, "-p", "quantize{activations=None}"), "no layer in float"),
    ):
        code, output = mcc(*arguments)
        assert code == 2
        assert message in output


def test_inspect_shows_what_can_shrink_and_what_blocks_the_rest(mcc):
    inspect = "inspect", "tiny_nets:make_mlp", *INPUT, "--prunable"
    code, output = mcc(*inspect)
    assert code == 0
    assert "1 of 2 groups can shrink" in output
    assert "is returned" in output
    first, second = json.loads(mcc(*inspect, "--json")[1])
    # a row of 12 inputs, a bias, and a column of 3 outputs
    assert first == {"kind": "neuron", "size": 40, "parameters": 16, "layers": ["0", "2"], "blocked": []}
    assert second["blocked"] == ["%linear_2 is returned"]
    pruned = json.loads(mcc(*inspect, "--json", "-p", "prune-neurons{ratio=0.5}")[1])
    assert pruned[0]["size"] == 20


def test_inspect_draws_the_layers(mcc, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra bench")
    path = tmp_path / "bars.svg"
    assert mcc("inspect", "tiny_nets:make_mlp", *INPUT, "--sensitivity", "--plot", str(path))[0] == 0
    assert "<svg" in path.read_text()


def test_inspect_draws_what_ratios_do(mcc, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra bench")
    path = tmp_path / "curve.svg"
    code, output = mcc("inspect", "tiny_nets:make_mlp", *INPUT, "--prunable", "--plot", str(path), "--json")
    assert code == 0
    assert "<svg" in path.read_text()
    points = json.loads(output[output.index("{") :])["points"]  # progress comes before, on standard error
    assert [p["way"] for p in points] == ["dense"] + ["prune-neurons"] * 8
    assert [p["macs"] for p in points] == sorted((p["macs"] for p in points), reverse=True)
    assert points[0]["metric"] == 1
    assert all(p["latency_ms"] > 0 for p in points)
    code, output = mcc("inspect", "tiny_nets:make_mlp", *INPUT, "--prunable", "--plot", "none/curve.svg")
    assert code == 2
    assert "there is no folder none" in output


def test_inspect_shows_an_artifact_as_text_and_json(mcc, artifact):
    assert "dense_f32" in mcc("inspect", artifact)[1]
    assert [row["layer"] for row in json.loads(mcc("inspect", artifact, "--json")[1])["layers"]] == ["0", "2"]


def test_run_prints_and_saves(mcc, folder, artifact):
    code, output = mcc("run", artifact, "--inputs", "inputs.npz")
    assert (code, "float32[5, 3]" in output) == (0, True)
    assert mcc("run", artifact, "--inputs", "inputs.npz", "--out", "answers.npz", "--threads", "1")[0] == 0
    with np.load(folder / "answers.npz") as answers:
        assert [answers[name].shape for name in answers.files] == [(5, 3)]


def test_verify_compares_with_the_model(mcc, artifact):
    code, output = mcc("verify", artifact, "--model", "tiny_nets:make_mlp", *INPUT)
    assert code == 0
    assert "every byte as written" in output
    assert "largest difference" in output


def test_bench_times_all_engines_in_turns(mcc):
    code, output = mcc("bench", "tiny_nets:make_mlp", "-i", "input=f32[2,12]", "--runs", "5", "--json")
    assert code == 0
    timings = json.JSONDecoder().raw_decode(output, output.index("{"))[0]["timings"]
    assert {"torch eager", "ONNX Runtime", "mcc"} <= set(timings)
    assert {t["runs"] for t in timings.values()} == {5}


def test_bench_times_every_kernel_beside_the_peak(mcc):
    code, output = mcc(
        "bench", "tiny_nets:make_mlp", "-i", "input=f32[2,12]", "--layers", "--target", "cpu:avx2", "--json"
    )
    assert code == 0
    rows = json.JSONDecoder().raw_decode(output, output.index("{"))[0]["layers"]
    linear = [row for row in rows if row["op"].startswith("linear")]
    assert [row["macs"] > 0 for row in linear] == [True] * len(linear)
    assert all(0 < row["percent_of_peak"] < 110 and row["milliseconds"] > 0 for row in linear)
    assert "% of peak" in mcc("bench", "tiny_nets:make_mlp", "-i", "input=f32[2,12]", "--layers")[1]


def test_passes_and_targets_are_listed(mcc):
    assert "prune-weights{ratio=0.5" in mcc("passes")[1]
    assert "Han et al.: Learning both weights and connections. NeurIPS 2015" in mcc("passes")[1]
    assert "straight through" in mcc("passes", "fine-tune")[1]
    assert "quantize" in json.loads(mcc("passes", "--json")[1])
    assert "cpu:avx2" in mcc("targets")[1]


@pytest.mark.parametrize(("arguments", "message"), [
    (["compile", "nope", "-o", "x.mcc"], "SpecError: 'nope' names no model"),
    (["compile", "none.onnx", "-o", "x.mcc"], "there is no file none.onnx"),
    (["compile", "tiny_nets:none", "-o", "x.mcc"], "cannot find tiny_nets:none"),
    (["compile", "tiny_nets:make_mlp", "-i", "input=f99[2]", "-o", "x.mcc"], "cannot read the input 'input=f99[2]'"),
    (["compile", "tiny_nets:make_mlp", *INPUT, "-p", "prune", "-o", "x.mcc"], "unknown pass 'prune'"),
    (["compile", "tiny_nets:make_mlp", *INPUT, "-p", "quantize", "-o", "x.mcc"], "needs data.calibration"),
    (["compile", "tiny_nets:make_mlp", *INPUT, "--target", "gpu", "-o", "x.mcc"], "unknown target 'gpu'"),
    (["compile", "tiny_nets:make_mlp", "-o", "x.mcc"], "needs example inputs"),
    (["inspect", "none.mcc"], "cannot read none.mcc"),
    (["run", "none.mcc", "--inputs", "inputs.npz"], "cannot read none.mcc"),
    (["passes", "none"], "unknown pass 'none'"),
    (["bench", "tiny_nets:make_mlp", *INPUT, "--runs", "0"], "threads and runs are at least 1"),
])  # fmt: skip
def test_bad_input_gives_a_clear_error_and_exit_code_two_and_writes_nothing(mcc, folder, arguments, message):
    code, output = mcc(*arguments)
    assert code == 2
    assert message in output.replace("\n", " ").replace("│", "").replace("  ", " ")
    assert not (folder / "x.mcc").exists()


def test_a_missing_array_is_named(mcc, artifact):
    code, output = mcc("run", artifact, "--inputs", "data.npz")
    assert (code, "data.npz holds no array input" in output) == (2, True)


def test_a_wrong_answer_fails_verification(mcc, folder):
    mcc(
        "compile",
        "tiny_nets:make_mlp",
        *INPUT,
        "-p",
        "prune-weights{ratio=0.9}",
        "-o",
        "pruned.mcc",
        "--tuning",
        "model",
    )
    code, output = mcc("verify", "pruned.mcc", "--model", "tiny_nets:make_mlp", *INPUT)
    assert (code, "VerificationError" in output) == (2, True)


def test_the_module_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "mcc.cli", "--help"], capture_output=True, text=True, check=True)
    assert "makes neural networks smaller and faster" in done.stdout


def test_tune_times_every_tile_once_and_compile_takes_the_fastest(mcc, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, first = mcc("tune", "tiny_nets:make_mlp", *INPUT, "--json")
    assert code == 0
    rows = json.loads(first)["layers"]
    assert {row["layer"] for row in rows} <= {"0", "2"}
    assert all(row["best"] == min(row["seconds"], key=row["seconds"].get) for row in rows)
    _, again = mcc("tune", "tiny_nets:make_mlp", *INPUT, "--json")
    assert json.loads(again)["layers"] == rows  # nothing is timed twice
    _, table = mcc("tune", "tiny_nets:make_mlp", *INPUT)
    assert "best tile" in table


def test_tune_for_a_cpu_that_is_not_here_is_refused(mcc):
    code, output = mcc("tune", "tiny_nets:make_mlp", *INPUT, "--target", "cpu:neon")
    assert code == 2
    assert "cannot time kernels for cpu:neon" in output
