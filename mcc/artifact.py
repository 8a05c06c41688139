"""The .mcc file: one zip, stored uncompressed so that weights can be mapped, every byte of it under a hash.

Members are `manifest.json`, `weights.safetensors` and `library.so`. The manifest holds the SHA-256 of every other
member; the zip's comment holds the SHA-256 of all bytes outside those members, so any changed byte is noticed. Nothing
is ever unpickled. An array with many zeros that a kernel reads dense is stored as a bitmap and its non-zero values, and
spread out when it is loaded, and what the manifest says is derived is made from others then; all others are mapped.
This file is loaded by deployed programs: it imports numpy alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import secrets
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mcc.errors import ArtifactError
from mcc.slabs import Cuts, Derived

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT_VERSION = 4
ALIGNMENT = 64
DIRECT, DIRECT_ALONE = "checked_call", "checked_call_alone"
"""The library's function that runs a small call without TVM's virtual machine, where it has one; the second name says
that none of its kernels uses several threads."""
ARRAY_WORDS = {"type": 1, "values": 2, "rank": 3, "dims": 4, "dtype": 7, "flags": 8}
"""Which words of 8 bytes of a numpy array, the object, hold what: the class and the dtype, as objects, addresses of its
values and of its dims, and in the lower half their number and flags. The first is of CPython's header of objects, the
others of numpy's C interface; the functions above read them there."""
CONTIGUOUS_ALIGNED = 0x101
"""Flags of an array that they can read: one element behind the other in C's order, and aligned as its type needs."""
SMALL_CALL = 1 << 16
"""Bytes of all inputs and outputs of a call up to which what surrounds its kernels counts."""
MANIFEST, WEIGHTS, LIBRARY = "manifest.json", "weights.safetensors", "library.so"
_LOCAL_HEADER = 30
_SMALLEST_BITMAP = 4096
_BITS, _VALUES, _SHAPE = "~bits", "~values", "~shape"
_LARGEST_HEADER = 100 << 20
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
PLACED = frozenset(_DTYPES.values())
"""Element types that an activation in a workspace may have: those that numpy has."""
_DTYPE_NAMES = {numpy_name: name for name, numpy_name in _DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """An input or output.

    Attributes:
        name: as the model names it.
        shape: dims; a string names a dim that may vary.
        dtype: the numpy name, such as "float32".
        alignment: bytes the library needs its address to be a multiple of; elsewhere it is copied first.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    alignment: int = ALIGNMENT


@dataclass(frozen=True)
class Place:
    """Where an activation lies in a workspace.

    Attributes:
        offset: in bytes, a multiple of `ALIGNMENT`.
        shape: dims.
        dtype: the numpy name.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Workspace:
    """Memory that a call computes in; activations that are never alive at once share it.

    Attributes:
        size: in bytes.
        places: of the activations, in the order the library takes them.
    """

    size: int = 0
    places: tuple[Place, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """What an artifact says of itself.

    Attributes:
        inputs, outputs: tensors in call order.
        output_tree: the returned structure, output names as leaves (see `pack_tree`).
        target: as `mcc.parse_target` reads it.
        features: CPU flags the library needs.
        passes: the pass list as text, every option written.
        weights: names of the tensors the library takes, in order: those in weights.safetensors and derived ones.
        derived: how the latter are made.
        report: of the compilation, as `Report.as_dict` gives it.
        tiles: the tile chosen for each kernel, which timing may decide differently another time.
        sorts: whether the library calls TVM's sort, which lies in a second runtime library.
        workspace: that the library takes.
        format_version: of the file.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    output_tree: object
    target: str
    features: tuple[str, ...]
    passes: str
    weights: tuple[str, ...]
    report: Mapping[str, object]
    tiles: Mapping[str, str]
    sorts: bool = False
    workspace: Workspace = Workspace()
    derived: tuple[Derived, ...] = ()
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Contents:
    """A whole artifact.

    Attributes:
        manifest: what it says of itself.
        weights: encoded weights by name.
        library: the shared object's bytes.
    """

    manifest: Manifest
    weights: Mapping[str, NDArray[Any]]
    library: bytes | memoryview


def pack_tree(tree: object) -> object:
    """A nest of tuples, lists and dicts with str or None leaves, as JSON that tells tuples from lists."""
    if isinstance(tree, tuple):
        return {"tuple": [pack_tree(t) for t in tree]}
    if isinstance(tree, list):
        return {"list": [pack_tree(t) for t in tree]}
    if isinstance(tree, Mapping):
        return {"dict": {str(k): pack_tree(t) for k, t in tree.items()}}
    return tree


def stored_bytes(array: NDArray[Any]) -> int:
    """Bytes an array takes in the file: as it is, or as a bitmap and its non-zero values where that is a tenth less."""
    return min(array.nbytes, _bitmap_bytes(array)) if _wants_bitmap(array) else array.nbytes


def without_derived(weights: Mapping[str, NDArray[Any]], derived: Iterable[Derived]) -> dict[str, NDArray[Any]]:
    """Those weights that a file holds."""
    made = {name for d in derived for name in d.makes}
    return {name: array for name, array in weights.items() if name not in made}


def _bitmap_bytes(array: NDArray[Any]) -> int:
    return int(np.count_nonzero(array)) * array.itemsize + (array.size + 7) // 8


def _wants_bitmap(array: NDArray[Any]) -> bool:
    return array.nbytes >= _SMALLEST_BITMAP and _bitmap_bytes(array) < 0.9 * array.nbytes


def _with_bitmaps(weights: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The arrays as they are stored."""
    stored: dict[str, NDArray[Any]] = {}
    for name, array in weights.items():
        if not _wants_bitmap(array):
            stored[name] = array
            continue
        stored[f"{name}{_BITS}"] = np.packbits(array.reshape(-1) != 0)
        stored[f"{name}{_VALUES}"] = array[array != 0]
        stored[f"{name}{_SHAPE}"] = np.array(array.shape, np.int64)
    return stored


def _without_bitmaps(stored: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The arrays as kernels read them."""
    weights: dict[str, NDArray[Any]] = {}
    for key, array in stored.items():
        name = key.removesuffix(_BITS)
        if name != key:
            values, shape = stored[f"{name}{_VALUES}"], tuple(int(s) for s in stored[f"{name}{_SHAPE}"])
            spread = np.zeros(math.prod(shape), values.dtype)
            spread[np.unpackbits(array, count=spread.size).astype(bool)] = values
            weights[name] = spread.reshape(shape)
        elif not key.endswith((_VALUES, _SHAPE)):
            weights[key] = array
    return weights


def write_safetensors(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """Tensors in the safetensors format, data at a multiple of 64 bytes.

    Those whose size is a multiple of 64 bytes come first, so that each of them is aligned when the file is mapped.
    """
    order = sorted(tensors, key=lambda name: (tensors[name].nbytes % ALIGNMENT != 0, name))
    header: dict[str, object] = {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype.name], "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }  # fmt: skip
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return b"".join((len(text).to_bytes(8, "little"), text, *(np.ascontiguousarray(tensors[n]).data for n in order)))


def read_safetensors(data: memoryview) -> dict[str, NDArray[Any]]:
    """Tensors as views into `data`.

    Raises:
        ValueError, KeyError, TypeError: the bytes are not a sound safetensors file.
    """
    length = int.from_bytes(data[:8], "little")
    if length > min(_LARGEST_HEADER, len(data) - 8):
        raise ValueError("header longer than the file")
    header = json.loads(bytes(data[8 : 8 + length]))
    body = data[8 + length :]
    tensors: dict[str, NDArray[Any]] = {}
    end = 0
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        shape = tuple(int(s) for s in entry["shape"])
        if (
            start != end
            or stop > len(body)
            or stop - start != math.prod(shape) * dtype.itemsize
            or min(shape, default=0) < 0
        ):
            raise ValueError(f"tensor {name} has a wrong extent")
        tensors[name] = np.frombuffer(body[start:stop], dtype).reshape(shape)
        end = stop
    if end != len(body):
        raise ValueError("bytes after the last tensor")
    return tensors


def write_artifact(path: str | os.PathLike[str], contents: Contents) -> None:
    """Write an artifact whole or not at all: to a temporary file beside `path`, then renamed.

    Raises:
        ArtifactError: the file cannot be written.
    """
    stored = without_derived(contents.weights, contents.manifest.derived)
    members: dict[str, bytes | memoryview] = {
        WEIGHTS: write_safetensors(_with_bitmaps(stored)), LIBRARY: contents.library,
    }  # fmt: skip
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
    manifest = {**asdict(contents.manifest), "members": hashes}
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    target = Path(path)
    try:
        # named by hand: tempfile makes files that their owner alone may read
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
        try:
            _write_zip(temporary, {MANIFEST: text, **members})
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror}", remedy="choose another path") from error


def _write_zip(path: Path, members: Mapping[str, bytes | memoryview]) -> None:
    """Store each member at a multiple of 64 bytes; then hash what lies outside them into the comment."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            entry = zipfile.ZipInfo(name)  # its date is fixed: equal contents give equal files
            assert archive.fp is not None
            start = archive.fp.tell() + _LOCAL_HEADER + len(name) + 4
            padding = -start % ALIGNMENT
            entry.extra = b"\xcc\x6d" + padding.to_bytes(2, "little") + bytes(padding)
            archive.writestr(entry, data)
        archive.comment = bytes(64)
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        payloads = [_payload(memoryview(raw), entry) for entry in archive.infolist()]
    raw[-64:] = _outside_hash(memoryview(raw), payloads[1:]).encode()
    path.write_bytes(raw)


def _payload(file: memoryview, entry: zipfile.ZipInfo) -> range:
    """Where a member's data lies in the file."""
    header = file[entry.header_offset : entry.header_offset + _LOCAL_HEADER]
    if len(header) != _LOCAL_HEADER or bytes(header[:4]) != b"PK\x03\x04":
        raise ValueError("no local header")
    name_length, extra_length = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    start = entry.header_offset + _LOCAL_HEADER + name_length + extra_length
    if start + entry.file_size > len(file) or entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError("member outside the file, or compressed")
    return range(start, start + entry.file_size)


def _outside_hash(file: memoryview, payloads: list[range]) -> str:
    """SHA-256 of all bytes outside the payloads and the comment."""
    digest = hashlib.sha256()
    position = 0
    for payload in sorted(payloads, key=lambda p: p.start):
        if payload.start < position:
            raise ValueError("members overlap")
        digest.update(file[position : payload.start])
        position = payload.stop
    digest.update(file[position : len(file) - 64])
    return digest.hexdigest()


def read_artifact(path: str | os.PathLike[str]) -> Contents:
    """Map an artifact, checking every byte before any of it is used.

    Raises:
        ArtifactError: the file is missing, truncated, altered, of another kind, or of a newer format.
    """
    name = os.fspath(path)
    try:
        with Path(name).open("rb") as file:
            # a private copy-on-write map: numpy refuses to hand read-only memory to a kernel
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read {name}: {getattr(error, 'strerror', None) or 'the file is empty'}") from error
    try:
        members = _read_members(mapped)
        return _read_contents(name, members)
    except (
        zipfile.BadZipFile,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        NotImplementedError,
        OverflowError,
    ) as error:
        raise ArtifactError(
            f"{name} is damaged or not an mcc artifact: {error}", remedy="copy or compile it again"
        ) from error


def _read_members(mapped: mmap.mmap) -> dict[str, memoryview]:
    view = memoryview(mapped)
    with zipfile.ZipFile(mapped) as archive:  # type: ignore[call-overload]  # a map reads, seeks and tells as files do
        entries = archive.infolist()
        if len(archive.comment) != 64 or len({e.filename for e in entries}) != len(entries):
            raise ValueError("it does not end as an artifact does")
        payloads = {entry.filename: _payload(view, entry) for entry in entries}
        comment = archive.comment
    outside = _outside_hash(view, [p for member, p in payloads.items() if member != MANIFEST])
    if outside.encode() != comment:
        raise ValueError("its hash does not match")
    return {member: view[p.start : p.stop] for member, p in payloads.items()}


def _read_derived(data: Mapping[str, Any]) -> Derived:
    cuts = Cuts(**{**data["cuts"], "block": tuple(data["cuts"]["block"])})
    return Derived(data["source"], tuple(data["read"]), data["form"], tuple(data["makes"]), cuts)


def _read_workspace(data: Any) -> Workspace:
    """A workspace whose places lie inside it.

    Raises:
        ValueError: one does not.
    """
    size, places = data["size"], tuple(Place(p["offset"], tuple(p["shape"]), p["dtype"]) for p in data["places"])
    for place in places:
        numbers = (size, place.offset, *place.shape)
        if place.dtype not in PLACED or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"an activation cannot be {place.dtype} {list(place.shape)} at {place.offset}")
        end = place.offset + math.prod(place.shape) * np.dtype(place.dtype).itemsize
        if place.offset % ALIGNMENT or end > size:
            raise ValueError(f"an activation from {place.offset} to {end} does not lie in a workspace of {size} bytes")
    return Workspace(size, places)


def _read_contents(name: str, members: dict[str, memoryview]) -> Contents:
    data = json.loads(bytes(members[MANIFEST]))
    version = data["format_version"]
    if type(version) is not int or version != FORMAT_VERSION:
        raise ArtifactError(
            f"{name} has format version {version!r}, this mcc reads {FORMAT_VERSION}",
            remedy="compile it again, or install the mcc that made it",
        )
    hashes = data.pop("members")
    if set(hashes) | {MANIFEST} != set(members):
        raise ValueError("its members are not those its manifest lists")
    for member, digest in hashes.items():
        if hashlib.sha256(members[member]).hexdigest() != digest:
            raise ValueError(f"the hash of {member} does not match")
    specs = {
        key: tuple(TensorSpec(s["name"], tuple(s["shape"]), s["dtype"], s["alignment"]) for s in data[key])
        for key in ("inputs", "outputs")
    }
    tuples = {key: tuple(data[key]) for key in ("features", "weights")}
    derived = tuple(map(_read_derived, data["derived"]))
    placed = {"workspace": _read_workspace(data["workspace"]), "derived": derived}
    manifest = Manifest(**{**data, **specs, **tuples, **placed})
    weights = _without_bitmaps(read_safetensors(members[WEIGHTS]))
    for made in derived:
        weights |= made.made(weights)
    if not set(manifest.weights) <= set(weights):
        raise ValueError("a weight that the library takes is missing")
    return Contents(manifest, weights, members[LIBRARY])
