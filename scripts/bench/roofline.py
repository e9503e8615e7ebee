"""Calculated times of a step's arithmetic on a GPU: from counts and data sheets, nothing measured.

    python -m scripts.bench.roofline [--csv docs/figures/kernels_roofline.csv]

    t = launches · 2 µs + bytes / (0.9 · bandwidth)

Launches and bytes are counted: of our kernels, of the reference, and of diffusers' own functions,
each torch operation a launch that reads its operands and writes its result. 2 µs is an assumption
for a small kernel in a full queue; bandwidth is 3.35 TB/s (H100 SXM) and 4.8 TB/s (H200).
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sampler.core.benchmark import CASES, SIZES, BenchmarkStep, Case, count, operations
from scripts.bench.gpu import stock_calls

LAUNCH = 2.0  # microseconds
SHARE = 0.9  # of the bandwidth
BANDWIDTH = {"H100": 3.35e6, "H200": 4.8e6}  # bytes per microsecond
NAMES = ("CFG + DDIM", "APG + DDIM", "APG + GHVB")
SIDES = ("ours", "diffusers", "reference")


class Traffic(NamedTuple):
    """Launches of a step, and bytes per latent element."""

    launches: int
    bytes: float


def microseconds(traffic: Traffic, elements: int, bandwidth: float) -> float:
    """The time of a step whose launches do not overlap."""
    return traffic.launches * LAUNCH + traffic.bytes * elements / (SHARE * bandwidth)


def sides(case: Case) -> dict[str, Traffic]:
    """The traffic of our kernels, of the reference, and of diffusers where it has the step."""
    mine, eager = count(case, "triton"), count(case, "reference")
    found = {
        "ours": Traffic(mine.kernels + mine.others, mine.bytes),
        "reference": Traffic(eager.others, eager.bytes),
    }
    step = BenchmarkStep(case, (2, 4096))
    stock = stock_calls(case, [step])
    if stock:
        with torch.no_grad():
            launches, moved = operations(stock[0])
        found["diffusers"] = Traffic(launches, moved / step.x.numel())
    return found


def rows() -> Iterator[dict[str, Any]]:
    """One row per case, size and GPU, in microseconds."""
    for case in (case for case in CASES if case.name in NAMES):
        traffic = sides(case)
        for size, shape in SIZES.items():
            elements = torch.Size(shape).numel()
            for gpu, bandwidth in BANDWIDTH.items():
                times = {k: microseconds(t, elements, bandwidth) for k, t in traffic.items()}
                yield {
                    "case": case.name,
                    "size": size,
                    "GPU": gpu,
                    **{f"{k} µs": round(times[k], 1) if k in times else "" for k in SIDES},
                }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--csv", type=Path, help="write the rows there")
    path = parser.parse_args(arguments).csv
    found = list(rows())
    for row in found:
        print("  ".join(f"{k}: {v}" for k, v in row.items()))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(found[0]))
            writer.writeheader()
            writer.writerows(found)


if __name__ == "__main__":
    main()
