"""Ops without an own kernel, in relax: RULES maps a name of the op table to what emits it."""

from collections.abc import Callable
from typing import Any

from mcc.backends.relax import codebooks, contraction, experts, index, layout, pointwise, scatter, tokens, window

RULES: dict[str, Callable[..., Any]] = {
    **pointwise.RULES, **contraction.RULES, **window.RULES, **layout.RULES, **index.RULES, **scatter.RULES,
    **tokens.RULES, **codebooks.RULES, **experts.RULES,
}  # fmt: skip
