"""Axes: terms that are tied become equal, reshapes keep track of every index, what does not fit is blocked."""

from __future__ import annotations

import random
from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from mcc.axes import (
    Axis,
    Product,
    Sum,
    axes_of,
    cut,
    kept_indices,
    kept_size,
    positions,
    regrouped,
    resolved,
    size,
    tie,
)


def chosen(terms, rng):
    """Some indices of every open axis."""
    kept = {}
    for axis in dict.fromkeys(a for t in terms for a in axes_of(t)):
        if not axis.blocked:
            kept[axis] = torch.tensor(sorted(rng.sample(range(axis.size), rng.randint(1, axis.size))))
    return kept


def test_channels_tied_to_heads_are_their_product_everywhere():
    channels, other = Axis(192), Axis(192)
    tie(channels, other, "add")
    parts = regrouped([channels], [3, 4, 16], "reshape")
    assert [size(p) for p in parts] == [3, 4, 16]
    assert resolved(other) == Product(tuple(resolved(p) for p in parts))
    kept = {resolved(parts[1]): torch.tensor([0, 3])}
    assert kept_size(other, kept) == 96
    assert kept_indices(other, kept)[:33].tolist() == [*range(16), *range(48, 64), 64]


def test_joined_parts_and_a_sum_of_other_parts_are_cut_where_either_is():
    a, b, c, d = Axis(3), Axis(5), Axis(4), Axis(4)
    tie(Sum((a, b)), Sum((c, d)), "add")
    assert resolved(Sum((a, b))) == resolved(Sum((c, d)))
    assert [x.size for x in axes_of(Sum((a, b)))] == [3, 1, 4]
    assert list(axes_of(d)) == [list(axes_of(b))[1]]


def test_a_shuffle_of_two_joined_branches_ties_them():
    left, right = Axis(8), Axis(8)
    groups, inner = regrouped([Sum((left, right))], [2, 8], "reshape")
    assert resolved(left) == resolved(right) == resolved(inner)
    assert [a.size for a in axes_of(groups)] == [1, 1]


def test_what_does_not_fit_is_blocked_with_the_place():
    a, b = Axis(6), Axis(2)
    made = regrouped([a, b], [4, 3], "reshape %r")
    for term in (a, b, *made):
        assert all("reshape %r" in reason for axis in axes_of(term) for reason in axis.blocked)
        assert all(axis.blocked for axis in axes_of(term))


def test_a_blocked_axis_blocks_what_it_is_tied_to():
    a, b = Axis(12, ["x is an input"]), Axis(12)
    tie(Product((Axis(3), Axis(4))), b, "add")
    tie(a, b, "add")
    assert all(axis.blocked for axis in axes_of(b))


def test_rotated_halves_tie_them():
    """As rotary embeddings do: cat(-second, first) + x."""
    whole = Axis(16)
    first, second = cut(whole, [8, 16])
    tie(Sum((second, first)), whole, "add")
    assert resolved(first) == resolved(second)


@st.composite
def reshapes(draw):
    """Sizes before and after a reshape: groupings of one list of factors, each a dim of its own or merged."""
    factors = draw(st.lists(st.sampled_from([1, 2, 2, 3, 4, 5, 6]), min_size=1, max_size=5))
    ways = []
    for _ in range(2):
        sizes = [1]
        for factor in factors:
            if draw(st.booleans()):
                sizes.append(factor)
            else:
                sizes[-1] *= factor
        ways.append(sizes)
    return ways


@given(reshapes(), st.integers(0, 10**6))
def test_a_reshape_follows_every_index(sizes, seed):
    """Taking indices before a reshape and after it gives the same elements in the same order."""
    before, after = sizes
    dims = [Axis(s) for s in before]
    made = regrouped(dims, after, "reshape")
    assert [size(t) for t in made] == after
    kept = chosen([*dims, *made], random.Random(seed))
    whole = torch.arange(prod(before))
    found = []
    for terms, shape in ((dims, before), (made, after)):
        part = whole.reshape(shape)
        for i, term in enumerate(terms):
            part = part.index_select(i, kept_indices(term, kept))
            assert part.shape[i] == kept_size(term, kept)
        found.append(part.flatten())
    assert torch.equal(*found)


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data()
)
def test_tied_terms_keep_the_same_indices(first, second, data):
    """Sums and products of any shape, tied to a term of the same size, whatever is chosen afterwards."""
    a = data.draw(st.sampled_from([Sum, Product]))(tuple(Axis(s) for s in first))
    parts = tuple(Axis(s) for s in second)
    b = data.draw(st.sampled_from([Sum, Product]))(parts)
    missing = size(a) - size(b)
    if missing > 0:
        b = Sum((b, Axis(missing)))
    elif missing < 0:
        a = Sum((a, Axis(-missing)))
    tie(a, b, "add")
    kept = chosen([a, b], random.Random(data.draw(st.integers(0, 10**6))))
    assert torch.equal(kept_indices(a, kept), kept_indices(b, kept))


def test_positions_say_which_index_of_an_axis_a_dim_is_at():
    a, b, c = Axis(2), Axis(3), Axis(4)
    term = Sum((Product((a, b)), c))
    assert positions(term, a).tolist() == [0, 0, 0, 1, 1, 1, -1, -1, -1, -1]
    assert positions(term, b).tolist() == [0, 1, 2, 0, 1, 2, -1, -1, -1, -1]
    assert positions(term, c).tolist() == [-1] * 6 + [0, 1, 2, 3]


def test_a_long_axis_against_itself_moved_by_one_is_blocked_at_once():
    """As the difference of neighbours does: x[1:] - x[:-1]."""
    for blocked in ([], ["%x is an input"]):
        whole = Axis(100_000, blocked)
        before, after = cut(whole, [99_999, 100_000])[0], cut(whole, [1, 100_000])[1]
        tie(before, after, "sub")
        assert all(axis.blocked for axis in axes_of(whole))
