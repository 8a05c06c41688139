"""The wheel, installed in a fresh environment: both package folders are in it, and it compiles and runs a model."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECK = (
    "import torch, mcc, mcc.passes, mcc.backends, pathlib, sys\n"
    "assert 'site-packages' in mcc.__file__, mcc.__file__\n"
    "model = torch.nn.Sequential(torch.nn.Linear(8, 20), torch.nn.ReLU(), torch.nn.Linear(20, 3)).eval()\n"
    "x = torch.randn(2, 8)\n"
    "artifact = mcc.compile(model, (x,), passes='prune-weights{ratio=0.5}', measure='never', tuning='model')\n"
    "assert artifact(x).shape == (2, 3)\n"
    "found = torch.compile(model, backend='mcc', dynamic=False)\n"
    "with torch.inference_mode(): assert torch.allclose(found(x), model(x), atol=1e-5)\n"
    "print('ok')\n"
)
PLUGIN = (
    "from dataclasses import dataclass\nimport mcc\nfrom mcc import ops\n\n\n@dataclass(frozen=True)\nclass ReplaceHardswishByRelu(mcc.Rewrite):\n"
    '    """Replace hardswish(x) by relu(x)."""\n\n    guarantee = mcc.Lossy()\n\n    def match(self, node):\n'
    '        return mcc.Match(node) if node.op is ops.OPS["hardswish"] else mcc.Reject.other_op(node)\n\n'
    "    def rewrite(self, match, rewriter):\n        return rewriter.call(ops.RELU, match.node.operand(0))\n"
)


def run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("source") / "mcc"
    ignored = shutil.ignore_patterns(".venv", ".git", "build", "dist", "*.egg-info", "site", "__pycache__", "data")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(source / "dist"), str(source))
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel installed; its dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", str(folder))
    site = next(p for p in sys.path if p.endswith("site-packages"))
    mine = next((folder / "lib").glob("python*/site-packages"))
    run(str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "setuptools>=77")
    run(str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps", str(wheel))
    # after its own packages: a .pth line is appended to the path
    (mine / "dependencies.pth").write_text(site + "\n")
    return folder


@pytest.mark.slow
def test_the_wheel_holds_core_passes_and_backends_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "mcc/compiler.py",
        "mcc/py.typed",
        "mcc/passes/quantize.py",
        "mcc/backends/cpu/kernels/sparse.py",
        "mcc/cli/__main__.py",
    ):
        assert name in names
    assert not any(n.startswith(("tests/", "examples/", "passes/", "backends/")) for n in names)


@pytest.mark.slow
def test_an_installed_wheel_compiles_and_offers_its_command_and_backend(environment, tmp_path):
    assert run(str(environment / "bin" / "python"), "-c", CHECK, cwd=tmp_path).endswith("ok\n")
    assert "prune-weights" in run(str(environment / "bin" / "mcc"), "passes", cwd=tmp_path)


@pytest.mark.slow
def test_a_pass_of_another_package_is_seen_by_the_command(environment, tmp_path):
    (tmp_path / "my_passes.py").write_text(PLUGIN)
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "my-passes"\nversion = "1"\n[project.entry-points."mcc.passes"]\nhardswish = "my_passes:ReplaceHardswishByRelu"\n'
        '[tool.setuptools]\npy-modules = ["my_passes"]\n'
    )
    python = str(environment / "bin" / "python")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", str(tmp_path))
    try:
        assert "replace-hardswish-by-relu" in run(str(environment / "bin" / "mcc"), "passes", cwd=environment)
    finally:
        run(python, "-m", "pip", "uninstall", "--quiet", "-y", "my-passes")


@pytest.mark.slow
def test_an_editable_install_works_too(tmp_path):
    folder, site = tmp_path / "environment", next(p for p in sys.path if p.endswith("site-packages"))
    source = tmp_path / "mcc"
    ignored = shutil.ignore_patterns(".venv", ".git", "build", "dist", "*.egg-info", "site", "__pycache__", "data")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    run(sys.executable, "-m", "venv", str(folder))
    mine = next((folder / "lib").glob("python*/site-packages"))
    run(str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "setuptools>=77")
    run(
        str(folder / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-e",
        str(source),
    )
    (mine / "zz_dependencies.pth").write_text(site + "\n")
    code = "import mcc, mcc.passes, mcc.backends; print(mcc.__file__, mcc.passes.PASSES[0].__name__)"
    assert run(str(folder / "bin" / "python"), "-c", code, cwd=tmp_path / "environment").split() == [
        str(source / "mcc" / "__init__.py"),
        "EliminateIdentity",
    ]
