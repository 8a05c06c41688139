"""Small calls that go straight to the kernels: they give what TVM's virtual machine gives."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mcc
from mcc.artifact import ALIGNMENT, ARRAY_WORDS, SMALL_CALL
from mcc.errors import ArtifactError
from mcc.small_calls import MOST_SHAPES, arrays_are_readable

QUICK = {"measure": "never", "tuning": "model"}


class Two(nn.Module):
    """Two inputs, outputs of three kinds: a kernel's, a view of a kernel's, and the op library's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(19, 24), nn.Linear(24, 7)

    def forward(self, x, y):
        hidden = self.first(x).relu()
        return {"logits": self.second(hidden) + y, "view": hidden.reshape(-1, 3, 8), "found": (y > 0, [y.softmax(-1)])}


def straight(artifact: mcc.Artifact) -> list[tuple[tuple[int, ...], ...]]:
    """Shapes of the inputs for which the next call does not go through the virtual machine."""
    return artifact._small.shapes


@pytest.mark.parametrize("dims", [None, ({0: "batch"}, {0: "batch"})], ids=["fixed", "dynamic"])
def test_the_second_call_of_a_shape_gives_what_the_first_gave(dims):
    model = Two().eval()
    artifact = mcc.compile(model, (torch.randn(5, 19), torch.randn(5, 7)), dynamic_shapes=dims, **QUICK)
    for batch in (5,) if dims is None else (1, 5, 7):
        x, y = np.random.default_rng(batch).standard_normal((2, batch, 19)).astype(np.float32)
        y = np.ascontiguousarray(y[:, :7])
        first, second, third = artifact(x, y), artifact(x, y), artifact(x.copy(), -y)
        assert ((batch, 19), (batch, 7)) in straight(artifact)
        for a, b in zip(leaves(first), leaves(second), strict=True):
            np.testing.assert_array_equal(a, b)
            assert not np.shares_memory(a, b)
        assert not np.array_equal(third["logits"], first["logits"])
        with torch.no_grad():
            torch.testing.assert_close(
                torch.from_numpy(third["logits"]), model(*map(torch.from_numpy, (x, -y)))["logits"]
            )


def test_dims_of_several_inputs_are_told_apart():
    class Rows(nn.Module):
        def forward(self, x, y, z):
            return x @ y + z, z * 2

    example = torch.randn(3, 5), torch.randn(5, 4), torch.randn(3, 4)
    dims = ({0: "rows", 1: "inner"}, {0: "inner", 1: "columns"}, {0: "rows", 1: "columns"})
    artifact = mcc.compile(Rows().eval(), example, dynamic_shapes=dims, **QUICK)
    for rows, inner, columns in ((3, 5, 4), (7, 2, 6), (2, 7, 5), (7, 2, 6)):
        random = np.random.default_rng(rows)
        x, y, z = (
            random.standard_normal(s).astype(np.float32) for s in ((rows, inner), (inner, columns), (rows, columns))
        )
        for _ in range(2):
            added, doubled = artifact(x, y, z)
            np.testing.assert_allclose(added, x @ y + z, rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(doubled, z * 2)
        assert (x.shape, y.shape, z.shape) in straight(artifact)


@pytest.mark.parametrize(
    ("field", "word"), [("type", 6), ("values", 6), ("rank", 6), ("dims", 5), ("dtype", 6), ("flags", 3)]
)
def test_arrays_laid_out_otherwise_go_through_the_machine(field, word, monkeypatch):
    """Word 3 is the rank, 5 where strides lie, 6 the array whose memory it is, if any."""
    assert arrays_are_readable()
    monkeypatch.setitem(ARRAY_WORDS, field, word)
    assert not arrays_are_readable()
    artifact = linear(32, 32)
    assert artifact._small is None
    assert artifact(np.ones((3, 32), np.float32)).shape == (3, 32)


def leaves(outputs):
    return [outputs["logits"], outputs["view"], outputs["found"][0], *outputs["found"][1]]


def linear(inputs: int, outputs: int, **options: object) -> mcc.Artifact:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(), nn.Linear(outputs, outputs)).eval()
    return mcc.compile(network, (torch.randn(3, inputs),), dynamic_shapes={"input": {0: "batch"}}, **QUICK, **options)


