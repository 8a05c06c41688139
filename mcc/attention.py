"""Attention as ops of mcc's own: with probabilities that are rounded, and with tokens before heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mcc.formats import fake_quantize_per_token

LARGEST_CODE = 255  # of a probability, of which none is negative: a byte
_LIBRARY: Any = torch.library.Library("mcc", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch has no types for it
_LIBRARY.define(
    "rounded_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, "
    f"bool is_causal=False, *, float? scale=None, bool enable_gqa=False, int limit={LARGEST_CODE}) -> Tensor"
)


def rounded_attention(  # noqa: PLR0913 (an op's schema: that of scaled_dot_product_attention, and `limit`)
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False,  # noqa: FBT001, FBT002
    *, scale: float | None = None, enable_gqa: bool = False, limit: int = LARGEST_CODE,
) -> Tensor:  # fmt: skip
    """Scaled dot-product attention whose probabilities are rounded, each query's with a scale of its own.

    The largest probability of a query gets the code `limit`, as `fake_quantize_per_token` has it; a query that sees no
    key gets zeros. The gradient passes straight through the rounding.

    Args:
        query: float32 [..., heads, rows, depth].
        key: float32 [..., key heads, keys, depth].
        value: float32 [..., key heads, keys, width].
        attn_mask: bool, false where a key is hidden, or float32 to add; broadcast to [..., heads, rows, keys].
        dropout_p: of the probabilities.
        is_causal: whether row i sees keys up to i.
        scale: of the products; one over the root of the depth where it is None.
        enable_gqa: whether heads share those of keys.
        limit: the largest code of a probability.

    Returns:
        float32 [..., heads, rows, width].
    """
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    hidden = float("-inf")
    if attn_mask is not None:
        boolean = attn_mask.dtype is torch.bool
        scores = scores.masked_fill(attn_mask.logical_not(), hidden) if boolean else scores + attn_mask
    if is_causal:
        rows, keys = scores.shape[-2:]
        later = torch.ones(rows, keys, dtype=torch.bool, device=scores.device).tril().logical_not()
        scores = scores.masked_fill(later, hidden)
    blind = (scores == hidden).all(-1, keepdim=True)
    probabilities = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    dropped = torch.nn.functional.dropout(probabilities, dropout_p)
    rounded: Tensor = fake_quantize_per_token(dropped, limit)
    return rounded @ value


_LIBRARY.impl("rounded_attention", rounded_attention, "CompositeImplicitAutograd")


def _heads_first(x: Tensor, tokens_first: bool) -> Tensor:  # noqa: FBT001
    return x.transpose(1, 2) if tokens_first else x


@torch.library.custom_op("mcc::attention", mutates_args=())
def attention(  # noqa: PLR0913 (an op's schema)
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float,  # noqa: FBT001
    tokens_first: list[bool], limit: int = 0,
) -> Tensor:  # fmt: skip
    """Scaled dot-product attention, each of query, key, value and output [batch, heads, tokens, …] or tokens first.

    Args:
        query: float32, with a multiple of the heads that key and value have.
        key: float32.
        value: float32.
        mask: bool or float32, broadcast to [batch, heads, query tokens, key tokens].
        causal: whether token i sees keys up to i.
        scale: of the products.
        tokens_first: for query, key, value and output: [batch, tokens, heads, …].
        limit: the largest code of a probability, as `rounded_attention` has it; 0 where they are not rounded.
    """
    q, k, v = (_heads_first(x, first) for x, first in zip((query, key, value), tokens_first, strict=False))
    shared = q.shape[1] != k.shape[1]
    if limit:
        seen = rounded_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=shared, limit=limit)
    else:
        seen = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=shared
        )
    return _heads_first(seen, tokens_first[3]).contiguous()


@attention.register_fake
def _(  # noqa: PLR0913 (as above)
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float,  # noqa: FBT001
    tokens_first: list[bool], limit: int = 0,
) -> Tensor:  # fmt: skip
    del key, mask, causal, scale, limit
    q = _heads_first(query, tokens_first[0])
    return query.new_empty(_heads_first(q[..., :1].expand(*q.shape[:3], value.shape[3]), tokens_first[3]).shape)
