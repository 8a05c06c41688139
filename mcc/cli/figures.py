"""Figures that commands draw: where they go is checked before any work starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mcc.errors import SpecError

if TYPE_CHECKING:
    from pathlib import Path


def check_figure(plot: Path) -> None:
    """Check that a figure can be written.

    Raises:
        SpecError: its name has an unknown ending, there is no such folder, or matplotlib is missing.
    """
    if plot.suffix not in (".svg", ".png", ".pdf"):
        raise SpecError(f"cannot draw to {plot}", remedy="end the name in .svg, .png or .pdf")
    if not plot.parent.is_dir():
        raise SpecError(f"cannot draw to {plot}: there is no folder {plot.parent}", remedy="make it")
    plotter()


def plotter() -> Any:
    """Matplotlib's pyplot, without a display.

    Raises:
        SpecError: matplotlib is missing.
    """
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise SpecError("a plot needs matplotlib", remedy="pip install matplotlib") from error
    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot
