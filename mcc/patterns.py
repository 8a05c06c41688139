"""Patterns of layer names, shell style, that a pass takes and leaves."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from mcc.errors import PassError

if TYPE_CHECKING:
    from collections.abc import Iterable


class Patterns:
    """Says what is left out, and remembers which patterns matched anything.

    Args:
        include: patterns of what is taken.
        exclude: patterns of what is not, though it is included.
    """

    def __init__(self, include: tuple[str, ...], exclude: tuple[str, ...]) -> None:
        self.include, self.exclude = include, exclude
        self._matched: set[str] = set()

    def refusal(self, names: Iterable[str]) -> str | None:
        """Why something that goes by these names is left out, or None if it is taken."""
        names = tuple(names)
        included, excluded = (
            [p for p in patterns if any(fnmatchcase(name, p) for name in names)]
            for patterns in (self.include, self.exclude)
        )
        self._matched.update(included, excluded)
        if excluded:
            return f"excluded by {excluded[0]!r}"
        return None if included else "not included"

    @property
    def unmatched(self) -> str | None:
        """The first pattern that has matched nothing so far, besides one for everything; None if all have."""
        return next((p for p in (*self.include, *self.exclude) if p not in self._matched and p != "*"), None)

    def failure(self, step: object, nothing: str, layers: Iterable[str]) -> PassError:
        """What a pass raises where a pattern matches nothing, or where it takes nothing: `nothing` says so then."""
        what = nothing if self.unmatched is None else f"pattern {self.unmatched!r} matches no layer"
        return PassError(f"{step}: {what}", remedy=f"layers of this model: {', '.join(sorted(set(layers))) or 'none'}")
