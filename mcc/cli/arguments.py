"""What the commands share: reading a model, its inputs and its data from the command line."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from torch import Tensor

from mcc.data import Data
from mcc.errors import DataError, MccError, SpecError

BAD_INPUT = 2
_KINDS = {
    "f32": torch.float32, "f64": torch.float64, "i64": torch.int64, "i32": torch.int32, "u8": torch.uint8,
    "bool": torch.bool,
}  # fmt: skip


@contextmanager
def clear_errors() -> Iterator[None]:
    """Print an MccError as its own text, without a traceback, and leave with exit code 2."""
    try:
        yield
    except MccError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from error


def read_model(text: str) -> Any:
    """A model: `model.onnx`, `program.pt2`, or `package.module:name` of a module or a function that makes one.

    Raises:
        SpecError: there is no such file, module or name.
    """
    if text.endswith((".onnx", ".pt2")):
        if not Path(text).is_file():
            raise SpecError(f"there is no file {text}", remedy="check the path")
        return text if text.endswith(".onnx") else torch.export.load(text)
    module_name, _, name = text.partition(":")
    if not name:
        raise SpecError(f"{text!r} names no model", remedy="write model.onnx, program.pt2 or package.module:name")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise SpecError(f"cannot find {text}: {error}", remedy="write package.module:name") from error
    model = found if isinstance(found, torch.nn.Module) else found()
    if not isinstance(model, torch.nn.Module):
        raise SpecError(f"{text} gave a {type(model).__name__}, not a module")
    return model


def read_inputs(texts: list[str]) -> tuple[tuple[Tensor, ...], dict[str, dict[int, str]] | None]:
    """Example inputs from texts `name=f32[batch:8,3,224,224]`; a named dim may vary.

    Raises:
        SpecError: a text is malformed.
    """
    tensors, dims = [], {}
    generator = torch.Generator().manual_seed(0)
    for text in texts:
        name, _, kind = text.partition("=")
        dtype, _, body = kind.partition("[")
        try:
            sizes = [part.strip() for part in body.removesuffix("]").split(",") if part.strip()]
            shape = [int(size.rpartition(":")[2]) for size in sizes]
            named = {i: size.partition(":")[0] for i, size in enumerate(sizes) if ":" in size}
            element = _KINDS[dtype]
        except (ValueError, KeyError) as error:
            raise SpecError(
                f"cannot read the input {text!r}",
                remedy="write name=f32[batch:8,3,224,224]; types: " + ", ".join(_KINDS),
            ) from error
        floating = element.is_floating_point
        made = torch.randn(shape, generator=generator) if floating else torch.ones(shape)
        tensors.append(made.to(element))
        if named:
            dims[name] = named
    return tuple(tensors), dims or None


def read_data(path: Path | None) -> Data:
    """Data from an .npz: arrays `x` (one batch dim) for calibration, and `y` where there are labels to train with.

    Raises:
        DataError: the file cannot be read or holds no `x`.
    """
    if path is None:
        return Data()
    arrays = read_arrays(path)
    if "x" not in arrays:
        raise DataError(f"{path} holds no array x", remedy="save it with numpy.savez(path, x=inputs, y=labels)")
    x = torch.from_numpy(arrays["x"])
    batches = list(torch.split(x, 64))
    train = list(zip(batches, torch.split(torch.from_numpy(arrays["y"]), 64), strict=True)) if "y" in arrays else None
    return Data(calibration=batches, train=train)


def read_arrays(path: Path) -> dict[str, Any]:
    """The arrays of an .npz file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"cannot read {path} as .npz: {error}", remedy="save it with numpy.savez") from error


def print_json(value: object) -> None:
    """Print as JSON."""
    typer.echo(json.dumps(value, indent=1, sort_keys=True))
