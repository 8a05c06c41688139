"""Rows times the matrix of their expert, in relax."""

from __future__ import annotations

from tvm import relax, te, tirx

from mcc.backends.relax.emitter import Emitter, Expression, shape, size

R = relax.op


def _grouped_matmul(e: Emitter, rows: Expression, weights: Expression, ends: Expression) -> Expression:
    def groups(bounds: Expression, count: Expression) -> Expression:
        k = te.reduce_axis((0, bounds.shape[0]), name="k")
        return te.compute((count,), lambda i: te.sum(tirx.Cast("int32", bounds[k] <= i), axis=k))

    group = e.compute(groups, ends, size(shape(rows)[0]), name="groups")

    def body(x: Expression, w: Expression, owner: Expression) -> Expression:
        k = te.reduce_axis((0, w.shape[1]), name="k")
        last = w.shape[0] - 1
        products = te.compute(
            (x.shape[0], w.shape[2]), lambda i, n: te.sum(x[i, k] * w[tirx.min(owner[i], last), k, n], axis=k)
        )
        return te.compute(
            products.shape, lambda i, n: tirx.Select(owner[i] <= last, products[i, n], tirx.const(0, products.dtype))
        )

    return e.compute(body, rows, weights, group, name="grouped_matmul")


RULES = {"mcc.grouped_matmul": _grouped_matmul}
