"""Tiny models with what real ones have: ties, branches, in-place writes, odd sizes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvBatchNorm(nn.Module):
    """A convolution and its batch norm, statistics not at their start."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2)
        self.bn.weight.data.uniform_(0.5, 2)
        self.bn.bias.data.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Residual(nn.Module):
    """Convolutions with batch norms, an in-place relu, a residual add, dropout and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.c2, self.b2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(16, 10)
        for norm in (self.b1, self.b2):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.b1(self.c1(x)))
        x = x + torch.relu(self.b2(self.c2(x)))
        return self.head(self.drop(x.mean((2, 3))))


class TiedLanguageModel(nn.Module):
    """Embedding tied to the head, a no_grad region, in-place writes, two symbolic dims."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(50, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        with torch.no_grad():
            position = torch.arange(ids.shape[1]).float().unsqueeze(1)
        x = x + torch.sin(position)
        y = self.mix(x)
        y[:, :1] += 1
        y.relu_()
        return self.head(y + x)


class Attention(nn.Module):
    """Multi-head attention with a residual, layer norms and a gated feed-forward part."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(y)
        return x + self.down(F.glu(self.up(self.norm2(x))))


class Branches(nn.Module):
    """Returns a dict with a tuple in it; one output is also an inner value, one is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, object]:
        y = self.a(x)
        z = self.b(F.relu(y)) * scale
        return {"z": z, "rest": (y, x, y * y)}


class Shared(nn.Module):
    """One layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu(self.layer(x)))


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with relus between."""
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
