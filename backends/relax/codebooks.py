"""Weights as codes of a table, in relax: see `mcc.codebooks`."""

from __future__ import annotations

from tvm import relax, te, tirx

from mcc.backends.relax.emitter import Emitter, Expression, shape

R = relax.op


def _decode_codebook(e: Emitter, codes: Expression, scale: Expression, table: Expression) -> Expression:
    entries, size = (int(d) for d in shape(table))
    group = int(shape(codes)[1]) * size // int(shape(scale)[1])

    def body(stored: Expression, scales: Expression, values: Expression) -> Expression:
        def value(o: Expression, i: Expression) -> Expression:
            row = stored(o, tirx.floordiv(i, size)).astype("int32") + entries // 2
            return values(row, tirx.floormod(i, size)) * scales(o, tirx.floordiv(i, group)).astype("float32")

        return te.compute([stored.shape[0], stored.shape[1] * size], value)

    return e.compute(body, codes, scale, table, name="decode_codebook")


def _fake_codebook(e: Emitter, x: Expression, scale: Expression, table: Expression) -> Expression:
    entries, size = (int(d) for d in shape(table))
    outputs, inputs = shape(x)[0], int(shape(x)[1])
    group = inputs // int(shape(scale)[1])

    def in_scales(given: Expression, scales: Expression) -> Expression:
        def value(o: Expression, i: Expression) -> Expression:
            return given(o, i) / scales(o, tirx.floordiv(i, group)).astype("float32")

        return te.compute(given.shape, value)

    scaled = e.compute(in_scales, x, scale, name="in_scales")
    vectors = e(R.reshape(scaled, [outputs, inputs // size, 1, size]))
    apart = e(R.subtract(vectors, e(R.reshape(table, [1, 1, entries, size]))))
    nearest = e(R.argmin(e(R.sum(e(R.multiply(apart, apart)), axis=-1)), axis=-1))
    codes = e.cast(e(R.subtract(nearest, e.scalar(entries // 2, "int64"))), "int8")
    return _decode_codebook(e, codes, scale, table)


RULES = {"mcc.decode_codebook": _decode_codebook, "mcc.fake_codebook": _fake_codebook}