def test_large_and_empty_calls_go_through_the_machine_every_time():
    artifact = linear(32, 32)
    most = SMALL_CALL // (2 * 32 * 4)
    for batch in (0, 1, most, most + 1):
        for _ in range(2):
            assert artifact(np.ones((batch, 32), np.float32)).shape == (batch, 32)
    assert straight(artifact) == [((3, 32),), ((1, 32),), ((most, 32),)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.ones((3, 33), np.float32), "float32[3, 33], the artifact takes float32[batch, 32]"),
        (np.ones((3, 32), np.float64), "float64[3, 32], the artifact takes float32[batch, 32]"),
        (np.ones((1, 3, 32), np.float32), "float32[1, 3, 32], the artifact takes float32[batch, 32]"),
    ],
)
def test_wrong_inputs_are_refused_as_before(wrong, message):
    artifact = linear(32, 32)
    artifact(np.ones((3, 32), np.float32))
    with pytest.raises(ArtifactError) as caught:
        artifact(wrong)
    assert message in str(caught.value)


class Named(np.ndarray):
    """Arrays of a class of their own."""


OTHERS = {
    "shorter": lambda x: x[:2],
    "longer": lambda x: np.concatenate([x, x]),
    "turned": lambda x: np.asfortranarray(x),
    "every second": lambda x: np.repeat(x, 2, 1)[:, ::2],
    "one row, a stride of none": lambda x: np.broadcast_to(x[:1], x.shape),
    "unaligned": lambda x: np.frombuffer(b"_" + x.tobytes(), np.float32, x.size, 1).reshape(x.shape),
    "doubles": lambda x: x.astype(np.float64),
    "integers of that size": lambda x: x.view(np.int32),
    "the other byte order": lambda x: x.astype(">f4"),
    "flat": lambda x: x.reshape(-1),
    "without dims": lambda x: x[0, 0, ...],
    "another class": lambda x: x.view(Named),
    "tensor": torch.from_numpy,
    "list": lambda x: x.tolist(),
    "a number": lambda x: float(x[0, 0]),
    "None": lambda x: None,
}


@pytest.mark.parametrize("other", OTHERS)
def test_the_library_takes_nothing_but_arrays_of_that_shape_dtype_and_layout(other):
    artifact = linear(32, 32)
    x = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    expected = artifact(x)
    np.testing.assert_array_equal(artifact._small_call(x), expected)
    (context,) = artifact._small._last
    left = len(context.left)
    assert artifact._small_call(OTHERS[other](x)) is None
    assert len(context.left) == left
    frozen = x.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(artifact._small_call(frozen), expected)


def test_arrays_of_any_layout_and_of_other_libraries_give_the_same_answer():
    artifact = linear(32, 32)
    x = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    expected = artifact(x)
    frozen = x.copy()
    frozen.flags.writeable = False
    shifted = np.empty(97, np.float32)[1:].reshape(3, 32)
    shifted[...] = x
    for same in (np.asfortranarray(x), frozen, shifted, np.repeat(x, 2, 1)[:, ::2], x[::-1][::-1]):
        np.testing.assert_array_equal(artifact(same), expected)
    found = artifact(torch.from_numpy(x))
    assert isinstance(found, torch.Tensor)
    np.testing.assert_array_equal(found.numpy(), expected)


def test_calls_whose_shapes_take_turns_go_straight_to_the_kernels():
    artifact = linear(32, 32)
    xs = [np.random.default_rng(n).standard_normal((n, 32)).astype(np.float32) for n in (3, 1, 5)]
    expected = [artifact(x) for x in xs]
    for x, y in zip(xs, expected, strict=True):
        np.testing.assert_array_equal(artifact(x), y)  # where it computes is made with the second call
    for x, y in zip(xs * 2, expected * 2, strict=True):
        np.testing.assert_array_equal(artifact._small_call(x), y)
    assert artifact._small_call(np.ones((4, 32), np.float32)) is None


