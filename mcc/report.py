"""What mcc did: a row per pass and a row per layer, printed as tables, as a dict, and as JSON.

This file is loaded by deployed programs: it imports the standard library alone (rich only when a table is printed).
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field
from typing import Self


@dataclass(frozen=True)
class Size:
    """The size of a graph.

    Attributes:
        parameters: count of weights; a sparse weight counts its non-zero values.
        stored_bytes: bytes of those weights as stored.
        macs: multiply-accumulates of one call at the example shapes; a sparse weight counts its non-zero ones.
    """

    parameters: int
    stored_bytes: int
    macs: int


@dataclass(frozen=True)
class Declined:
    """A layer that a pass or a kernel could not take.

    Attributes:
        layer: the layer's name in the model.
        reason: why, in words.
    """

    layer: str
    reason: str


@dataclass(frozen=True)
class PassRow:
    """What one pass did.

    Attributes:
        text: the pass as text.
        edits: changes made.
        declined: candidates not taken, with reasons.
        size: of the graph after the pass.
        largest_error: largest difference its verification saw, relative to the largest output; None if unverified.
        metric: the user's metric after the pass, if given and asked for.
        latency_ms: median latency of the artifact compiled from this state, where measured.
        seconds: time the pass took, verification included.
        notes: further facts, such as an adjusted option.
    """

    text: str
    edits: int
    declined: tuple[Declined, ...]
    size: Size
    largest_error: float | None = None
    metric: float | None = None
    latency_ms: float | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerRow:
    """How one layer was lowered.

    Attributes:
        layer: the layer's name in the model.
        op: the op, with its fused epilogue.
        kernel: the kernel that runs it.
        stored: the format its weight is stored in.
        stored_bytes: bytes of its weights in the artifact.
        macs: multiply-accumulates of one call at the example shapes.
        reason: why it runs on a fallback, or empty.
    """

    layer: str
    op: str
    kernel: str
    stored: str
    stored_bytes: int
    macs: int
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """All rows of one compilation."""

    passes: tuple[PassRow, ...] = ()
    layers: tuple[LayerRow, ...] = field(default=())

    def as_dict(self) -> dict[str, object]:
        """The report as plain lists, dicts, strings and numbers."""
        return {"passes": [asdict(row) for row in self.passes], "layers": [asdict(row) for row in self.layers]}

    def as_json(self) -> str:
        """The report as JSON text with sorted keys."""
        return json.dumps(self.as_dict(), sort_keys=True, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `as_json` wrote.

        Raises:
            ValueError, KeyError, TypeError: the text is not a report.
        """
        data = json.loads(text)
        passes = tuple(
            PassRow(
                **(
                    row
                    | {
                        "declined": tuple(Declined(**d) for d in row["declined"]),
                        "size": Size(**row["size"]),
                        "notes": tuple(row["notes"]),
                    }
                )
            )
            for row in data["passes"]
        )
        return cls(passes, tuple(LayerRow(**row) for row in data["layers"]))

    def __str__(self) -> str:
        return (
            _table_text(
                (
                    "pass",
                    "edits",
                    "declined",
                    "parameters",
                    "stored bytes",
                    "MACs",
                    "largest error",
                    "metric",
                    "latency ms",
                    "s",
                ),
                [
                    (
                        row.text,
                        str(row.edits),
                        str(len(row.declined)),
                        f"{row.size.parameters:,}",
                        f"{row.size.stored_bytes:,}",
                        f"{row.size.macs:,}",
                        _number(row.largest_error, ".1e"),
                        _number(row.metric, ".4g"),
                        _number(row.latency_ms, ".3f"),
                        f"{row.seconds:.1f}",
                    )
                    for row in self.passes
                ],
            )
            + "".join(f"{row.text}: not taken: {d.layer}: {d.reason}\n" for row in self.passes for d in row.declined)
            + "".join(f"{row.text}: {note}\n" for row in self.passes for note in row.notes)
        )

    def layers_text(self) -> str:
        """The per-layer rows as a table."""
        return _table_text(
            ("layer", "op", "kernel", "stored as", "bytes", "MACs", "why a fallback"),
            [
                (row.layer, row.op, row.kernel, row.stored, f"{row.stored_bytes:,}", f"{row.macs:,}", row.reason)
                for row in self.layers
            ],
        )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _table_text(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    from rich.console import Console  # not needed to run an artifact, only to print its report
    from rich.table import Table

    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=160, force_terminal=False).print(table)
    return out.getvalue()
