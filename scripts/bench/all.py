"""Summarise all speed measurements in one page: run those without a script of their own and write
docs/performance.md from the committed CSV files.

    python -m scripts.bench.all families      docs/figures/families_overhead.csv, about two minutes
    python -m scripts.bench.all document      docs/performance.md

`families`: a step of the engine and of the stock pipeline on the tests' tiny random pipelines, in
CPU seconds of one thread, from the difference of two run lengths; engine and stock take turns.
The networks are so small that the loop's own work is not lost beside them, as it is beside a real
one. Where a stock pipeline makes two calls a step, the engine makes one.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

FIGURES = ROOT / "docs" / "figures"
SHORT, LONG = 4, 20


def families(pairs: int) -> Iterator[dict[str, Any]]:
    """Milliseconds per step of every family, engine and stock."""
    import torch

    from scripts.bench.overhead import machine
    from tests.families import FAMILIES

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for family in FAMILIES.values():
        pipe = family.build()
        engine = family.engine(pipe)
        seconds: dict[str, list[float]] = {"engine": [], "stock": []}
        for pair in range(pairs + 1):
            for side in ("engine", "stock") if pair % 2 else ("stock", "engine"):
                short, long = (
                    _seconds(_run(replace(family, steps=steps), pipe, engine, side))
                    for steps in (SHORT, LONG)
                )
                if pair:  # the first pair warms up
                    seconds[side].append((long - short) / (LONG - SHORT) * 1000)
        ours, theirs = (median(seconds[side]) for side in ("engine", "stock"))
        yield {
            "family": family.name,
            "engine ms": round(ours, 3),
            "stock ms": round(theirs, 3),
            "ratio": round(ours / theirs, 3),
            "pairs": pairs,
            **machine(),
        }


def _run(family: Any, pipe: Any, engine: Any, side: str) -> Callable[[], Any]:
    if side == "engine":
        return lambda: family.ours(engine)
    return lambda: family.stock(pipe, copied=False)


def _seconds(run: Callable[[], Any]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def read(name: str) -> list[dict[str, str]]:
    """Read the rows of a committed CSV, without its comment lines."""
    text = (FIGURES / name).read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in text if not line.startswith("#")))


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def document() -> str:
    """Render the page; every figure comes from a committed file and is shown with its command."""
    parts = [
        "# Performance\n\n"
        "<!-- written by `python -m scripts.bench.all document`; a test compares the two -->\n\n"
        "CPU figures; every file has its machine, date and versions. None comes from a GPU.\n"
    ]
    for title, command, text in (
        _families(),
        _loop(),
        _hosting(),
        _rows(),
        _kernels(),
        _saving(),
        _rest(),
    ):
        parts.append(f"\n## {title}\n\n`{command}`\n\n{text}")
    return "".join(parts)


def _where(row: dict[str, str]) -> str:
    return f"{row['machine']}; load {row['load']}; {row['versions']}; {row['date']}.\n"


def _families() -> tuple[str, str, str]:
    rows = read("families_overhead.csv")
    body = [[r["family"], r["engine ms"], r["stock ms"], r["ratio"]] for r in rows]
    text = (
        "CPU milliseconds per guided step of two images, on the tests' tiny networks: what is "
        "compared is the loop around them.\n\n"
        + table(["family", "engine", "stock", "engine / stock"], body)
        + f"\n{_where(rows[0])}"
    )
    return "Overhead per family", "python -m scripts.bench.all families", text


def _loop() -> tuple[str, str, str]:
    rows = read("overhead.csv")
    body = [
        [r["pipeline"], r["network"], r["steps"], r["engine_ms_per_step"], r["stock_ms_per_step"],
         f"{r['ratio']} [{r['low']}, {r['high']}]"]
        for r in rows
    ]  # fmt: skip
    head = ["pipeline", "network", "steps", "engine ms", "stock ms", "ratio [95 %]"]
    text = (
        "The same on the bundled model; `stub`: a network that answers at once, so that the loop's "
        "own time is left. The engine also estimates `Result.solver_error`, which stock does not. "
        "Its latents are stock's bit for bit, so that guidance and sampler are as many operations "
        "on the latents as their formulas have: the reference backend may not join them.\n\n"
        + table(head, body)
        + f"\n{_where(rows[0])}"
    )
    return "Overhead of the loop", "python -m scripts.bench.overhead", text


_HOSTING = {
    "hook": ("a run inside `sampler.guide` / by itself", "at most 1.03"),
    "hook step": ("added to a step / a step", "at most 0.03"),
    "hosted": ("a hosted run / the stock call", "at most 1.02"),
    "adaptive": ("time saved by `adaptive` (hold)", "within 0.03 of the evaluations'"),
    "memory": ("peak memory, hosted / stock", "within 1 %"),
}


def _hosting() -> tuple[str, str, str]:
    rows = read("hosting.csv")
    body = [
        [_HOSTING[r["measure"]][0], r["pipeline"], r["images"], r["steps"],
         f"{r['value']} [{r['low']}, {r['high']}]", _HOSTING[r["measure"]][1]]
        for r in rows
    ]  # fmt: skip
    head = ["what", "pipeline", "images", "steps", "median [95 %]", "aim"]
    saved = [
        f"in {r['pipeline']} {r['evaluations']} of the evaluations and {r['networks']} of the "
        "time, counted in the networks alone"
        for r in rows
        if r["measure"] == "adaptive"
    ]
    text = (
        "Stock pipelines with a rule or a sampler of ours inside, in pairs that take turns.\n\n"
        + table(head, body)
        + f"\n`adaptive` saves {'; '.join(saved)}.\n\n{_where(rows[0])}"
    )
    return "Inside stock pipelines", "python -m scripts.bench.hosting", text


def _rows() -> tuple[str, str, str]:
    wanted = ("cfg 3", "drop 0.985", "drop 0.97", "hold 0.95 /2", "linear_ag")
    found = {r["point"]: r for r in read("guidance_study.csv")}
    full = float(found["cfg 3"]["rows"])
    body = [
        [p, r["rows"], f"{1 - float(r['rows']) / full:.0%}", r["accuracy"], r["frechet"], r["ssim"]]
        for p in wanted
        if (r := found.get(p))
    ]
    head = ["rule", "NFE per image", "saved", "accuracy", "Fréchet distance", "SSIM to cfg 3"]
    text = (
        "NFE per image of 20 steps on the bundled model, counted, and the quality of the "
        "images (docs/guidance_study.md names the points).\n\n" + table(head, body)
    )
    return "Evaluations saved", "python -m scripts.study.guidance", text


def _kernels() -> tuple[str, str, str]:
    body = [
        [r["case"], r["launches"], r["bytes per element"], r["eager launches"],
         r["eager bytes per element"]]
        for r in read("kernels_counts.csv")
    ]  # fmt: skip
    head = ["step", "launches", "bytes per element", "eager launches", "eager bytes"]
    text = "Guidance and sampler step together, counted (docs/kernels.md).\n\n"
    return "Kernels", "python -m scripts.bench.kernels", text + table(head, body)


def _saving() -> tuple[str, str, str]:
    rows = [*read("batch_saving.csv"), *read("batch_throughput.csv")]
    body = [[r["measure"], r["value"]] for r in rows]
    text = "Run folders against the bare loop and against a stock loop (docs/scale.md).\n\n"
    command = "python -m scripts.bench.batch"
    return "Saving and throughput", command, text + table(["measure", "value"], body)


def _rest() -> tuple[str, str, str]:
    start = read("startup.csv")
    body = [[f"{r['command']}, CPU", r["cpu_ms"], "ms"] for r in start]
    body += [[f"{r['command']}, CPU / {r['against']}", r["cpu_ratio"], "ratio"] for r in start]
    body += [[r["measure"], r["value"], r["unit"]] for r in read("finetune_bench.csv")]
    text = table(["measure", "value", "unit"], body)
    title = "Start-up, training step, memory"
    command = "python -m scripts.bench.startup; python -m scripts.bench.finetune"
    return title, command, text + f"\nStart-up: {_where(start[0])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["families", "document"])
    parser.add_argument("--pairs", type=int, default=5, help="how often each side is measured (5)")
    options = parser.parse_args()
    if options.what == "document":
        (ROOT / "docs" / "performance.md").write_text(document(), encoding="utf-8")
        return
    rows = []
    for row in families(options.pairs):
        rows.append(row)
        print(list(row.values())[:4], flush=True)
    with (FIGURES / "families_overhead.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