def test_threads_calling_at_once_have_a_workspace_each():
    artifact = linear(64, 48, threads=1)
    xs = [np.random.default_rng(i).standard_normal((i % 4 + 1, 64)).astype(np.float32) for i in range(8)]
    expected = [artifact(x) for x in xs]

    def many(i: int) -> bool:
        return all(np.array_equal(artifact(xs[i]), expected[i]) for _ in range(500))

    with ThreadPoolExecutor(8) as workers:
        assert all(workers.map(many, range(8)))


def test_outputs_that_are_an_input_or_another_output_have_memory_of_their_own():
    class Shares(nn.Module):
        def forward(self, x):
            doubled = x * 2
            return doubled, doubled.reshape(-1), x

    artifact = mcc.compile(Shares().eval(), (torch.randn(2, 8),), **QUICK)
    x = np.ones((2, 8), np.float32)
    for _ in range(2):
        doubled, flat, same = artifact(x)
        np.testing.assert_array_equal(doubled.reshape(-1), flat)
        np.testing.assert_array_equal(same, x)
        assert not any(np.shares_memory(a, b) for a, b in ((doubled, flat), (same, x)))


def test_outputs_without_dims_are_arrays_of_their_own():
    class Sums(nn.Module):
        def forward(self, x):
            return x.sum(), x.amax(), x

    artifact = mcc.compile(Sums().eval(), (torch.randn(4, 8),), **QUICK)
    xs = np.random.default_rng(0).standard_normal((50, 4, 8)).astype(np.float32)
    kept = [artifact(x)[:2] for x in xs]
    for (total, largest), x in zip(kept, xs, strict=True):
        np.testing.assert_allclose(total, x.sum(), rtol=1e-4, atol=1e-5)
        assert largest == x.max()
    assert kept[1][0].shape == ()


def test_outputs_are_never_written_again_and_are_the_callers():
    artifact = linear(16, 4)
    xs = np.random.default_rng(1).standard_normal((100, 3, 16)).astype(np.float32)
    first = artifact(xs[0])
    first.shape = (12,)
    kept = [artifact(x) for x in xs]
    expected = [y.copy() for y in kept]
    kept[7][...] = 0
    for i, (y, e) in enumerate(zip(kept, expected, strict=True)):
        assert y.shape == (3, 4)
        assert i == 7 or np.array_equal(y, e)
    np.testing.assert_array_equal(first.reshape(3, 4), expected[0])


def test_shapes_that_are_not_small_leave_room_for_those_that_are():
    artifact = linear(32, 32)
    for extra in range(MOST_SHAPES + 5):
        artifact(np.ones((SMALL_CALL // 128 + extra, 32), np.float32))
    artifact(np.ones((5, 32), np.float32))
    assert ((5, 32),) in straight(artifact)
    for batch in range(1, 2 * MOST_SHAPES):
        assert artifact(np.ones((batch, 32), np.float32)).shape == (batch, 32)
    assert len(straight(artifact)) == MOST_SHAPES


def test_the_table_lies_where_vectors_are_read_at_once():
    """The library's loads of it are aligned ones."""
    tables = []
    for outputs in range(1, 9):
        artifact = linear(16, outputs)
        artifact(np.ones((3, 16), np.float32))
        tables += [context._entries for contexts, _ in artifact._small._known.values() for context in contexts]
    assert len(tables) >= 8
    assert not any(table.ctypes.data % ALIGNMENT for table in tables)


def test_calls_free_the_memory_they_compute_in():
    artifact = linear(64, 512)
    for batch in (1, 7, 1):
        x = np.ones((batch, 64), np.float32)
        artifact(x), artifact(x)
        before = resident_bytes()
        for _ in range(2000):
            artifact(x)
        assert resident_bytes() - before < 2000 * batch * 512 * 4 / 2


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
