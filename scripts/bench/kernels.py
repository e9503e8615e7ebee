"""Guidance and sampler arithmetic: correctness against float64, launches and traffic, then times.

    python -m scripts.bench.kernels                 # what this machine can answer
    python -m scripts.bench.kernels --out docs/figures

On a CPU it counts launches and bytes. On a GPU it also times our kernels (called, and replayed as a
CUDA graph), diffusers' own formulas, torch.compile of the reference, and a device copy of as many
bytes; inputs rotate through more than the L2 cache, and every figure is the median of at least 50
runs. Writes kernels_counts.csv, kernels_<GPU>.csv and kernels_<GPU>_bars.csv (the targets, and
whether they are met), each with the machine, the versions and the date.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sampler_kernels import leaves, map_tree

from sampler.core.benchmark import CASES, Step, count
from scripts.bench import gpu as bench_gpu


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("docs/figures"), help="folder for the CSVs"
    )
    parser.add_argument("--only", choices=["correct", "counts", "gpu"], help="one part")
    given = parser.parse_args()
    args_out, only = given.out, given.only
    parts = [only] if only else ["correct", "counts", "gpu"]
    if "correct" in parts:
        _show("relative error against float64", list(errors()))
    if "counts" in parts:
        _write(args_out / "kernels_counts.csv", list(counts()))
    if "gpu" in parts and torch.cuda.is_available():
        name = torch.cuda.get_device_name().lower().replace(" ", "-")
        rows = list(bench_gpu.gpu_rows())
        _write(args_out / f"kernels_{name}.csv", rows)
        _write(args_out / f"kernels_{name}_bars.csv", list(bars(rows)))


def errors() -> Iterator[dict[str, Any]]:
    """Every case against the same step in float64. Raises SystemExit beyond 1e-6."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for case in CASES:
        step = Step(case, (3, 5000), device, torch.float32)
        fn, args = step.function()
        with torch.no_grad():
            mine = fn(*args)
            exact = fn(*map_tree(_double, list(args)))
        pairs = [(a, b) for a, b in zip(leaves(mine), leaves(exact), strict=True)
                 if isinstance(a, torch.Tensor) and a.dtype == torch.float32]  # fmt: skip
        worst = max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)
        yield {"case": case.name, "device": device, "error": f"{worst:.1e}"}
        if not worst <= 1e-6:
            raise SystemExit(f"{case.name}: {worst} is beyond 1e-6; no times are taken.")


def counts() -> Iterator[dict[str, Any]]:
    """Launches and bytes of every case, ours and of the reference in eager torch."""
    for case in CASES:
        mine, eager = count(case, "triton"), count(case, "reference")
        yield {
            "case": case.name,
            "launches": mine.kernels,
            "torch operations": mine.others,
            "bytes per element": round(mine.bytes, 1),
            "least bytes per element": case.least or "",
            "eager launches": eager.others,
            "eager bytes per element": round(eager.bytes, 1),
        }


def bars(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Compare these rows with the targets of the kernels on an H200."""
    found = {(row["case"], row["size"]): row for row in rows}

    def bar(case: str, size: str, what: str, least: float, value: Callable[[Any], float]) -> Any:
        row = found.get((case, size))
        if row is None:
            return None
        reached = value(row)
        return {"case": case, "size": size, "bar": what, "measured": round(reached, 3),
                "reached": reached >= least}  # fmt: skip

    graph, eager, sdxl = "ours in a graph µs", "diffusers µs", "SDXL, 1024²"
    yield from filter(None, (
        bar("CFG + DDIM", bench_gpu.BIG, "share of copy >= 0.9", 0.9, lambda r: r["of copy"]),
        bar("APG + DDIM", bench_gpu.BIG, "share of copy >= 0.85", 0.85, lambda r: r["of copy"]),
        bar("APG + DDIM", sdxl, "6 µs / graph replay >= 1", 1, lambda r: 6 / r[graph]),
        bar("APG + DDIM", sdxl, "eager diffusers / ours >= 8", 8, lambda r: r[eager] / r[graph]),
    ))  # fmt: skip
    compiled = "compiled reference in a graph µs"
    for case, size in found:
        yield bar(case, size, "compiled / ours >= 0.95", 0.95, lambda r: r[compiled] / r[graph])


def _double(value: Any) -> Any:
    return (
        value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
    )


def machine() -> str:
    """Describe the machine that a figure was made on."""
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if torch.cuda.is_available():
        versions = f"driver {_driver()}, CUDA {torch.version.cuda}, {versions}"
    return f"{here}, {torch.get_num_threads()} threads, {versions}, {datetime.date.today()}"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    print(f"\n{title} ({machine()})")
    for row in rows:
        print("  " + "  ".join(f"{k}: {v}" for k, v in row.items()))


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A CSV whose first line says which machine made it."""
    _show(path.stem, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.write(f"# python -m scripts.bench.kernels; {machine()}\n")
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
