"""einsum written out: sums, transposes and one product of matrices for each further operand."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mcc.writing import Writer

_A = torch.ops.aten
_LETTERS = [chr(c) for c in range(0x100, 0x200)]  # for dims under an ellipsis, which no equation names


def einsum(call: Writer, arguments: Sequence[Any], path: Sequence[int] | None = None) -> Any | None:
    """Write out an einsum, or give None for what is not written out.

    That is a letter repeated within an operand, which takes a diagonal, and a dim of one that meets a longer one.

    Args:
        call: emits an op and gives its node, which has a fake value.
        arguments: the equation and the list of operands.
        path: the order of products, which does not change what is computed.
    """
    del path
    equation, operands = arguments
    inputs, output = _parsed(equation, [operand.meta["val"].dim() for operand in operands])
    if any(len(set(letters)) != len(letters) for letters in (*inputs, output)) or not _alike(operands, inputs):
        return None
    value, letters = operands[0], inputs[0]
    for i, (other, others) in enumerate(zip(operands[1:], inputs[1:], strict=True), 1):
        needed = {*output, *(letter for later in inputs[i + 1 :] for letter in later)}
        value, letters = _product(call, (value, letters), (other, others), needed)
    value, letters = _summed(call, value, letters, set(output))
    return _ordered(call, value, letters, output)


def _parsed(equation: str, ranks: list[int]) -> tuple[list[list[str]], list[str]]:
    """Letters of each operand and of the output; an ellipsis stands for so many dims as are left."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    parts = left.split(",")
    hidden = [rank - len(part.replace("...", "")) for part, rank in zip(parts, ranks, strict=True)]
    most = max((n for part, n in zip(parts, hidden, strict=True) if "..." in part), default=0)

    def letters(part: str, count: int) -> list[str]:
        before, ellipsis, after = part.partition("...")
        return [*before, *(_LETTERS[most - count : most] if ellipsis else ()), *after]

    inputs = [letters(part, n) for part, n in zip(parts, hidden, strict=True)]
    if arrow:
        return inputs, letters(right, most)
    found = [letter for part in inputs for letter in part]
    once = sorted(letter for letter in set(found) if found.count(letter) == 1 and letter not in _LETTERS)
    return inputs, [*(_LETTERS[:most]), *once]


def _alike(operands: Sequence[Any], inputs: list[list[str]]) -> bool:
    """Whether a letter is of one size wherever it stands."""
    sizes: dict[str, str] = {}
    pairs = (
        (letter, str(size))
        for operand, letters in zip(operands, inputs, strict=True)
        for letter, size in zip(letters, operand.meta["val"].shape, strict=True)
    )
    return all(sizes.setdefault(letter, size) == size for letter, size in pairs)


def _summed(call: Writer, value: Any, letters: list[str], needed: set[str]) -> tuple[Any, list[str]]:
    """Without the dims that nothing needs."""
    gone = [i for i, letter in enumerate(letters) if letter not in needed]
    if gone:
        value = call(_A.sum.dim_IntList, value, gone)
    return value, [letter for letter in letters if letter in needed]


def _ordered(call: Writer, value: Any, letters: list[str], wanted: list[str]) -> Any:
    return value if letters == wanted else call(_A.permute.default, value, [letters.index(w) for w in wanted])


def _product(
    call: Writer, left: tuple[Any, list[str]], right: tuple[Any, list[str]], needed: set[str]
) -> tuple[Any, list[str]]:
    """The product of two operands, summed over what both have and nothing later needs."""
    a, a_letters = _summed(call, *left, needed | set(right[1]))
    b, b_letters = _summed(call, *right, needed | set(a_letters))
    shared = [letter for letter in a_letters if letter in b_letters]
    batch = [letter for letter in shared if letter in needed]
    inner = [letter for letter in shared if letter not in needed]
    rows = [letter for letter in a_letters if letter not in shared]
    columns = [letter for letter in b_letters if letter not in shared]
    sizes = {
        letter: _size(call, x, i) for x, given in ((a, a_letters), (b, b_letters)) for i, letter in enumerate(given)
    }
    a = _ordered(call, a, a_letters, [*batch, *rows, *inner])
    b = _ordered(call, b, b_letters, [*batch, *inner, *columns])
    a = _merged(call, a, (batch, rows, inner), sizes)
    b = _merged(call, b, (batch, inner, columns), sizes)
    made = call(_A.matmul.default, a, b)
    out = [*batch, *rows, *columns]
    if len(rows) != 1 or len(columns) != 1:
        made = call(_A.reshape.default, made, [sizes[letter] for letter in out])
    return made, out


def _merged(call: Writer, value: Any, groups: tuple[list[str], list[str], list[str]], sizes: dict[str, Any]) -> Any:
    """[batch…, first…, second…] as [batch…, first, second]."""
    batch, first, second = groups
    if len(first) == 1 == len(second):
        return value
    merged = [_total(call, [sizes[letter] for letter in group]) for group in (first, second)]
    return call(_A.reshape.default, value, [*(sizes[letter] for letter in batch), *merged])


def _total(call: Writer, sizes: list[Any]) -> Any:
    """The product of sizes, of which some may be nodes."""
    known = math.prod(s for s in sizes if isinstance(s, int))
    total: Any = None
    for size in (s for s in sizes if not isinstance(s, int)):
        total = size if total is None else call(operator.mul, total, size)
    return known if total is None else total if known == 1 else call(operator.mul, total, known)


def _size(call: Writer, value: Any, dim: int) -> Any:
    size = value.meta["val"].shape[dim]
    return size if isinstance(size, int) else call(_A.sym_size.int, value, dim)
