"""The tables of samplers.md, restoring.md and howto/calibrate.md, from the studies' files."""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

Row = dict[str, str]
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


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    body = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *body]


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


def inverse(measure: str, digits: int) -> Callable[[list[Row]], list[str]]:
    """A table of one measure with its standard error: a row per operator, a column per method."""

    def table(rows: list[Row]) -> list[str]:
        rows = _compared(rows)
        methods = list(dict.fromkeys(r["method"] for r in rows))
        lines = []
        for task in dict.fromkeys(r["task"] for r in rows):
            mine = {r["method"]: r for r in rows if r["task"] == task}
            best = max(mine.values(), key=lambda r: float(r[measure]))
            cells = []
            for row in (mine.get(m) for m in methods):
                text = row and f"{float(row[measure]):.{digits}f}"
                error = row and f" ± {float(row[measure + '_error']):.{digits}f}"
                cells.append(
                    f"**{text}**{error}" if row is best else f"{text}{error}" if row else "–"
                )
            lines.append((task, *cells))
        return grid(("operator", *methods), lines)

    return table


def settings(rows: list[Row]) -> list[str]:
    """The tuned setting of each method."""
    rows = [r for r in _compared(rows) if r["setting"]]
    methods = list(dict.fromkeys(r["method"] for r in rows))
    found = {(r["task"], r["method"]): r["setting"] for r in rows}
    tasks = dict.fromkeys(r["task"] for r in rows)
    return grid(
        ("operator", *methods), [(t, *(found.get((t, m), "–") for m in methods)) for t in tasks]
    )


def calmed(rows: list[Row]) -> list[str]:
    """Plain RED-Diff beside its decay and its average."""
    with_both = dict.fromkeys(r["task"] for r in rows if _is_calmed(r))
    mine = [r for r in rows if r["task"] in with_both and r["method"].startswith("reddiff")]
    return grid(
        ("operator", "method", "setting", "PSNR / dB", "SSIM"),
        [
            (
                r["task"],
                r["method"],
                r["setting"],
                f"{float(r['psnr']):.2f} ± {float(r['psnr_error']):.2f}",
                f"{float(r['ssim']):.3f} ± {float(r['ssim_error']):.3f}",
            )
            for task in with_both
            for r in mine
            if r["task"] == task
        ],
    )


def ceiling(rows: list[Row]) -> list[str]:
    """The autoencoder alone, on the true images."""
    (row,) = (r for r in rows if r["method"] == "autoencoder")
    return grid(("PSNR / dB", "SSIM"), [(f"{float(row['psnr']):.1f}", f"{float(row['ssim']):.3f}")])


def times(rows: list[Row]) -> list[str]:
    """Seconds per image."""
    return grid(
        ("method", "seconds per image"),
        [(r["method"], f"{float(r['seconds per image']):.3g}") for r in rows],
    )


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


def _compared(rows: list[Row]) -> list[Row]:
    return [r for r in rows if r["task"] != "none" and not _is_calmed(r)]


def _is_calmed(row: Row) -> bool:
    return row["method"].startswith("reddiff, ")


Table = Callable[[list[Row]], list[str]]
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
        "psnr": ("inverse", inverse("psnr", 2)),
        "ssim": ("inverse", inverse("ssim", 3)),
        "ceiling": ("inverse", ceiling),
        "settings": ("inverse", settings),
        "calmed": ("inverse", calmed),
        "times": ("times", times),
    },
}
