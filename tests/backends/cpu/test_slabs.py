"""Sparse weights in parts of outputs by slabs of inputs, and the layers that read them."""

from __future__ import annotations

import itertools
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from regions import make_weight
from torch import nn
from torch.nn.utils.prune import l1_unstructured, remove

import mcc
from mcc.artifact import WEIGHTS, Contents, Manifest, read_artifact, read_safetensors, write_artifact
from mcc.backends.cpu.kernels.block_pairs import pack_pairs
from mcc.backends.cpu.kernels.slab_products import FEWEST_OUTPUTS, MOST_OUTPUTS, SLAB_BYTES, cut
from mcc.backends.cpu.kernels.slab_rows import elements_of
from mcc.backends.kernel import SparseArrays
from mcc.errors import ArtifactError
from mcc.passes.prune_weights import PruneWeights
from mcc.slabs import ARRAYS, PACKED, PAIR_ARRAYS, Cuts, Derived, Elements, at_once, pack_slabs
from mcc.sparse_formats import BLOCKS
from mcc.target import missing_features, parse_target

NARROW, WIDE = parse_target("cpu:avx2"), parse_target("cpu:avx512vnni")


def unpacked(packed, cuts):
    """The dense weight that arrays of `pack_slabs` stand for, read as the kernel reads them."""
    values = packed["slab_values"].reshape(-1, *cuts.block)
    dense = np.zeros((cuts.outputs, cuts.inputs, *cuts.block), values.dtype)
    number = 0
    for part in range(cuts.parts):
        outputs = min(cuts.part, cuts.outputs - part * cuts.part)
        for slab in range(cuts.slabs):
            at = packed["slab_begins"][part * cuts.slabs + slab]
            for count, output in zip(
                *(packed[key][number : number + outputs] for key in ("slab_counts", "slab_order")), strict=True
            ):
                columns = slab * cuts.slab + packed["slab_columns"][at : at + count].astype(int)
                dense[part * cuts.part + output, columns] = values[at : at + count]
                at += count
            number += outputs
    return dense.swapaxes(1, 2).reshape(cuts.outputs * cuts.block[0], -1)


def elements(weight):
    output, column = np.nonzero(weight.decoded())
    return Elements(weight.decoded()[output, column], output, column)


@given(
    outputs=st.integers(1, 70), inputs=st.integers(1, 90), part=st.sampled_from([16, 32, 80]),
    slab=st.integers(1, 90), density=st.sampled_from([0.0, 0.05, 0.4, 1.0]), dtype=st.sampled_from(["float32", "int8"]),
)  # fmt: skip
def test_slabs_hold_every_weight_once(outputs, inputs, part, slab, density, dtype):
    weight = make_weight((outputs, inputs), dtype, 3, density=density)
    cuts = Cuts(outputs, inputs, part, slab)
    packed = pack_slabs(elements(weight), cuts)
    np.testing.assert_array_equal(unpacked(packed, cuts), weight.decoded())
    assert packed["slab_values"].size == max(1, np.count_nonzero(weight.decoded()))
    assert packed["slab_columns"].itemsize == 1


def test_outputs_with_equally_many_elements_stand_together():
    weight = make_weight((40, 30), "float32", 3, density=0.3)
    counts = pack_slabs(elements(weight), Cuts(40, 30, 32, 10))["slab_counts"]
    for first, outputs in ((0, 32), (96, 8)):
        of_part = counts[first : first + 3 * outputs].reshape(3, outputs)
        assert (np.diff(of_part.astype(int)) >= 0).all()


