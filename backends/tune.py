"""Choosing a tile: a model ranks candidates, a few are timed on the machine, and their times are kept in SQLite."""

from __future__ import annotations

import hashlib
import os
import platform
import sqlite3
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

from mcc.backends.kernel import Kernel, Lowered, Region
from mcc.ops import extent
from mcc.target import Target, missing_features

CANDIDATES = 3
ROUNDS = 8
Measure = Callable[[Lowered, Region, Target], Callable[[], float]]
"""Makes what times a few calls of a lowered kernel, the least seconds of one."""
Tuning = Literal["measure", "model"]


def measures(tuning: Tuning, target: Target) -> bool:
    """Whether kernels are timed: where that is asked for, and this machine runs them."""
    return tuning == "measure" and not missing_features(target)


class Tuner:
    """Chooses between a kernel's tiles.

    Args:
        tuning: "measure" times candidates on this machine, each once, and remembers; "model" takes the first.
        measure: makes what times a lowered kernel.
        path: of the cache; where it is None the user's cache folder.
        candidates: how many tiles of a kernel are timed; None times all it has.
        chosen: told of every choice.
    """

    def __init__(
        self,
        tuning: Tuning,
        measure: Measure,
        path: Path | None = None,
        candidates: int | None = CANDIDATES,
        chosen: Callable[[], None] = lambda: None,
    ) -> None:
        self.tuning = tuning
        self.candidates = candidates
        self._measure = measure
        self._path = path or cache_path()
        self._chosen = chosen
        self._known: dict[str, dict[str, float]] = {}

    def choose(self, kernel: Kernel, region: Region, target: Target) -> str:
        """The tile for a region: the fastest of the candidates and of what was timed before."""
        tiles = kernel.tiles(region, target)
        if len(tiles) == 1 or not measures(self.tuning, target):
            winner = tiles[0]
        else:
            times = self.times(kernel, region, target)
            winner = min(times, key=times.__getitem__)
        self._chosen()
        return winner

    def times(self, kernel: Kernel, region: Region, target: Target) -> dict[str, float]:
        """Seconds by tile, of the candidates and of any other tile that was timed before."""
        tiles, key = kernel.tiles(region, target), _key(kernel, region, target)
        if key not in self._known:
            self._known[key] = self._remembered(key)
        known = self._known[key]
        new = [tile for tile in tiles[: self.candidates] if tile not in known]
        timers = {tile: self._measure(kernel.lower(region, target, tile), region, target) for tile in new}
        # in turns: a machine that others use may be slow for as long as one tile is timed
        rounds = [{tile: timers[tile]() for tile in new} for _ in range(ROUNDS)]
        for tile in new:
            known[tile] = min(times[tile] for times in rounds)
            self._remember(key, tile, known[tile])
        return {tile: known[tile] for tile in tiles if tile in known}

    def _remembered(self, key: str) -> dict[str, float]:
        try:
            with self._cache() as cache:
                rows = cache.execute("SELECT tile, seconds FROM timed WHERE key = ?", (key,)).fetchall()
        except (OSError, sqlite3.Error):
            return {}  # writing will fail too, and say so
        return {str(tile): float(seconds) for tile, seconds in rows}

    def _remember(self, key: str, tile: str, seconds: float) -> None:
        try:
            with self._cache() as cache:
                cache.execute("INSERT OR REPLACE INTO timed VALUES (?, ?, ?)", (key, tile, seconds))
        except (OSError, sqlite3.Error) as error:
            warnings.warn(f"timed tiles are not remembered: {self._path}: {error}", stacklevel=2)

    @contextmanager
    def _cache(self) -> Iterator[sqlite3.Connection]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self._path, timeout=30)
        try:
            with connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS timed (key TEXT, tile TEXT, seconds REAL, PRIMARY KEY (key, tile))"
                )
                yield connection
        finally:
            connection.close()


def cache_path() -> Path:
    """Where times are kept: `$XDG_CACHE_HOME/mcc/tune.sqlite`, or below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mcc" / "tune.sqlite"


def _key(kernel: Kernel, region: Region, target: Target) -> str:
    """What the time of a kernel depends on: family, shapes, formats, epilogue, CPU and the backends' code."""
    source = [extent(s) for s in region.source.shape]
    options = [str(a) for a in region.anchor.fx.args[3:]]
    nonzeros = "" if region.weight.sparse is None else str(region.weight.sparse.values.size)
    facts = (
        _code(), kernel.name, source, region.weight.shape, region.weight.text, nonzeros, options, region.text,
        region.activation is not None, str(target), _cpu_name(),
    )  # fmt: skip
    return hashlib.sha256(repr(facts).encode()).hexdigest()


@cache
def _code() -> str:
    """A digest of the backends' sources: a tile of another kernel may bear the same name."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        fields = dict(line.split(":", 1) for line in path.read_text().split("\n\n")[0].splitlines() if ":" in line)
        named = {key.strip(): value.strip() for key, value in fields.items()}
        return " ".join(named.get(key, "") for key in ("vendor_id", "cpu family", "model", "stepping"))
    return platform.processor()
