"""Axes: what dims are made of, so that dims of one graph that must shrink together can be told.

A dim is a term over axes. An axis stands for itself; a product counts its factors row by row, as `reshape` merges
dims; a sum lays its parts end to end, as `cat` joins them. Tying two dims makes their terms equal, and splits axes
where that takes it: 192 channels tied to 3 x 4 x 16 are from then on the product of three axes, wherever they stand.
What is left in the end are the axes whose indices can be removed one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor


class Axis:
    """Indices of which each may be kept or removed, if nothing blocks that.

    Attributes:
        size: how many.
        blocked: why none may be removed; empty where some may.
    """

    def __init__(self, size: int, blocked: Sequence[str] = ()) -> None:
        self.size = size
        self.blocked: dict[str, None] = dict.fromkeys(blocked)
        self._meaning: Term | None = None

    def stands_for(self, term: Term) -> None:
        """From now on this is that term, of the same size."""
        for axis in axes_of(term):
            axis.blocked.update(self.blocked)
        self._meaning = term

    @property
    def meaning(self) -> Term:
        """This axis, or what it was found to stand for, resolved."""
        if self._meaning is None:
            return self
        self._meaning = resolved(self._meaning)  # kept, or chains of splits grow long
        return self._meaning


@dataclass(frozen=True)
class Product:
    """Index i of n factors is i_1 * size_2 * … + … + i_n: the last factor runs fastest."""

    factors: tuple[Term, ...]


@dataclass(frozen=True)
class Sum:
    """The indices of each part, one part after the other."""

    parts: tuple[Term, ...]


Term = Axis | Product | Sum
UNIT = Product(())


def size(term: Term) -> int:
    """How many indices a term has."""
    if isinstance(term, Axis):
        return term.size
    if isinstance(term, Product):
        return prod(size(f) for f in term.factors)
    return sum(size(p) for p in term.parts)


def resolved(term: Term) -> Term:
    """The term in what its axes stand for: no product right inside a product, no sum inside a sum, nothing idle."""
    if isinstance(term, Axis):
        return term.meaning
    if isinstance(term, Product):
        factors: list[Term] = []
        for factor in map(resolved, term.factors):
            factors += factor.factors if isinstance(factor, Product) else [factor]
        factors = [f for f in factors if size(f) != 1]
        return factors[0] if len(factors) == 1 else Product(tuple(factors))
    parts: list[Term] = []
    for part in map(resolved, term.parts):
        parts += part.parts if isinstance(part, Sum) else [part]
    parts = [p for p in parts if size(p) != 0]
    return parts[0] if len(parts) == 1 else Sum(tuple(parts))


def axes_of(term: Term) -> Iterator[Axis]:
    """Every axis a term is made of, in order; one that stands there twice comes twice."""
    term = resolved(term)
    if isinstance(term, Axis):
        yield term
    else:
        for inner in term.factors if isinstance(term, Product) else term.parts:
            yield from axes_of(inner)


def block(term: Term, reason: str) -> None:
    """Nothing in this term may be removed."""
    for axis in axes_of(term):
        axis.blocked[reason] = None


def tie(a: Term, b: Term, place: str) -> None:
    """Make two terms of one size equal; where that cannot be, because their parts do not fit, block both.

    Args:
        a: a term.
        b: the other.
        place: what ties them, for the reason.
    """
    a, b = resolved(a), resolved(b)
    if a == b or size(a) == 0:
        return
    if size(a) != size(b):
        _cannot_fit(a, b, place)
    elif isinstance(a, Axis):
        a.stands_for(b)
    elif isinstance(b, Axis):
        tie(b, a, place)
    elif isinstance(a, Product) and isinstance(b, Product):
        _tie_products(a, b, place)
    elif size(a) > 1:
        _tie_sums(a, b, place)


def _tie_products(a: Product, b: Product, place: str) -> None:
    """Factor by factor, split until both have the same sizes."""
    steps = sorted({*_steps(a.factors), *_steps(b.factors)}, reverse=True)
    if any(outer % inner for outer, inner in pairwise(steps)):
        _cannot_fit(a, b, place)
        return
    for factor, other in zip(_refined(a, steps, place), _refined(b, steps, place), strict=True):
        tie(factor, other, place)


def _tie_sums(a: Term, b: Term, place: str) -> None:
    """Piece by piece, cut wherever a part of either ends."""
    if _bounds(a) != _bounds(b) and not set(axes_of(a)).isdisjoint(axes_of(b)):
        # an axis against itself, moved: cutting it for that would go on index by index
        _cannot_fit(a, b, place)
        return
    bounds = sorted({*_bounds(a), *_bounds(b)})
    for part, other in zip(cut(a, bounds), cut(b, bounds), strict=True):
        tie(part, other, place)


def _cannot_fit(a: Term, b: Term, place: str) -> None:
    for term in (a, b):
        block(term, f"{place} ties dims whose parts do not fit each other")


def cut(term: Term, bounds: Sequence[int]) -> list[Term]:
    """Pieces of a term that end at `bounds`, increasing, the last one the term's size; axes are split where needed."""
    pieces: list[Term] = []
    for start, end in pairwise((0, *bounds)):
        piece, term = _split(term, end - start)
        pieces.append(piece)
    return pieces


