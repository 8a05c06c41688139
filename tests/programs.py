"""Random networks: short programs of layers and ops, drawn step by step, for what must hold of every graph."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[list[Tensor]], Tensor]
Maker = Callable[[random.Random, nn.ModuleList, list[Tensor]], Step]
LARGEST = 4000  # elements of a value


class Program(nn.Module):
    """Steps applied one after another, each to values of those before; the last value goes through a layer and out.

    Args:
        steps: names of steps and the seed of what each draws.
        image: whether the input is [2, 3, 6, 6], else [2, 5, 4].
        parameters: seed of the weights.
    """

    def __init__(self, steps: list[tuple[str, int]], *, image: bool, parameters: int = 0) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        self.steps: list[Step] = []
        self.taken: list[str] = []
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(parameters)
            self.example = torch.randn((2, 3, 6, 6) if image else (2, 5, 4), dtype=torch.float64)
            values = [self.example]
            for name, seed in [("conv" if image else "linear", 1), *steps, ("head", 0)]:
                self._add(name, random.Random(seed), values)
            for parameter in self.parameters():
                parameter.copy_(
                    torch.randn_like(parameter) / max(parameter[0].numel(), 1) ** 0.5 if parameter.dim() else 1
                )
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.3)
                    module.running_var.uniform_(0.5, 2)
        self.double().eval()

    def _add(self, name: str, rng: random.Random, values: list[Tensor]) -> None:
        count = len(self.parts)
        try:
            step = MAKERS[name](rng, self.parts, values)
            self.parts.double().eval()
            made = step(values)
        except (ValueError, RuntimeError, IndexError):  # it does not fit what is there
            made = torch.empty(0)
        if 0 < made.numel() <= LARGEST and bool(made.isfinite().all()):
            self.steps.append(step)
            self.taken.append(name)
            values.append(made)
        else:
            del self.parts[count:]

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.steps:
            values.append(step(values))
        return values[-1]


def _kept(parts: nn.ModuleList, module: nn.Module) -> nn.Module:
    parts.append(module)
    return module


def _unary(*functions: Callable[[Tensor], Tensor]) -> Maker:
    def make(rng: random.Random, parts: nn.ModuleList, values: list[Tensor]) -> Step:
        function = rng.choice(functions)
        last = len(values) - 1
        return lambda v: function(v[last])

    return make


def _of_last(make: Callable[[random.Random, Tensor], Callable[[Tensor], Tensor]]) -> Maker:
    """A step of the last value alone, from its shape."""

    def maker(rng: random.Random, parts: nn.ModuleList, values: list[Tensor]) -> Step:
        function = make(rng, values[-1])
        last = len(values) - 1
        return lambda v: function(v[last])

    return maker


def _layer(make: Callable[[random.Random, Tensor], nn.Module]) -> Maker:
    def maker(rng: random.Random, parts: nn.ModuleList, values: list[Tensor]) -> Step:
        layer = _kept(parts, make(rng, values[-1]))
        last = len(values) - 1
        return lambda v: layer(v[last])

    return maker


def _divisor(rng: random.Random, number: int) -> int:
    return rng.choice([d for d in range(1, number + 1) if number % d == 0])


def _conv(rng: random.Random, x: Tensor) -> nn.Module:
    if x.dim() != 4:
        raise ValueError
    groups = _divisor(rng, x.shape[1]) if rng.random() < 0.4 else 1
    kernel, out = rng.choice([1, 3]), groups * rng.choice([1, 2, 3, 4])
    return nn.Conv2d(
        x.shape[1], out, kernel, rng.choice([1, 1, 2]), kernel // 2, groups=groups, bias=rng.random() < 0.5
    )


def _conv_transpose(rng: random.Random, x: Tensor) -> nn.Module:
    if x.dim() != 4:
        raise ValueError
    groups = _divisor(rng, x.shape[1])
    return nn.ConvTranspose2d(x.shape[1], groups * rng.choice([1, 2, 3]), 2, 2, groups=groups)


def _norm(rng: random.Random, x: Tensor) -> nn.Module:
    if x.dim() == 4:
        kinds = [
            nn.BatchNorm2d(x.shape[1]), nn.GroupNorm(_divisor(rng, x.shape[1]), x.shape[1]),
            nn.InstanceNorm2d(x.shape[1], affine=rng.random() < 0.5),
        ]  # fmt: skip
        return rng.choice(kinds)
    return rng.choice([nn.LayerNorm(x.shape[-1]), nn.RMSNorm(x.shape[-1])])


def _linear(rng: random.Random, x: Tensor) -> nn.Module:
    return nn.Linear(x.shape[-1], rng.choice([3, 4, 6, 8, 12]), bias=rng.random() < 0.7)


def _head(rng: random.Random, x: Tensor) -> nn.Module:
    return nn.Conv2d(x.shape[1], 3, 1) if x.dim() == 4 else nn.Linear(x.shape[-1], 3)


def _channel(x: Tensor) -> int:
    return 1 if x.dim() == 4 else -1


def _two(rng: random.Random, parts: nn.ModuleList, values: list[Tensor]) -> Step:
    """A sum, product, or the like of two values that broadcast."""
    fits = [i for i, v in enumerate(values[:-1]) if v.dim() == values[-1].dim() and _broadcast(v, values[-1])]
    other, last = rng.choice([*fits, len(values) - 1]), len(values) - 1
    function = rng.choice([torch.add, torch.mul, torch.sub, torch.maximum, lambda a, b: a / (1 + b * b), torch.add])
    return lambda v: function(v[last], v[other])


def _broadcast(a: Tensor, b: Tensor) -> bool:
    return all(x == y or 1 in (x, y) for x, y in zip(a.shape, b.shape, strict=True))


def _join(rng: random.Random, parts: nn.ModuleList, values: list[Tensor]) -> Step:
    axis = _channel(values[-1])
    fits = [i for i, v in enumerate(values) if v.dim() == values[-1].dim() and _alike(v, values[-1], axis)]
    chosen = [rng.choice(fits), len(values) - 1][:: rng.choice([1, -1])]
    return lambda v: torch.cat([v[i] for i in chosen], axis)


def _alike(a: Tensor, b: Tensor, axis: int) -> bool:
    return all(x == y for i, (x, y) in enumerate(zip(a.shape, b.shape, strict=True)) if i != axis % a.dim())


def _halves(rng: random.Random, x: Tensor) -> Callable[[Tensor], Tensor]:
    axis, way = _channel(x), rng.randrange(4)
    ways = [
        lambda v: v.chunk(2, axis)[0] * v.chunk(2, axis)[1].sigmoid(), lambda v: F.glu(v, axis),
        lambda v: v.chunk(2, axis)[1], lambda v: torch.cat([-v.chunk(2, axis)[1], v.chunk(2, axis)[0]], axis) + v,
    ]  # fmt: skip
    return ways[way]


def _part(rng: random.Random, x: Tensor) -> Callable[[Tensor], Tensor]:
    axis = _channel(x)
    start = rng.randrange(x.shape[axis])
    length = rng.randint(1, x.shape[axis] - start)
    rest = x.shape[axis] - start - length
    if rng.random() < 0.5:
        return lambda v: v.narrow(axis, start, length)
    sizes = [s for s in (start, length, rest) if s]
    return lambda v: v.split(sizes, axis)[min(1, len(sizes) - 1)]


def _padded(rng: random.Random, x: Tensor) -> Callable[[Tensor], Tensor]:
    ends = [rng.randrange(3), rng.randrange(3)]
    where = ends if x.dim() != 4 else [0, 0, 0, 0, *ends]
    value = rng.choice([0.0, 0.0, 0.5])
    return lambda v: F.pad(v, where, value=value)


def _shuffled(rng: random.Random, x: Tensor) -> Callable[[Tensor], Tensor]:
    axis, groups = _channel(x) % x.dim(), _divisor(rng, x.shape[_channel(x)])
    inner = x.shape[axis] // groups
    return lambda v: v.unflatten(axis, (groups, inner)).transpose(axis, axis + 1).flatten(axis, axis + 1)


def _summed(rng: random.Random, x: Tensor) -> Callable[[Tensor], Tensor]:
    axis = _channel(x) % x.dim()
    groups = _divisor(rng, x.shape[axis])
    ways = [
        lambda v: v.unflatten(axis, (groups, -1)).sum(axis), lambda v: v.unflatten(axis, (groups, -1)).mean(axis + 1),
        lambda v: v * v.mean(axis, keepdim=True), lambda v: v + v.amax(axis, keepdim=True),
        lambda v: v - v.sum(axis, keepdim=True), lambda v: v * v.norm(dim=axis, keepdim=True),
    ]  # fmt: skip
    return rng.choice(ways)


def _paired(rng: random.Random, x: Tensor) -> Callable[[Tensor], Tensor]:
    """A value against its own transpose, one of both dims ended again."""
    if x.dim() != 3 or x.shape[2] > 8:
        raise ValueError
    way = rng.choice([torch.mul, torch.add, torch.sub, torch.maximum])
    end = rng.choice([lambda v: v.sum(-1), lambda v: v.mean(-2), lambda v: v.softmax(-1).sum(-2), lambda v: v.amax(-1)])
    return lambda v: end(way(v.unsqueeze(3), v.unsqueeze(2)))


def _repeated(rng: random.Random, x: Tensor) -> Callable[[Tensor], Tensor]:
    axis = _channel(x) % x.dim()
    counts = [2 if i == axis else 1 for i in range(x.dim())]
    ways = [lambda v: v.repeat(counts), lambda v: v.repeat_interleave(2, axis), lambda v: torch.cat([v, v], axis)]
    return rng.choice(ways)


def _picked(rng: random.Random, x: Tensor) -> Callable[[Tensor], Tensor]:
    axis = _channel(x) % x.dim()
    index = rng.randrange(x.shape[axis])
    order = torch.randperm(x.shape[axis], generator=torch.Generator().manual_seed(index))
    ways = [
        lambda v: v * v.select(axis, index).unsqueeze(axis), lambda v: v.index_select(axis, order), lambda v: v.roll(1, axis),
        lambda v: v.softmax(axis), lambda v: v.cumsum(axis), lambda v: torch.where(v > 0, v, 0.0), lambda v: v.flip(axis),
    ]  # fmt: skip
    return rng.choice(ways)


def _space(rng: random.Random, x: Tensor) -> Callable[[Tensor], Tensor]:
    if x.dim() != 4:
        ways = [lambda v: v.transpose(1, 2), lambda v: v + v.mean(1, keepdim=True), lambda v: v.unsqueeze(2)[:, :, 0]]
        return rng.choice(ways)
    ways = [
        lambda v: F.max_pool2d(v, 2), lambda v: F.avg_pool2d(v, 2), lambda v: F.interpolate(v, scale_factor=2.0),
        lambda v: v.mean((2, 3), keepdim=True), lambda v: v.flatten(2).transpose(1, 2), lambda v: v.flatten(1).unsqueeze(1),
        lambda v: F.pixel_shuffle(v, 2), lambda v: v.permute(0, 2, 3, 1).flatten(1, 2),
    ]  # fmt: skip
    return rng.choice(ways)


class _Scaled(nn.Module):
    """x times, plus or over a stored tensor that has its channels."""

    def __init__(self, rng: random.Random, x: Tensor) -> None:
        super().__init__()
        shape = [s if i == _channel(x) % x.dim() else 1 for i, s in enumerate(x.shape)]
        self.stored, self.way = nn.Parameter(torch.empty(shape)), rng.randrange(4)

    def forward(self, x: Tensor) -> Tensor:
        ways = [
            lambda: x * self.stored, lambda: x + self.stored, lambda: x / self.stored.abs().clamp_min(0.1),
            lambda: self.stored - x,
        ]  # fmt: skip
        return ways[self.way]()


class _Heads(nn.Module):
    """Attention over [batch, tokens, channels] in one of several spellings, with or without shared keys."""

    def __init__(self, rng: random.Random, x: Tensor) -> None:
        super().__init__()
        if x.dim() != 3:
            raise ValueError
        width, self.heads, self.way = x.shape[2], rng.choice([2, 4]), rng.randrange(4)
        self.keys, self.depth = self.heads // rng.choice([1, 2]), rng.choice([2, 3])
        self.q = nn.Linear(width, self.heads * self.depth)
        self.k, self.v = (nn.Linear(width, self.keys * self.depth, bias=False) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * self.heads * self.depth)
        self.out = nn.Linear(self.heads * self.depth, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == 3:
            parts = self.qkv(x).unflatten(-1, (3, self.heads, self.depth)).permute(2, 0, 3, 1, 4)
            q, k, v = parts.unbind(0)
        else:
            split = [
                layer(x).unflatten(-1, (n, -1)).transpose(1, 2)
                for layer, n in ((self.q, self.heads), (self.k, self.keys), (self.v, self.keys))
            ]
            q, k, v = split
        if self.way in (0, 1) and self.keys != self.heads:
            k, v = (t.repeat_interleave(self.heads // self.keys, 1) for t in (k, v))
        if self.way == 0:
            y = (q @ k.transpose(-1, -2) * self.depth**-0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.way == 2)
        return x + self.out(y.transpose(1, 2).flatten(2))


class _Recurrent(nn.Module):
    def __init__(self, rng: random.Random, x: Tensor) -> None:
        super().__init__()
        if x.dim() != 3:
            raise ValueError
        self.layer = rng.choice([nn.LSTM, nn.GRU])(
            x.shape[2], rng.choice([3, 4]), batch_first=True, bidirectional=rng.random() < 0.5
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class _Reused(nn.Module):
    """One layer called twice."""

    def __init__(self, rng: random.Random, x: Tensor) -> None:
        super().__init__()
        width = x.shape[_channel(x)]
        self.layer = nn.Conv2d(width, width, 1) if x.dim() == 4 else nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).relu())


MAKERS: dict[str, Maker] = {
    "conv": _layer(_conv), "conv_transpose": _layer(_conv_transpose), "linear": _layer(_linear), "norm": _layer(_norm),
    "head": _layer(_head), "scaled": _layer(_Scaled), "heads": _layer(_Heads), "recurrent": _layer(_Recurrent),
    "reused": _layer(_Reused), "prelu": _layer(lambda rng, x: nn.PReLU(x.shape[1] if x.dim() == 4 else 1)),
    "odd": _unary(torch.relu, torch.tanh, F.gelu, F.silu, lambda v: v.clamp(-1, 1), lambda v: v.pow(2).tanh()),
    "other": _unary(torch.sigmoid, torch.cos, F.softplus, lambda v: v + 1, lambda v: v.clamp(0.1, 1), lambda v: 1 - v),
    "two": _two, "join": _join, "halves": _of_last(_halves), "part": _of_last(_part), "padded": _of_last(_padded),
    "shuffled": _of_last(_shuffled), "summed": _of_last(_summed), "repeated": _of_last(_repeated),
    "paired": _of_last(_paired), "picked": _of_last(_picked), "space": _of_last(_space),
}  # fmt: skip
