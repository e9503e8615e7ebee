"""The tables of samplers.md, restoring.md and howto/calibrate.md, from the studies' files."""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from scripts.study.markdown import Row, Table, grid
from scripts.study.restore_tables import (
    calmed,
    ceiling,
    gaussian,
    inverse,
    methods,
    settings,
    times,
)

Stored = Callable[[str], list[Row]]


def write(docs: Path, stored: Stored) -> None:
    """Rewrite every table of the pages in `docs`, between its markers.

    Raises ValueError for a marker whose study has no rows, and for a table without a marker.
    """
    for page, tables in TABLES.items():
        found = {name: table(rows) for name, (study, table) in tables.items()
                 if (rows := stored(study))}  # fmt: skip
        _write(docs / page, found)


def _write(page: Path, tables: dict[str, list[str]]) -> None:
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end of table -->", re.DOTALL)
    found = pattern.findall(text)
    if sorted(found) != sorted(tables):
        raise ValueError(f"{page} has markers for {found}, the tables are {list(tables)}.")

    def renewed(match: re.Match[str]) -> str:
        lines = "\n".join(tables[match[1]])
        return f"<!-- table: {match[1]} -->\n\n{lines}\n\n<!-- end of table -->"

    page.write_text(pattern.sub(renewed, text), encoding="utf-8")


def mixture(rows: list[Row]) -> list[str]:
    """Per sampler the error as a multiple of the best fixed number's, over all settings."""
    settings: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in rows:
        settings[row["scale"], row["steps"]][row["sampler"]] = float(row["error"])
    names = list(next(iter(settings.values())))
    fixed = [n for n in names if n == "ddim" or n.startswith("ghvb")]
    shares = {n: [e[n] / min(e[f] for f in fixed) for e in settings.values()] for n in names}
    return grid(
        ("sampler", "geometric mean", "worst"),
        [(f"`{n}`", f"{_mean(s):.2f}", f"{max(s):.1f}") for n, s in shares.items()],
    )


def orders(rows: list[Row]) -> list[str]:
    """Observed orders, one column per grid."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for row in rows:
        found[row["sampler"]][row["grid"]] = f"{float(row['order']):.2f}"
    return grid(
        ("sampler", "equal steps in sigma/alpha", "Karras' steps"),
        [(f"`{name}`", o["equal"], o["karras"]) for name, o in found.items()],
    )


def bundled(cell: Callable[[Row], str]) -> Callable[[list[Row]], list[str]]:
    """A table of one measure: a row per sampler, a column per scale and number of steps."""

    def table(rows: list[Row]) -> list[str]:
        scales, steps = (sorted({float(r[k]) for r in rows}) for k in ("scale", "steps"))
        columns = list(itertools.product(scales, steps))
        found = {(r["sampler"], float(r["scale"]), float(r["steps"])): cell(r) for r in rows}
        return grid(
            ("sampler", *(f"scale {w:g}, {n:g} steps" for w, n in columns)),
            [
                (f"`{name}`", *(found.get((name, *column), "–") for column in columns))
                for name in dict.fromkeys(r["sampler"] for r in rows)
            ],
        )

    return table


def quality(model: str) -> Table:
    """Distance or spread, and prompts recognised, per sampler and number of steps; all seeds."""

    def cell(rows: list[Row]) -> str:
        right, images = (sum(int(r[key]) for r in rows) for key in ("right", "images"))
        values = [float(r["distance"] or r["spread"]) for r in rows]
        mean, low, high = sum(values) / len(values), min(values), max(values)
        text = f"{mean:.2f} ({low:.2f}–{high:.2f})"
        return text if right == images else f"{text}, {right} of {images}"

    def table(rows: list[Row]) -> list[str]:
        cells: dict[str, dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            if row["model"] == model:
                name = f"{row['sampler']}, {row['grid']}" if row["grid"] else row["sampler"]
                cells[name][int(row["steps"])].append(row)
        steps = sorted({n for found in cells.values() for n in found})
        lines = [
            (
                f"`{name}`",
                "distance" if next(iter(found.values()))[0]["distance"] else "spread",
                *(cell(found[n]) if n in found else "" for n in steps),
            )
            for name, found in cells.items()
        ]
        return grid(("sampler", "measure", *(f"{n} steps" for n in steps)), lines)

    return table


def accuracy(row: Row) -> str:
    low, mean, high = (100 * float(row[k]) for k in ("accuracy_low", "accuracy", "accuracy_high"))
    return f"{mean:.1f} ({low:.0f}–{high:.0f})"


def frechet(row: Row) -> str:
    return f"{float(row['frechet']):.1f} ± {float(row['frechet_std']):.1f}"


def distance(row: Row) -> str:
    return f"{float(row['distance']):.3f}"


def calibrated(rows: list[Row]) -> list[str]:
    """Shipped numbers against the default on fresh prompts."""
    return grid(
        ("steps", "scale", "number", "its error", "error of 1.8", "ratio", "nearer in"),
        [
            (
                r["steps"],
                f"{float(r['scale']):g}",
                r["number"],
                f"{float(r['error']):.3f}",
                f"{float(r['default']):.3f}",
                f"{float(r['ratio']):.3f} ({float(r['low']):.3f}–{float(r['high']):.3f})",
                f"{100 * float(r['nearer']):.0f} %",
            )
            for r in rows
        ],
    )


def grids(rows: list[Row]) -> list[str]:
    """Error of every candidate, one column per number of steps; the chosen one is bold."""
    steps = sorted({int(r["steps"]) for r in rows})
    found = {(r["grid"], int(r["steps"])): r for r in rows}

    def cell(row: Row) -> str:
        text = f"{float(row['error']):.3f}"
        return f"**{text}**" if row["chosen"] == "1" else text

    return grid(
        ("grid", *(f"{n} steps" for n in steps)),
        [
            (f"`{name}`", *(cell(found[name, n]) for n in steps))
            for name in dict.fromkeys(r["grid"] for r in rows)
        ],
    )


def _mean(shares: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, shares)) / len(shares))


# page -> marker on it -> (study, table)
TABLES: dict[str, dict[str, tuple[str, Table]]] = {
    "samplers.md": {
        "quality_vp": ("quality", quality("bundled")),
        "quality_flow": ("quality", quality("bundled-flow")),
        "mixture": ("mixture", mixture),
        "orders": ("orders", orders),
        "accuracy": ("bundled", bundled(accuracy)),
        "frechet": ("bundled", bundled(frechet)),
        "distance": ("bundled", bundled(distance)),
    },
    "howto/calibrate.md": {
        "grids": ("grids", grids),
        "calibrated": ("calibrated", calibrated),
    },
    "restoring.md": {
        "methods": ("restore", methods),
        "gaussian": ("restore_gaussian", gaussian),
        "psnr": ("inverse", inverse("psnr", 2)),
        "ssim": ("inverse", inverse("ssim", 3)),
        "ceiling": ("inverse", ceiling),
        "settings": ("inverse", settings),
        "calmed": ("inverse", calmed),
        "times": ("times", times),
    },
}
