"""ONNX operators that read or write at computed places, and attention with rotary positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mcc.errors import CaptureError

Attributes = Mapping[str, Any]


def refusal(what: str) -> CaptureError:
    """The error for a form of an operator that is not taken."""
    return CaptureError(f"ONNX {what} is not supported", remedy="export the model with another form of it")


def _accumulates(attributes: Attributes, name: str) -> bool:
    """Whether values are added to what is there; otherwise they replace it."""
    reduction = attributes.get("reduction", b"none").decode()
    if reduction not in ("none", "add"):
        raise refusal(f"{name} with reduction {reduction}")
    return bool(reduction == "add")


def from_start(indices: Tensor, size: Any) -> Tensor:
    """Indices of which negative ones count from the end of `size` elements."""
    return torch.where(indices < 0, indices + size, indices)


def _gather_nd(attributes: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    lead = attributes.get("batch_dims", 0)
    batch = [
        torch.arange(x.shape[d]).reshape([-1 if i == d else 1 for i in range(indices.dim() - 1)]) for d in range(lead)
    ]
    return x[(*batch, *indices.unbind(-1))]


def _scatter_nd(attributes: Attributes, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    return x.index_put(tuple(indices.unbind(-1)), updates, accumulate=_accumulates(attributes, "ScatterND"))


def _scatter_elements(attributes: Attributes, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    axis = attributes.get("axis", 0)
    write = torch.scatter_add if _accumulates(attributes, "ScatterElements") else torch.scatter
    return write(x, axis, from_start(indices, x.shape[axis]), updates)


def _one_hot(attributes: Attributes, indices: Tensor, depth: Any, values: Tensor) -> Tensor:
    count = int(depth[0] if isinstance(depth, list) else depth)
    axis = attributes.get("axis", -1)
    places = from_start(indices.long(), count).unsqueeze(axis)
    shape = [1] * places.dim()
    shape[axis] = count
    return torch.where(places == torch.arange(count).reshape(shape), values[1], values[0])


def _grid_sample(attributes: Attributes, x: Tensor, grid: Tensor) -> Tensor:
    mode = attributes.get("mode", b"linear").decode()
    modes = {
        "linear": "bilinear",
        "bilinear": "bilinear",
        "nearest": "nearest",
        "cubic": "bicubic",
        "bicubic": "bicubic",
    }
    return F.grid_sample(
        x,
        grid,
        modes[mode],
        attributes.get("padding_mode", b"zeros").decode(),
        bool(attributes.get("align_corners", 0)),
    )


def _hardmax(attributes: Attributes, x: Tensor) -> Tensor:
    axis = attributes.get("axis", -1)
    shape = [1] * x.dim()
    shape[axis] = x.shape[axis]
    return (x.argmax(axis, keepdim=True) == torch.arange(x.shape[axis]).reshape(shape)).to(x.dtype)


def _heads(x: Tensor, count: int) -> Tensor:
    """[batch, tokens, heads * width] -> [batch, heads, tokens, width]."""
    return x.reshape(*x.shape[:-1], count, -1).transpose(1, 2)


def _attention(  # noqa: PLR0913 (an operator's inputs)
    attributes: Attributes, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None,
    past_key: Tensor | None = None, past_value: Tensor | None = None,
) -> Any:  # fmt: skip
    causal = bool(attributes.get("is_causal", 0))
    if attributes.get("softcap", 0.0) or attributes["outputs"] > 3:
        raise refusal("Attention with a softcap, or whose scores are read")
    joined = query.dim() == 3
    if joined:
        count, shared = attributes["q_num_heads"], attributes["kv_num_heads"]
        query, key, value = _heads(query, count), _heads(key, shared), _heads(value, shared)
    if past_key is not None and past_value is not None:
        if causal:
            raise refusal("Attention that is causal and has a past")
        key, value = torch.cat((past_key, key), 2), torch.cat((past_value, value), 2)
    shares = query.shape[1] // key.shape[1]
    keys, values = (t.repeat_interleave(shares, 1) if shares > 1 else t for t in (key, value))
    found = F.scaled_dot_product_attention(query, keys, values, mask, is_causal=causal, scale=attributes.get("scale"))
    result = found.transpose(1, 2).flatten(2) if joined else found
    return result if past_key is None else (result, key, value)


def _rotary(
    attributes: Attributes, x: Tensor, cosines: Tensor, sines: Tensor, positions: Tensor | None = None
) -> Tensor:
    """Pairs of a head's elements, next to one another or half a head apart, turned by their token's angles."""
    joined = x.dim() == 3
    heads = _heads(x, attributes["num_heads"]) if joined else x
    width = attributes.get("rotary_embedding_dim", 0) or heads.shape[-1]
    turned, kept = heads[..., :width], heads[..., width:]
    tables = (t if positions is None else F.embedding(positions, t) for t in (cosines, sines))
    cos, sin = (t.unsqueeze(1) for t in tables)  # the same for all heads
    if attributes.get("interleaved", 0):
        a, b = turned[..., ::2], turned[..., 1::2]
        both = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        both = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    result = torch.cat((both, kept), -1)
    return result.transpose(1, 2).flatten(2) if joined else result


PLACES: dict[str, Callable[..., Any]] = {
    "GatherND": _gather_nd, "ScatterND": _scatter_nd, "ScatterElements": _scatter_elements, "OneHot": _one_hot,
    "GridSample": _grid_sample, "Hardmax": _hardmax, "Attention": _attention, "RotaryEmbedding": _rotary,
}  # fmt: skip
