"""Networks that the benchmark suite times: weights are random, shapes are those of the published models."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Case:
    """A network with example inputs.

    Attributes:
        build: makes it, in eval mode.
        inputs: makes inputs of a batch size.
        batches: sizes it is timed at.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    batches: tuple[int, ...] = (1,)


class Attention(nn.Module):
    """Multi-head attention of tokens [batch, tokens, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] as [batch, heads, tokens, width / heads]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.split(layer(x)) for layer in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A transformer layer, its norms before (ViT) or after (BERT) the parts."""

    def __init__(self, width: int, heads: int, *, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attention, self.norm1, self.norm2 = Attention(width, heads), nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self.attention(self.norm1(x))
            return x + self.down(F.gelu(self.up(self.norm2(x))))
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Bert(nn.Module):
    """Token ids [batch, tokens] to a pooled vector."""

    def __init__(self, width: int, depth: int, heads: int, tokens: int = 30522) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(tokens, width), nn.Embedding(512, width)
        self.norm, self.pool = nn.LayerNorm(width), nn.Linear(width, width)
        self.layers = nn.Sequential(*(Layer(width, heads, norm_first=False) for _ in range(depth)))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.tokens(ids) + self.places.weight[: ids.shape[1]])
        return torch.tanh(self.pool(self.layers(x)[:, 0]))


class VisionTransformer(nn.Module):
    """ViT-S/16 of images 224 x 224."""

    def __init__(self, width: int = 384, depth: int = 12, heads: int = 6) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 16, stride=16)
        self.first, self.places = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 197, width))
        self.layers = nn.Sequential(*(Layer(width, heads, norm_first=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.first.expand(y.shape[0], -1, -1), y], 1) + self.places
        return self.head(self.norm(self.layers(y))[:, 0])


class Decoder(nn.Module):
    """One decode step of a GPT-2-sized model: a token, and the keys and values of those before it."""

    def __init__(self, width: int = 768, depth: int = 12, heads: int = 12, tokens: int = 50257) -> None:
        super().__init__()
        self.depth = depth
        self.embed, self.norm = nn.Embedding(tokens, width), nn.LayerNorm(width)
        self.layers = nn.ModuleList(Layer(width, heads, norm_first=True) for _ in range(depth))

    def forward(self, token: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.embed(token)
        new_keys, new_values = [], []
        for i, layer in enumerate(self.layers):
            y, attention = layer.norm1(x), layer.attention
            key = torch.cat([keys[:, i], attention.split(attention.key(y))], 2)
            value = torch.cat([values[:, i], attention.split(attention.value(y))], 2)
            seen = F.scaled_dot_product_attention(attention.split(attention.query(y)), key, value)
            x = x + attention.out(seen.transpose(1, 2).flatten(2))
            x = x + layer.down(F.gelu(layer.up(layer.norm2(x)), approximate="tanh"))
            new_keys.append(key)
            new_values.append(value)
        return F.linear(self.norm(x), self.embed.weight), torch.stack(new_keys, 1), torch.stack(new_values, 1)


def _double(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """U-Net with 32 to 256 channels."""

    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(depth + 1)]
        self.down = nn.ModuleList(_double(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(_double(a + b, a) for a, b in zip(widths, widths[1:], strict=False))
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if i else x)
            kept.append(x)
        for block, skip in zip(reversed(self.up), reversed(kept[:-1]), strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), skip], 1))
        return self.head(x)


class CifarResNet(nn.Module):
    """ResNet-20 of images 32 x 32."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        for inputs, outputs in ((16, 16), (16, 32), (32, 64)):
            layers += [_Basic(inputs if i == 0 else outputs, outputs) for i in range(3)]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3)))


class _Basic(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.a, self.a_norm = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.b, self.b_norm = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.skip = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b_norm(self.b(F.relu(self.a_norm(self.a(x))))) + self.skip(x))


def _norm_relu6(conv: nn.Conv2d) -> list[nn.Module]:
    return [conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU6()]


class _Inverted(nn.Module):
    """An inverted residual without squeeze and excitation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = inputs * expand
        wider = _norm_relu6(nn.Conv2d(inputs, inner, 1, bias=False)) if expand > 1 else []
        depthwise = nn.Conv2d(inner, inner, kernel, stride, kernel // 2, groups=inner, bias=False)
        narrower = [nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.layers = nn.Sequential(*wider, *_norm_relu6(depthwise), *narrower)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class EfficientNetLite0(nn.Sequential):
    """EfficientNet-Lite0 of images 224 x 224."""

    # kernel, stride, expansion, outputs, blocks
    STAGES = (
        (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4),
        (3, 1, 6, 320, 1),
    )  # fmt: skip

    def __init__(self) -> None:
        layers, width = _norm_relu6(nn.Conv2d(3, 32, 3, 2, 1, bias=False)), 32
        for kernel, stride, expand, outputs, blocks in self.STAGES:
            for i in range(blocks):
                layers.append(_Inverted(width, outputs, kernel, stride if i == 0 else 1, expand))
                width = outputs
        layers += _norm_relu6(nn.Conv2d(width, 1280, 1, bias=False))
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))


