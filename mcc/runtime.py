"""Runs an artifact with numpy and tvm_ffi alone: no PyTorch, no TVM package, no model code.

PyTorch tensors are welcome: they are reached through DLPack, never by import.
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mcc.artifact import (
    DIRECT,
    DIRECT_ALONE,
    Contents,
    Manifest,
    TensorSpec,
    Workspace,
    read_artifact,
    write_artifact,
)
from mcc.errors import ArtifactError
from mcc.memory import aligned, workspace_arrays
from mcc.report import Report
from mcc.small_calls import Library, SmallCalls, arrays_are_readable
from mcc.target import host_features
from mcc.tvm_runtime import load_runtime, pool, tvm_ffi_module

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

_CPU, _POOLED_ALLOCATOR = 1, 2


@dataclass(frozen=True)
class Memory:
    """Bytes an artifact holds while loaded.

    Attributes:
        weights: encoded weights; mapped from the file where it was loaded from one.
        library: the shared object.
        workspace: what activations of fixed size lie in while a call runs; one for each call at once.
    """

    weights: int
    library: int
    workspace: int


@dataclass(frozen=True, slots=True)
class _Check:
    """What an input must be like.

    Attributes:
        dtype: of the array.
        aligned: whether it must lie at a multiple of more than its element.
        alignment: that multiple.
    """

    dtype: np.dtype[Any]
    aligned: bool
    alignment: int

    @classmethod
    def of(cls, spec: TensorSpec) -> _Check:
        dtype = np.dtype(spec.dtype)
        return cls(dtype, spec.alignment > dtype.itemsize, spec.alignment)


def _refuse_other_machine(manifest: Manifest) -> None:
    missing = sorted(set(manifest.features) - host_features())
    if missing:
        granted = ", or the system does not grant them" if any(name.startswith("amx") for name in missing) else ""
        raise ArtifactError(
            f"the artifact is for {manifest.target}; this CPU lacks {', '.join(missing)}{granted}",
            remedy="compile the model on this machine, or for one of the targets that `mcc targets` says run here",
        )


def _new_places(workspace: Workspace) -> list[NDArray[Any]]:
    """New arrays for what a call computes in.

    Raises:
        ArtifactError: there is no memory for them.
    """
    try:
        return workspace_arrays(workspace)
    except MemoryError as error:
        raise ArtifactError(
            f"there is no memory for the {workspace.size:,} bytes of its activations",
            remedy="free some, compile for smaller inputs, or call it from fewer threads at once",
        ) from error


def _no_small_call(value: object) -> None:
    """Where no call is small, or another takes or gives more than one array."""
    del value


class Artifact:
    """A compiled model: call it, save it, read its report.

    Args:
        contents: what to run.
        threads: used by kernels; None for every core this process may use.

    Raises:
        ArtifactError: this machine lacks CPU features the library needs.
    """

    def __init__(self, contents: Contents, threads: int | None = None) -> None:
        manifest = contents.manifest
        _refuse_other_machine(manifest)
        if threads is not None and threads < 1:
            raise ArtifactError(f"threads={threads}", remedy="use at least one thread")
        self._contents = contents
        if manifest.sorts:
            load_runtime("tvm_runtime_extra")
        self.threads = threads or len(os.sched_getaffinity(0))
        self._ffi, _ = tvm_ffi_module()
        self._pool = pool()
        weights = [aligned(contents.weights[n]) for n in manifest.weights]
        self._run, self._small = self._load_library(weights)
        self._weights = self._ffi.Array([self._ffi.from_dlpack(a) for a in weights])
        self._workspaces: list[Any] = []  # those that no call is using
        self._inputs = manifest.inputs
        self._checks = tuple(_Check.of(s) for s in manifest.inputs)
        self._input_names = {s.name: i for i, s in enumerate(manifest.inputs)}
        self._single = isinstance(manifest.output_tree, str)
        self._small_call: Callable[[Any], NDArray[Any] | None] = _no_small_call
        if self._small is not None and self._single and len(self._checks) == 1 and not self._checks[0].aligned:
            self._small_call = self._small.one_for_one()

    @classmethod
    def for_other_machine(cls, contents: Contents) -> Artifact:
        """An artifact that can be saved and read here, not called: its CPU has features this one lacks."""
        artifact = cls.__new__(cls)
        artifact._contents = contents
        artifact._inputs = contents.manifest.inputs
        artifact._small_call = _no_small_call
        return artifact

    def _load_library(self, weights: list[NDArray[Any]]) -> tuple[Callable[..., Any], SmallCalls | None]:
        """The library's main function, and its function for small calls if it has one."""
        descriptor, path = tempfile.mkstemp(suffix=".so", prefix="mcc-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(self._contents.library)
            library = self._ffi.load_module(path)
        finally:
            os.unlink(path)
        module = library["vm_load_executable"]()
        module["vm_initialization"](_CPU, 0, _POOLED_ALLOCATOR)
        names = [name for name in (DIRECT_ALONE, DIRECT) if library.implements_function(name, True)]
        if not names or not arrays_are_readable():
            return module["main"], None
        manifest = self._contents.manifest
        dims = [
            (i, axis) for i, s in enumerate(manifest.inputs) for axis, d in enumerate(s.shape) if isinstance(d, str)
        ]
        parts = Library(
            library.get_function(names[0], True), names[0] == DIRECT_ALONE, partial(self._pool.use, self.threads),
            [np.dtype(s.dtype) for s in manifest.inputs], weights, partial(_new_places, manifest.workspace),
            self._ffi.from_dlpack, dims,
        )  # fmt: skip
        return module["main"], SmallCalls(parts)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs in call order."""
        return self._contents.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Outputs in order, flattened."""
        return self._contents.manifest.outputs

    @property
    def target(self) -> str:
        """The target it was compiled for."""
        return self._contents.manifest.target

    @property
    def passes(self) -> str:
        """The pass list as text, every option written."""
        return self._contents.manifest.passes

    @property
    def report(self) -> Report:
        """What was done to the model."""
        return Report.from_json(json.dumps(self._contents.manifest.report))

    @property
    def memory(self) -> Memory:
        """Bytes held."""
        weights = sum(w.nbytes for w in self._contents.weights.values())
        return Memory(weights, len(self._contents.library), self._contents.manifest.workspace.size)

    def with_manifest(self, **changes: Any) -> Artifact:
        """The same library and weights under a manifest with other entries."""
        contents = replace(self._contents, manifest=replace(self._contents.manifest, **changes))
        changed = copy.copy(self)
        changed._contents = contents
        return changed

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the artifact to a file, whole or not at all.

        Raises:
            ArtifactError: the file cannot be written.
        """
        write_artifact(path, self._contents)

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Run the model; inputs by position or by name, numpy or torch; outputs are of the inputs' kind.

        Raises:
            ArtifactError: an input is missing, or has the wrong shape or dtype.
        """
        if len(args) == 1 and not named:
            output = self._small_call(args[0])
            if output is not None:
                return output
        if not hasattr(self, "_run"):
            _refuse_other_machine(self._contents.manifest)
        return self._call(args if not named and len(args) == len(self._inputs) else self._arrange(args, named))

    def _call(self, tensors: Sequence[Any]) -> Any:
        foreign = None
        arrays, shapes = [], []
        for value, check in zip(tensors, self._checks):  # noqa: B905 (their number is checked; strict costs 0.2 us)
            array = value
            plain = type(value) is np.ndarray and value.dtype is check.dtype and value.flags.carray and value.size
            if not plain or check.aligned:
                if isinstance(value, dict | list | tuple):
                    return self(*_leaves(tensors))
                array, foreign = self._readable(value, check, foreign, tensors)
            arrays.append(array)
            shapes.append(array.shape)
        try:
            key = tuple(shapes)
            outputs = self._small.call(arrays, key) if self._small is not None else None
            if outputs is None:
                outputs = self._checked_call(arrays, key)
        except (RuntimeError, ValueError, TypeError, MemoryError) as error:
            raise self._refusal(tensors, error) from error
        if foreign is not None:
            outputs = [foreign(output) for output in outputs]
        return outputs[0] if self._single else self._structured(outputs)

    def _readable(
        self, value: Any, check: _Check, foreign: Callable[[Any], Any] | None, tensors: Any
    ) -> tuple[NDArray[Any], Callable[[Any], Any] | None]:
        """An input as an array that the library can read, and the `from_dlpack` of the library it came from."""
        array, foreign = (value, foreign) if type(value) is np.ndarray else _as_numpy(value, foreign)
        if array.dtype != check.dtype:
            raise self._refusal(tensors)
        ready = array.flags.carray and array.size and not check.aligned
        return array if ready else aligned(array, check.alignment), foreign

    def _checked_call(self, arrays: list[NDArray[Any]], shapes: tuple[tuple[int, ...], ...]) -> list[NDArray[Any]]:
        """A call through TVM's virtual machine, which checks shapes; small ones with equal shapes need it no more."""
        self._pool.use(self.threads)
        try:
            workspace = self._workspaces.pop()
        except IndexError:  # as many are made as there are calls at once
            places = _new_places(self._contents.manifest.workspace)
            workspace = self._ffi.Array([self._ffi.from_dlpack(a) for a in places])
        try:
            result = self._run(*arrays, self._weights, workspace)
        finally:
            self._workspaces.append(workspace)
        one = self._single or len(self.outputs) == 1
        outputs = [np.from_dlpack(result)] if one else [np.from_dlpack(result[i]) for i in range(len(self.outputs))]
        if self._small is not None:
            self._small.remember(shapes, arrays, outputs)
        return outputs

    def _structured(self, outputs: Sequence[Any]) -> Any:
        named = {spec.name: output for spec, output in zip(self.outputs, outputs, strict=True)}
        return _unpack_tree(self._contents.manifest.output_tree, named)

    def _arrange(self, args: tuple[Any, ...], named: Mapping[str, Any]) -> list[Any]:
        """Inputs in call order, nested ones flattened."""
        flat = list(_leaves(args))
        slots: list[Any] = flat + [None] * (len(self._inputs) - len(flat))
        for name, value in named.items():
            position = self._input_names.get(name)
            if position is None or position < len(flat):
                names = ", ".join(s.name for s in self._inputs)
                raise ArtifactError(f"unexpected input {name!r}", remedy=f"the inputs are {names}")
            slots[position] = value
        missing = [s.name for s, v in zip(self._inputs, slots, strict=False) if v is None]
        if missing or len(slots) != len(self._inputs):
            names = ", ".join(s.name for s in self._inputs)
            raise ArtifactError(
                f"{len(flat) + len(named)} inputs given, {len(self._inputs)} needed", remedy=f"the inputs are {names}"
            )
        return slots

    def _refusal(self, values: Any, cause: Exception | None = None) -> ArtifactError:
        """The error for inputs the library did not take."""
        dims: dict[str, int] = {}
        for spec, value in zip(self._inputs, values, strict=False):
            if not hasattr(value, "shape"):
                value = np.asarray(value)
            shape, dtype = tuple(value.shape), str(value.dtype).removeprefix("torch.")
            wanted = f"{spec.dtype}[{', '.join(map(str, spec.shape))}]"
            given = f"{dtype}[{', '.join(map(str, shape))}]"
            fits = len(shape) == len(spec.shape) and all(
                size == dims.setdefault(dim, size)
                if isinstance(dim, str) and dim.isidentifier()
                else size == dim or (isinstance(dim, str) and _can_be(size, dim))
                for size, dim in zip(shape, spec.shape, strict=True)
            )
            if dtype != spec.dtype or not fits:
                return ArtifactError(f"input {spec.name} is {given}, the artifact takes {wanted}")
        reason = str(cause).strip().splitlines()[0] if cause is not None else "unknown reason"
        return ArtifactError(f"the artifact failed: {reason}")

    def __repr__(self) -> str:
        takes = ", ".join(f"{s.name}: {s.dtype}{list(s.shape)}" for s in self.inputs)
        return f"Artifact({takes}; {self.target}; passes {self.passes or 'none'})"


def _can_be(size: int, dim: str) -> bool:
    """Whether a size may be what a dim says that is an expression, such as 32*s or 2*s + 1."""
    found = re.fullmatch(r"(\d+)\*\w+(?: ([+-]) (\d+))?", dim)
    if found is None:
        return True
    factor, sign, rest = found.groups()
    return (size - int(f"{sign or '+'}{rest or 0}")) % int(factor) == 0


def _as_numpy(value: Any, foreign: Callable[[Any], Any] | None) -> tuple[NDArray[Any], Callable[[Any], Any] | None]:
    """A tensor of another library as numpy, and that library's `from_dlpack`; a scalar or list as numpy."""
    if not hasattr(value, "__dlpack__") or isinstance(value, np.generic | np.ndarray):
        return np.asarray(value), foreign
    library = sys.modules[type(value).__module__.partition(".")[0]]
    plain = value.detach() if hasattr(value, "detach") else value
    try:
        return np.from_dlpack(plain), library.from_dlpack
    except (BufferError, RuntimeError, TypeError) as error:
        raise ArtifactError(
            f"numpy cannot read the {type(value).__name__}: {str(error).strip().splitlines()[0]}",
            remedy="pass a tensor in this machine's memory, of a dtype numpy has",
        ) from error


def _leaves(values: Any) -> Iterator[Any]:
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, dict | list | tuple):
            yield from _leaves(value)
        else:
            yield value


def _unpack_tree(tree: Any, named: Mapping[str, Any]) -> Any:
    """The structure `mcc.artifact.pack_tree` packed, names replaced by values."""
    if isinstance(tree, str):
        return named[tree]
    if isinstance(tree, dict):
        ((kind, children),) = tree.items()
        if kind == "dict":
            return {key: _unpack_tree(child, named) for key, child in children.items()}
        made = [_unpack_tree(child, named) for child in children]
        return tuple(made) if kind == "tuple" else made
    return tree


def load(path: str | os.PathLike[str], threads: int | None = None) -> Artifact:
    """Load an artifact file; weights are mapped, not copied.

    An artifact is code: load files you trust. Every byte is checked against the hashes in the file before any of it
    runs, which finds damage, not malice.

    Raises:
        ArtifactError: the file is damaged, of a newer format, or for a CPU with features this one lacks.
    """
    return Artifact(read_artifact(path), threads)