@given(
    outputs=st.integers(1, 5000), inputs=st.integers(1, 5000), kept=st.integers(0, 10**6),
    rows=st.sampled_from([16, 32, 64]), wanted=st.integers(1, 4),
)  # fmt: skip
def test_slabs_stay_in_the_nearest_cache_unless_outputs_have_few_elements_in_them(outputs, inputs, kept, rows, wanted):
    kept = min(kept, outputs * inputs)
    stored = SparseArrays(np.empty(kept, np.int8), np.empty(0), np.empty(0))
    cuts = cut(stored, (outputs, inputs), rows, 16, wanted)
    assert cuts.parts * cuts.part >= outputs > (cuts.parts - 1) * cuts.part
    assert cuts.slabs * cuts.slab >= inputs > (cuts.slabs - 1) * cuts.slab
    assert cuts.part <= MOST_OUTPUTS
    assert cuts.parts <= max(wanted, -(-outputs // (MOST_OUTPUTS - 16)))
    assert cuts.part > FEWEST_OUTPUTS // 2 or cuts.parts == 1
    held = cuts.slab * rows * 4
    each = kept / (outputs * cuts.slabs)
    assert cuts.slabs == 1 or (held >= SLAB_BYTES / 2 and each >= 4)
    assert held <= 2 * SLAB_BYTES or each <= 16


@given(
    rows=st.integers(1, 5), columns=st.integers(1, 9), block=st.sampled_from([(1, 1), *BLOCKS]),
    density=st.sampled_from([0.0, 0.1, 1.0]), dtype=st.sampled_from(["float32", "int8"]),
)  # fmt: skip
def test_what_kernels_for_few_rows_read_is_made_of_slabs_as_of_the_weight(rows, columns, block, density, dtype):
    shape = rows * 7 * block[0], columns * block[1]
    weight = make_weight(shape, dtype, 3, density=density, block=block)
    form, cuts = "groups" if block == (1, 1) else "blocks", Cuts(rows * 7, columns, 8, min(5, columns), block)
    stored = elements_of(weight.sparse)
    expected = PACKED[form](stored, cuts)
    made = Derived.of("slabs", form, cuts).made(pack_slabs(stored, cuts))
    assert made.keys() == expected.keys() == set(ARRAYS[form])
    for key, array in expected.items():
        np.testing.assert_array_equal(made[key], array)
        assert made[key].dtype == array.dtype


@given(
    outputs=st.integers(1, 70), inputs=st.integers(1, 90), density=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    dtype=st.sampled_from(["float32", "int8"]),
)  # fmt: skip
def test_groups_take_outputs_by_number_of_elements_and_hold_every_weight_once(outputs, inputs, density, dtype):
    weight = make_weight((outputs, inputs), dtype, 5, density=density)
    packed = PACKED["groups"](elements_of(weight.sparse), Cuts(outputs, inputs, outputs, inputs))
    values, columns, lanes = (packed[key].reshape(-1, 16) for key in ("values", "columns", "outputs"))
    counts = np.pad(np.diff(weight.sparse.row_pointers), (0, -outputs % 16))
    assert list(counts[packed["outputs"]]) == sorted(counts, reverse=True)
    found = np.zeros((len(counts), inputs))
    for group, (first, end) in enumerate(itertools.pairwise(packed["group_starts"])):
        assert end - first == counts[lanes[group]].max()
        np.add.at(found, (np.broadcast_to(lanes[group], (end - first, 16)), columns[first:end]), values[first:end])
    np.testing.assert_array_equal(found[:outputs], weight.decoded())
    assert len(values) == max(1, packed["group_starts"][-1])


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 9), block=st.sampled_from(BLOCKS),
    density=st.sampled_from([0.0, 0.3, 1.0]),
)  # fmt: skip
def test_rows_of_blocks_are_filled_up_to_whole_steps(rows, columns, block, density):
    (high, wide), shape = block, (rows * block[0], columns * block[1])
    weight = make_weight(shape, "float32", 3, density=density, block=block)
    packed = PACKED["blocks"](elements_of(weight.sparse), Cuts(rows, columns, rows, columns, block))
    values, found = packed["values"].reshape(-1, high, wide), np.zeros((rows, columns, high, wide), np.float32)
    for row, (first, end) in enumerate(itertools.pairwise(packed["starts"])):
        assert (end - first) % at_once(block) == 0
        np.add.at(found[row], packed["columns"][first:end], values[first:end])
    np.testing.assert_array_equal(found.swapaxes(1, 2).reshape(shape), weight.decoded())
    assert len(values) >= at_once(block)


SETTINGS = {"measure": "never", "tuning": "model", "verify": False}
TARGETS = {"pairs": WIDE, "pairs apart": WIDE, "groups": NARROW, "blocks": NARROW}