def _split(term: Term, place: int) -> tuple[Term, Term]:
    """What is before and after index `place`."""
    term = resolved(term)
    if place == 0:
        return Sum(()), term
    if place == size(term):
        return term, Sum(())
    if isinstance(term, Axis):
        parts = Axis(place, tuple(term.blocked)), Axis(term.size - place, tuple(term.blocked))
        if not term.blocked:  # of one that is, nothing moves with the parts
            term.stands_for(Sum(parts))
        return parts
    if isinstance(term, Sum):
        first, rest = term.parts[0], Sum(term.parts[1:])
        if place >= size(first):
            inner, after = _split(rest, place - size(first))
            return Sum((first, inner)), after
        before, after = _split(first, place)
        return before, Sum((after, rest))
    return _split_product(term, place)


def _split_product(term: Product, place: int) -> tuple[Term, Term]:
    outer, inner = term.factors[0], Product(term.factors[1:])
    whole, within = divmod(place, size(inner))
    before, after = _split(outer, whole)
    if not within:
        return Product((before, inner)), Product((after, inner))
    # the bound lies inside one index of the outer factor
    middle, after = _split(after, 1)
    first, second = _split(inner, within)
    return (
        Sum((Product((before, inner)), Product((middle, first)))),
        Sum((Product((middle, second)), Product((after, inner)))),
    )


def _bounds(term: Term) -> list[int]:
    parts = term.parts if isinstance(term, Sum) else (term,)
    return list(accumulate(map(size, parts)))


def _steps(factors: Sequence[Term]) -> list[int]:
    """How far apart neighbours in each factor are, from the whole product down to 1."""
    sizes = [size(f) for f in factors]
    return [prod(sizes), *(prod(sizes[i + 1 :]) for i in range(len(sizes)))]


def _refined(product: Product, steps: Sequence[int], place: str) -> list[Term]:
    """The product's factors, split so that their steps are `steps`, decreasing."""
    found: list[Term] = []
    for (outer, inner), factor in zip(pairwise(_steps(product.factors)), product.factors, strict=True):
        within = [s for s in steps if inner <= s <= outer]
        found += factored(factor, [a // b for a, b in pairwise(within)], place)
    return found


def factored(term: Term, sizes: Sequence[int], place: str) -> list[Term]:
    """The term as a product of factors of these sizes."""
    if len(sizes) == 1:
        return [term]
    made = Product(tuple(Axis(s) for s in sizes))
    tie(term, made, place)
    return list(made.factors)


def regrouped(dims: Sequence[Term], sizes: Sequence[int], place: str) -> list[Term]:
    """What dims become when they are reshaped to `sizes`, of the same product.

    Dims whose parts do not fit are blocked, and those they become are blocked axes of their own.
    """
    made: list[Term] = [UNIT] * len(sizes)
    left = [d for d in dims if size(d) != 1]
    held: list[Term] = []
    waiting: list[int] = []
    for target in (i for i, s in enumerate(sizes) if s != 1):
        waiting.append(target)
        while left and size(Product(tuple(held))) < prod(sizes[t] for t in waiting):
            held.append(left.pop(0))
        if size(Product(tuple(held))) == prod(sizes[t] for t in waiting):
            for t, term in zip(waiting, _matched(held, [sizes[t] for t in waiting], place), strict=True):
                made[t] = term
            held, waiting = [], []
    return made


def _matched(dims: Sequence[Term], sizes: Sequence[int], place: str) -> list[Term]:
    """Dims as products of the parts they have in common with `sizes`, none of them 1."""
    whole = Product(tuple(dims))
    if len(sizes) == 1:
        return [whole]
    bounds = [prod(sizes[i:]) for i in range(len(sizes) + 1)]
    steps = sorted({*_steps(dims), *bounds}, reverse=True)
    if any(outer % inner for outer, inner in pairwise(steps)):
        block(whole, f"{place} reshapes dims whose parts do not fit each other")
        return [Axis(s, [f"{place} reshapes dims whose parts do not fit each other"]) for s in sizes]
    parts = _refined(whole, steps, place)
    made: list[Term] = []
    for outer, inner in pairwise(bounds):
        first, last = steps.index(outer), steps.index(inner)
        made.append(Product(tuple(parts[first:last])))
    return made


def kept_indices(term: Term, kept: Mapping[Axis, Tensor]) -> Tensor:
    """The indices of a term that stay, increasing, where of some axes only those in `kept` do."""
    term = resolved(term)
    if isinstance(term, Axis):
        return kept[term] if term in kept else torch.arange(term.size)
    if isinstance(term, Product):
        found = torch.zeros(1, dtype=torch.int64)
        for factor in term.factors:
            found = (found.unsqueeze(1) * size(factor) + kept_indices(factor, kept)).flatten()
        return found
    starts = accumulate((size(p) for p in term.parts[:-1]), initial=0)
    return torch.cat([kept_indices(p, kept) + start for start, p in zip(starts, term.parts, strict=True)])


def kept_size(term: Term, kept: Mapping[Axis, Tensor]) -> int:
    """How many indices of a term stay."""
    term = resolved(term)
    if isinstance(term, Axis):
        return len(kept[term]) if term in kept else term.size
    if isinstance(term, Product):
        return prod(kept_size(f, kept) for f in term.factors)
    return sum(kept_size(p, kept) for p in term.parts)


def positions(term: Term, axis: Axis) -> Tensor:
    """Of each index of a term, the index of `axis` it lies at, or -1 where it lies at none."""
    term = resolved(term)
    if isinstance(term, Axis):
        return torch.arange(axis.size) if term is axis else torch.full((term.size,), -1)
    if isinstance(term, Product):
        found = torch.full((1,), -1)
        for factor in term.factors:
            found = torch.maximum(found.unsqueeze(1), positions(factor, axis)).flatten()
        return found
    return torch.cat([positions(p, axis) for p in term.parts])
