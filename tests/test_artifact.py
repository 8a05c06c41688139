"""The .mcc file: what is written is read; damage of any kind is refused in one line."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from networks import mlp

import mcc
from mcc.artifact import (
    FORMAT_VERSION,
    Contents,
    Manifest,
    Place,
    TensorSpec,
    Workspace,
    read_artifact,
    read_safetensors,
    stored_bytes,
    write_artifact,
    write_safetensors,
)
from mcc.errors import ArtifactError
from mcc.target import Target


def contents(**changes) -> Contents:
    """A small artifact with every kind of member; one array has enough zeros for a bitmap."""
    manifest = Manifest(
        inputs=(TensorSpec("x", ("batch", 3), "float32"),), outputs=(TensorSpec("y", ("batch", 3), "float32", 4),),
        output_tree={"tuple": ["y", None]}, target="cpu:avx2", features=("avx2",), passes="quantize", weights=("w", "z", "v"),
        report={"passes": [], "layers": []}, tiles={"fc": "4x2"}, **changes,
    )  # fmt: skip
    sparse = np.zeros((64, 64), np.float32)
    sparse[::3] = 2.5
    weights = {"w": np.arange(64, dtype=np.float32).reshape(8, 8), "z": sparse, "v": np.arange(3, dtype=np.uint16)}
    return Contents(manifest, weights, b"\x7fELF" + bytes(range(256)))


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "a.mcc"
    write_artifact(path, contents())
    return path


def test_what_is_written_is_read(written):
    found = read_artifact(written)
    assert found.manifest == contents().manifest
    assert bytes(found.library) == contents().library
    for name, array in contents().weights.items():
        assert np.array_equal(found.weights[name], array)


def test_weights_are_mapped_aligned_and_may_be_handed_to_a_kernel(written):
    weight = read_artifact(written).weights["w"]
    assert weight.ctypes.data % 64 == 0
    assert weight.flags.writeable
    assert not weight.flags.owndata


def test_an_array_of_mostly_zeros_is_stored_without_them(written):
    array = contents().weights["z"]
    assert stored_bytes(array) == 22 * 64 * 4 + 64 * 64 // 8
    assert written.stat().st_size < array.nbytes


def test_equal_contents_give_equal_files_and_an_old_file_is_replaced_whole(tmp_path, written):
    write_artifact(tmp_path / "b.mcc", contents())
    assert written.read_bytes() == (tmp_path / "b.mcc").read_bytes()
    write_artifact(written, contents(sorts=True))
    assert read_artifact(written).manifest.sorts
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mcc", "b.mcc"]


def test_a_flip_of_any_byte_is_noticed(written):
    raw = written.read_bytes()
    random = np.random.default_rng(0)
    for position in range(len(raw)):
        damaged = bytearray(raw)
        damaged[position] ^= 1 << int(random.integers(8))
        written.write_bytes(damaged)
        with pytest.raises(ArtifactError):
            read_artifact(written)


def test_a_flip_in_every_region_of_a_real_artifact_is_noticed(tmp_path):
    path = tmp_path / "real.mcc"
    mcc.compile(mlp(12, 16, 4), (torch.randn(2, 12),), measure="never", tuning="model").save(path)
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = {e.filename: e.header_offset for e in archive.infolist()}
    places = [
        0,
        14,
        28,
        *members.values(),
        *(o + 64 for o in members.values()),
        *range(100, len(raw), 977),
        len(raw) - 80,
        len(raw) - 1,
    ]
    for position in places:
        damaged = bytearray(raw)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError) as caught:
            mcc.load(path)
        assert len(str(caught.value).splitlines()) <= 2


def test_a_truncated_file_is_refused(written):
    raw = written.read_bytes()
    for length in range(0, len(raw), 53):
        written.write_bytes(raw[:length])
        with pytest.raises(ArtifactError):
            read_artifact(written)


@pytest.mark.parametrize(("data", "message"), [
    (b"", "the file is empty"), (b"PK\x05\x06" + bytes(18), "is damaged or not an mcc artifact"), (b"\x00" * 500, "is damaged or not an mcc artifact"),
])  # fmt: skip
def test_a_foreign_file_is_refused(tmp_path, data, message):
    path = tmp_path / "foreign.mcc"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=message):
        read_artifact(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="cannot read .*No such file"):
        read_artifact(tmp_path / "none.mcc")


def test_another_zip_is_refused(tmp_path):
    path = tmp_path / "other.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", "{}")
    with pytest.raises(ArtifactError, match="it does not end as an artifact does"):
        read_artifact(path)


@pytest.mark.parametrize("version", [FORMAT_VERSION - 1, FORMAT_VERSION + 1])
def test_another_version_is_refused_by_number(tmp_path, version):
    path = tmp_path / "other.mcc"
    write_artifact(path, contents(format_version=version))
    wanted = f"has format version {version}, this mcc reads {FORMAT_VERSION}\n  remedy  compile it again"
    with pytest.raises(ArtifactError, match=wanted):
        read_artifact(path)


def test_an_artifact_for_another_cpu_is_refused_with_what_is_missing(tmp_path, monkeypatch):
    path = tmp_path / "a.mcc"
    artifact = mcc.compile(mlp(4, 3), (torch.randn(2, 4),), target="cpu:avx2", measure="never", tuning="model")
    artifact.save(path)
    monkeypatch.setattr("mcc.runtime.host_features", lambda: frozenset({"avx2", "fma"}))
    with pytest.raises(ArtifactError, match="the artifact is for cpu:avx2; this CPU lacks abm, avx, bmi1"):
        mcc.load(path)


def test_an_artifact_compiled_for_another_cpu_is_saved_and_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr("mcc.target.host_features", lambda: frozenset())
    monkeypatch.setattr("mcc.runtime.host_features", lambda: frozenset())
    artifact = mcc.compile(mlp(4, 3), (torch.randn(2, 4),), target=Target("avx512vnni"), tuning="model")
    artifact.save(tmp_path / "a.mcc")
    assert (tmp_path / "a.mcc").stat().st_size > 0
    with pytest.raises(ArtifactError, match="this CPU lacks"):
        artifact(torch.randn(2, 4))


def test_a_folder_that_is_not_there_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ArtifactError, match="cannot write"):
        write_artifact(tmp_path / "none" / "a.mcc", contents())
    assert list(tmp_path.iterdir()) == []


@given(
    arrays(
        st.sampled_from(["float32", "int8", "uint16", "int64", "bool"]),
        array_shapes(min_dims=0, max_dims=3, min_side=0),
    )
)
def test_safetensors_round_trip_and_agree_with_the_library(array):
    from safetensors.numpy import load

    data = write_safetensors({"a": array, "b": np.zeros(64, np.uint8)})
    for found in (read_safetensors(memoryview(data))["a"], load(data)["a"]):
        np.testing.assert_array_equal(found, array, strict=True)  # NaN equals itself here


@pytest.mark.parametrize("header", [
    {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
    {"a": {"dtype": "X", "shape": [1], "data_offsets": [0, 4]}}, {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, {},
])  # fmt: skip
def test_safetensors_that_lie_about_their_extent_are_refused(header):
    text = json.dumps(header).encode()
    with pytest.raises((ValueError, KeyError)):
        read_safetensors(memoryview(len(text).to_bytes(8, "little") + text + bytes(8)))


@pytest.mark.parametrize("place", [
    Place(-64, (4,), "float32"), Place(4, (4,), "float32"), Place(0, (-1, -4), "float32"), Place(64, (40,), "float32"),
    Place(0, (4,), "object"), Place(1 << 40, (4,), "float32"), Place(0, (4.0,), "float32"),
])  # fmt: skip
def test_an_activation_outside_its_workspace_is_refused(tmp_path, place):
    path = tmp_path / "outside.mcc"
    write_artifact(path, contents(workspace=Workspace(128, (place,))))
    with pytest.raises(ArtifactError, match="damaged or not an mcc artifact: an activation"):
        read_artifact(path)