@pytest.mark.parametrize("form", TARGETS)
def test_an_artifact_for_any_number_of_rows_stores_one_form_and_makes_slabs_when_it_is_loaded(tmp_path, form):
    if missing_features(TARGETS[form]):
        pytest.skip("this CPU permutes no two registers")
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(512, 80), nn.ReLU(), nn.Linear(80, 32)), torch.randn(200, 512)
    if form == "pairs apart":  # every output reads a window of its own
        with torch.no_grad():
            model[0].weight *= (torch.arange(512) // 64 == torch.arange(80)[:, None] % 8) * 10 + 0.01
    passes = [PruneWeights(ratio=0.9, scope="layer", pattern="16x1" if form == "blocks" else "")]
    batch = {"dynamic_shapes": ({0: "batch"},), "target": str(TARGETS[form])}
    made = mcc.compile(model, (x,), passes=passes, **batch, **SETTINGS)
    made.save(tmp_path / "a.mcc")
    held, contents = read_safetensors(memoryview(member(tmp_path / "a.mcc"))), read_artifact(tmp_path / "a.mcc")
    derived = contents.manifest.derived
    pairs = form.startswith("pairs")
    expected = [(form, "slabs"), ("pairs", "slabs")] if pairs else [("slabs", form)] * 2
    assert [(d.source, d.form) for d in derived] == expected
    made_names = {name for d in derived for name in d.makes}
    assert len(made_names) == 2 * len(ARRAYS[derived[0].form])
    assert not made_names & set(held)
    assert made_names < set(contents.manifest.weights)
    stored = sum(array.nbytes for name, array in held.items() if not name.endswith("~shape"))
    assert made.report.passes[-1].size.stored_bytes == stored == sum(row.stored_bytes for row in made.report.layers)
    loaded = mcc.load(tmp_path / "a.mcc")
    for rows in (0, 1, 2, 12, 13, 64, 200):
        torch.testing.assert_close(loaded(x[:rows]), made(x[:rows]), rtol=0, atol=0)
        torch.testing.assert_close(loaded(x[:rows]), loaded(x)[:rows], rtol=1e-5, atol=1e-6)


def member(path):
    with zipfile.ZipFile(path) as archive:
        return archive.read(WEIGHTS)


@pytest.mark.parametrize(("changed", "message"), [
    ({"cuts": Cuts(0, 64, 16, 64)}, "no weight has"), ({"cuts": Cuts(17, 64, 16, 64)}, "are none of"),
    ({"cuts": Cuts(16, 1 << 20, 16, 64)}, "are none of"), ({"cuts": Cuts(16, 64, 16, 1.5)}, "no weight has"),
    ({"cuts": Cuts(16, 64, 16, 64, (0, 1))}, "no weight has"), ({"cuts": Cuts(16, 9, 16, 9)}, "an element 15 of 9"),
    ({"cuts": Cuts(16, 64, 16, 64, (1, 1, 1))}, "no weight has"), ({"cuts": Cuts(16, 64, 16, 64, (4, 4))}, "are none of"),
    ({"source": "slabs"}, "runs of elements are none of"), ({"source": "heaps"}, "'heaps'"),
    ({"form": "heaps"}, "'heaps'"),
    ({"read": ("a", "b", "c", "d", "none")}, "'none'"),
])  # fmt: skip
def test_slabs_that_cannot_be_made_are_refused(tmp_path, changed, message):
    steps = pack_pairs(np.eye(16, 64, dtype=np.float32))
    weights = {name: getattr(steps, key) for name, key in zip("abcde", PAIR_ARRAYS, strict=True)}
    derived = Derived("pairs", tuple("abcde"), "slabs", tuple("vwxyz"), Cuts(16, 64, 16, 64))

    def write(derived):
        path, empty = tmp_path / "a.mcc", Manifest((), (), None, "cpu:avx2", (), "", tuple("abcde"), {}, {})
        write_artifact(path, Contents(replace(empty, derived=(derived,)), weights, b"library"))
        return path

    assert read_artifact(write(derived)).weights["v"].tolist() == [1.0] * 16
    with pytest.raises(ArtifactError, match=f"damaged or not an mcc artifact: .*{message}"):
        read_artifact(write(replace(derived, **changed)))


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(64, 784, 256), (200, 300, 1100), (67, 131, 17)])
def test_two_threads_give_what_one_gives_and_both_what_the_network_gives(rows, inputs, outputs):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU()), torch.randn(rows, inputs)
    l1_unstructured(model[0], "weight", 0.9)
    remove(model[0], "weight")
    one, two = (mcc.compile(model, (x,), passes=[PruneWeights(ratio=0.9)], threads=n, **SETTINGS) for n in (1, 2))
    assert [(row.kernel.split()[0], row.op) for row in one.report.layers] == [("sparse_slabs", "linear + relu")]
    torch.testing.assert_close(two(x), one(x), rtol=0, atol=0)
    with torch.no_grad():
        expected = model.double()(x.double())
    torch.testing.assert_close(one(x).double(), expected, rtol=1e-5, atol=1e-5)