class Mlp(nn.Sequential):
    """The network of the demo."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model: nn.Module = getattr(import_torchvision().models, name)(weights=None)
        return model

    return build


class Recurrent(nn.Module):
    """Two LSTM layers over a sequence and a classifier of its last step."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.layers, self.head = nn.LSTM(inputs, hidden, 2, batch_first=True), nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[0][:, -1])


class Pretrainable(nn.Module):
    """The hidden states of a network of Hugging Face's transformers, of its usual width and two layers deep.

    Args:
        name: of the kind, as AutoConfig has it: bert, gpt2, llama, clip_vision_model, …
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        transformers = importlib.import_module("transformers")
        config = transformers.AutoConfig.for_model(name)
        for depth in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"):
            if hasattr(config, depth):
                setattr(config, depth, 2)
        self.model = transformers.AutoModel.from_config(config)
        self.model = self.model.encoder if config.is_encoder_decoder else self.model
        self.reads = self.model.main_input_name

    def forward(self, x: Tensor) -> Tensor:
        return self.model(**{self.reads: x}).last_hidden_state


def _transformers(name: str) -> Case:
    model = Pretrainable(name)
    make = {"input_ids": _ids, "pixel_values": _images(224)}.get(model.reads)
    return Case(lambda: model, make or (lambda batch: (torch.randn(batch, 80, 3000),)))


_LIBRARIES: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """torchvision, of which the networks are plain Python.

    Its compiled extension does not load beside a torch without CUDA, and then two ops are missing whose shapes its
    Python registers: they are declared here.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)
        for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        return importlib.import_module("torchvision")


def settled(model: nn.Module) -> nn.Module:
    """The model in eval mode, its batch norms with statistics as training leaves them."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return model.eval()


def _images(size: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.randn(batch, 3, size, size),)


def _ids(batch: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, 30522, (batch, 128)),)


def _step(batch: int) -> tuple[Tensor, ...]:
    cache = (batch, 12, 12, 128, 64)
    return torch.randint(0, 50257, (batch, 1)), torch.randn(cache), torch.randn(cache)


_CNN = (1, 16)

CASES: dict[str, Case] = {
    "MLP": Case(Mlp, lambda batch: (torch.randn(batch, 784),), (1, 64)),
    "ResNet-20": Case(CifarResNet, _images(32), _CNN),
    "ResNet-18": Case(_torchvision("resnet18"), _images(224), _CNN),
    "ResNet-50": Case(_torchvision("resnet50"), _images(224), _CNN),
    "MobileNetV2": Case(_torchvision("mobilenet_v2"), _images(224), _CNN),
    "MobileNetV3-L": Case(_torchvision("mobilenet_v3_large"), _images(224), _CNN),
    "EfficientNet-Lite0": Case(EfficientNetLite0, _images(224), _CNN),
    "EfficientNetV2-S": Case(_torchvision("efficientnet_v2_s"), _images(224), _CNN),
    "ConvNeXt-T": Case(_torchvision("convnext_tiny"), _images(224), _CNN),
    "U-Net": Case(UNet, _images(128), _CNN),
    "ViT-S/16": Case(VisionTransformer, _images(224)),
    "BERT-base": Case(lambda: Bert(768, 12, 12), _ids),
    "MiniLM-L6": Case(lambda: Bert(384, 6, 12), _ids),
    "GPT-2 decode step": Case(Decoder, _step),
    "LSTM": Case(lambda: Recurrent(128, 256, 10), lambda batch: (torch.randn(batch, 100, 128),), (1, 16)),
}


def case_of(name: str) -> Case:
    """A network of the list, any classifier of torchvision, torchvision:NAME, or kind of transformers:NAME."""
    library, _, model = name.rpartition(":")
    if library == "transformers":
        return _transformers(model)
    return Case(_torchvision(model), _images(224), _CNN) if library == "torchvision" else CASES[name]
