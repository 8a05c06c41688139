"""Sparse weights in parts of outputs by slabs of inputs, and the layers that read them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from regions import make_weight
from torch import nn
from torch.nn.utils.prune import l1_unstructured, remove

import mcc
from mcc.backends.cpu.kernels.slabs import FEWEST_OUTPUTS, MOST_OUTPUTS, SLAB_BYTES, Cuts, cut, pack_slabs
from mcc.backends.kernel import SparseArrays
from mcc.passes.prune_weights import PruneWeights


def unpacked(packed, cuts):
    """The dense weight that arrays of `pack_slabs` stand for, read as the kernel reads them."""
    dense = np.zeros((cuts.outputs, cuts.inputs), packed["values"].dtype)
    number = 0
    for part in range(cuts.parts):
        outputs = min(cuts.part, cuts.outputs - part * cuts.part)
        for slab in range(cuts.slabs):
            at = packed["begins"][part * cuts.slabs + slab]
            for count, output in zip(
                *(packed[key][number : number + outputs] for key in ("counts", "order")), strict=True
            ):
                columns = slab * cuts.slab + packed["columns"][at : at + count].astype(int)
                dense[part * cuts.part + output, columns] = packed["values"][at : at + count]
                at += count
            number += outputs
    return dense


@given(
    outputs=st.integers(1, 70), inputs=st.integers(1, 90), part=st.sampled_from([16, 32, 80]),
    slab=st.integers(1, 90), density=st.sampled_from([0.0, 0.05, 0.4, 1.0]), dtype=st.sampled_from(["float32", "int8"]),
)  # fmt: skip
def test_slabs_hold_every_weight_once(outputs, inputs, part, slab, density, dtype):
    weight = make_weight((outputs, inputs), dtype, 3, density=density)
    cuts = Cuts(outputs, inputs, part, slab)
    packed = pack_slabs(weight.sparse, cuts)
    np.testing.assert_array_equal(unpacked(packed, cuts), weight.decoded())
    assert packed["values"].size == max(1, weight.sparse.values.size)
    assert packed["columns"].itemsize == 1


def test_outputs_with_equally_many_elements_stand_together():
    weight = make_weight((40, 30), "float32", 3, density=0.3)
    counts = pack_slabs(weight.sparse, Cuts(40, 30, 32, 10))["counts"]
    for first, outputs in ((0, 32), (96, 8)):
        of_part = counts[first : first + 3 * outputs].reshape(3, outputs)
        assert (np.diff(of_part.astype(int)) >= 0).all()


@given(
    outputs=st.integers(1, 5000), inputs=st.integers(1, 5000), kept=st.integers(0, 10**6),
    rows=st.sampled_from([16, 32, 64]), wanted=st.integers(1, 4),
)  # fmt: skip
def test_slabs_stay_in_the_nearest_cache_unless_outputs_have_few_elements_in_them(outputs, inputs, kept, rows, wanted):
    kept = min(kept, outputs * inputs)
    weight = SparseArrays(np.zeros(kept, np.float32), np.zeros(kept, np.uint16), np.zeros(outputs + 1, np.int32))
    cuts = cut(weight, (outputs, inputs), rows, 16, wanted)
    assert cuts.parts * cuts.part >= outputs > (cuts.parts - 1) * cuts.part
    assert cuts.slabs * cuts.slab >= inputs > (cuts.slabs - 1) * cuts.slab
    assert cuts.part <= MOST_OUTPUTS
    assert cuts.parts <= max(wanted, -(-outputs // (MOST_OUTPUTS - 16)))
    assert cuts.part > FEWEST_OUTPUTS // 2 or cuts.parts == 1
    held = cuts.slab * rows * 4
    each = kept / (outputs * cuts.slabs)
    assert cuts.slabs == 1 or (held >= SLAB_BYTES / 2 and each >= 4)
    assert held <= 2 * SLAB_BYTES or each <= 16


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(64, 784, 256), (200, 300, 1100), (67, 131, 17)])
def test_two_threads_give_what_one_gives_and_both_what_the_network_gives(rows, inputs, outputs):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU()), torch.randn(rows, inputs)
    l1_unstructured(model[0], "weight", 0.9)
    remove(model[0], "weight")
    settings = {"measure": "never", "tuning": "model", "verify": False}
    one, two = (mcc.compile(model, (x,), passes=[PruneWeights(ratio=0.9)], threads=n, **settings) for n in (1, 2))
    assert [(row.kernel.split()[0], row.op) for row in one.report.layers] == [("sparse_slabs", "linear + relu")]
    torch.testing.assert_close(two(x), one(x), rtol=0, atol=0)
    with torch.no_grad():
        expected = model.double()(x.double())
    torch.testing.assert_close(one(x).double(), expected, rtol=1e-5, atol=1e-5)
