"""Stress tests of batch runs, full size: `python -m scripts.bench.batch [part ...]`.

Every part writes docs/figures/batch_PART.csv (columns: measure, value, wanted); `table` puts them
into docs/reliability.md. Parts: kills, points, naive, fuzz, names, files, folders, corruptions,
million, noop, leak, saving, throughput, adaptive, network. The tests in tests/runs/ are the same
checks, shortened.
"""

from __future__ import annotations

import csv
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

Row = tuple[str, Any, str]
START, END = "<!-- figures -->", "<!-- end of figures -->"
FIGURES = ROOT / "docs" / "figures"


def parts() -> dict[str, Callable[[Path], Iterable[Row]]]:
    """Map each part to the function that measures it in an empty folder."""
    from scripts.bench import batch_faults, batch_hostile, batch_speed, batch_stock

    return {
        "kills": batch_faults.kills,
        "points": batch_faults.points,
        "naive": batch_faults.naive,
        "corruptions": batch_faults.corruptions,
        "fuzz": batch_hostile.fuzz,
        "names": batch_hostile.names,
        "files": batch_hostile.files,
        "folders": batch_hostile.folders,
        "million": batch_speed.million,
        "noop": batch_speed.noop,
        "leak": batch_speed.leak,
        "saving": batch_speed.saving,
        "throughput": batch_stock.plain,
        "adaptive": batch_stock.adaptive,
        "network": batch_stock.network,
    }


def main(chosen: list[str]) -> None:
    """Measure the given parts, or all; `table` writes the results into the page."""
    known = parts()
    if chosen == ["table"]:
        write_table(known)
        return
    if unknown := [name for name in chosen if name not in known]:
        raise SystemExit(f"unknown part {unknown[0]!r}; known: {', '.join(known)}")
    FIGURES.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    for name in chosen or list(known):
        before = os.getloadavg()[0]
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            rows = [*known[name](Path(folder)), ("machine", machine, "")]
        load = f"{before:.1f}, {os.getloadavg()[0]:.1f}"
        rows.append(("load of the machine before and after", load, "< 1"))
        with open(FIGURES / f"batch_{name}.csv", "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["measure", "value", "wanted"])
            writer.writerows(rows)
        for measure, value, wanted in rows:
            print(
                f"{name}: {measure}: {value}{f' (wanted {wanted})' if wanted else ''}", flush=True
            )


def write_table(known: Iterable[str]) -> None:
    """Render the figures as a table between the markers of docs/reliability.md."""
    lines = ["| part | measure | value | wanted |", "|---|---|---|---|"]
    for name in known:
        path = FIGURES / f"batch_{name}.csv"
        if path.exists():
            with open(path, newline="", encoding="utf-8") as stream:
                rows = list(csv.reader(stream))[1:]
            lines += [f"| {name} | {' | '.join(row)} |" for row in rows]
    page = ROOT / "docs" / "reliability.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    text = "\n".join([before + START, *lines, END + after])
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
