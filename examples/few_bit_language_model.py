"""A small language model whose weights get few bits, by rounding and by training: the order that ParetoQ found.

    python examples/few_bit_language_model.py TEXT [--steps 1500] [--share 0.3] [--seed 0]

TEXT is any English text of a megabyte or more. A transformer of bytes is trained in float32 on its first nine tenths;
then its linear layers get 4, 2 and 1 bits, once rounded and once trained on for `--share` of the steps with the float
model as teacher. Perplexity is of bytes of the last tenth, through the artifact. Liu et al.: ParetoQ: scaling laws in
extremely low-bit LLM quantization. arXiv 2502.02631, 2025.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import mcc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BYTES, WIDTH, DEPTH, HEADS, CONTEXT, BATCH = 256, 128, 4, 4, 128, 32
RATE = 2e-3
KEPT = "['embed', 'head']"  # first and last layer stay in float, as in the paper
WAYS = {
    "4 bits": "weights='int4'",
    "2 bits, {-2, -1, 0, 1}": "weights='int2'",
    "2 bits, halves": "weights='int2', midpoints=True",
    "1.58 bits": "weights='ternary'",
    "1 bit": "weights='binary'",
}


class Block(nn.Module):
    """A transformer layer, norms first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """One layer of [batch, CONTEXT, WIDTH]."""
        y = self.norm1(x)
        parts = (layer(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        x = x + self.out(functional.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Language(nn.Module):
    """Bytes [batch, CONTEXT] to logits of the byte that follows each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(BYTES, WIDTH), nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, BYTES)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of [batch, CONTEXT] bytes."""
        return self.head(self.norm(self.blocks(self.embed(ids) + self.places)))


class Windows:
    """Batches of windows from random places, with the bytes that follow: the same ones in each epoch."""

    def __init__(self, text: Tensor, steps: int, seed: int) -> None:
        self.text, self.steps, self.seed = text, steps, seed

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            starts = torch.randint(len(self.text) - CONTEXT - 1, (BATCH, 1), generator=generator)
            rows = self.text[starts + torch.arange(CONTEXT + 1)]
            yield rows[:, :-1], rows[:, 1:]


def loss(logits: Tensor, following: Tensor) -> Tensor:
    """Mean cross-entropy of the bytes that follow."""
    return functional.cross_entropy(logits.flatten(0, 1), following.flatten())


def trained(text: Tensor, steps: int, seed: int, console: Console) -> Language:
    """The model in float32."""
    torch.manual_seed(seed)
    model = Language()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for ids, following in track(Windows(text, steps, seed), "training in float32", steps, console=console):
        optimizer.zero_grad()
        loss(model(ids), following).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def perplexity(run: Callable[[Tensor], Any], text: Tensor) -> float:
    """Of the bytes of a text, in windows."""
    windows = text[: len(text) // (CONTEXT * BATCH) * CONTEXT * BATCH + 1]
    ids, following = (part.reshape(-1, BATCH, CONTEXT) for part in (windows[:-1], windows[1:]))
    with torch.no_grad():
        return math.exp(sum(float(loss(run(x), y)) for x, y in zip(ids, following, strict=True)) / len(ids))


def main() -> None:
    """Train, compress in each way, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console()
    text = torch.frombuffer(bytearray(options.text.read_bytes()), dtype=torch.uint8).long()
    cut = len(text) * 9 // 10
    seen, unseen = text[:cut], text[cut:][: 64 * CONTEXT * BATCH + 1]
    model = trained(seen, options.steps, options.seed, console)
    data = mcc.Data(train=Windows(seen, int(options.steps * options.share), options.seed + 1), loss=loss)
    example = (seen[: BATCH * CONTEXT].reshape(BATCH, CONTEXT),)
    table = Table("weights", "rounded", "trained", "file, kB", title=f"perplexity of bytes, seed {options.seed}")

    def measured(passes: str) -> tuple[float, float]:
        artifact = mcc.compile(model, example, passes=passes, data=data, measure="never", tuning="model")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.mcc"
            artifact.save(path)
            return perplexity(mcc.load(path), unseen), path.stat().st_size / 1e3

    table.add_row("float32", f"{perplexity(model, unseen):.3f}", "", f"{measured('')[1]:.0f}")
    for name, option in WAYS.items():
        quantize = f"quantize{{{option}, activations=None, exclude={KEPT}}}"
        rounded, size = measured(quantize)
        after, _ = measured(f"{quantize}; fine-tune{{learning_rate=0.001, distill=0.5}}")
        table.add_row(name, f"{rounded:.3f}", f"{after:.3f}", f"{size:.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
