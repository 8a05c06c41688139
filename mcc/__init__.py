"""mcc: a compiler that makes neural networks smaller and faster."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mcc.compiler import Compressed, compile, compress  # noqa: A004 (the public name)
    from mcc.data import Data
    from mcc.errors import MccError
    from mcc.frontend import capture
    from mcc.graph import Graph, Node
    from mcc.report import Report
    from mcc.rewrite import Context, Exact, Lossy, Match, Pass, Reject, Rewrite, Rewriter, Within
    from mcc.runtime import Artifact, load
    from mcc.target import Target, parse_target

__version__ = "0.1.0"

# names are imported at first use: `import mcc` must not load torch, which a deployed program may not have
_HOMES = {
    "Artifact": "runtime", "Compressed": "compiler", "Context": "rewrite", "Data": "data", "Exact": "rewrite",
    "Graph": "graph", "Lossy": "rewrite", "Match": "rewrite", "MccError": "errors", "Node": "graph", "Pass": "rewrite",
    "Reject": "rewrite", "Report": "report", "Rewrite": "rewrite", "Rewriter": "rewrite", "Target": "target",
    "Within": "rewrite", "capture": "frontend", "compile": "compiler", "compress": "compiler", "load": "runtime",
    "parse_target": "target",
}  # fmt: skip

__all__ = [
    "Artifact", "Compressed", "Context", "Data", "Exact", "Graph", "Lossy", "Match", "MccError", "Node", "Pass",
    "Reject", "Report", "Rewrite", "Rewriter", "Target", "Within", "capture", "compile", "compress", "load",
    "parse_target",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'mcc' has no attribute {name!r}")
    module = import_module(f"mcc.{_HOMES[name]}")
    value: object = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
