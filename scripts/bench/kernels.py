"""Guidance and sampler arithmetic: correctness against float64, launches and traffic, then times.

    python -m scripts.bench.kernels                            # what this machine can answer
    python -m scripts.bench.kernels --only gpu --sizes SDXL    # one size
    python -m scripts.bench.kernels --only networks            # whole steps

On a CPU it counts launches and bytes. On a GPU it also times our kernels (called, queued by the
host, and replayed as a CUDA graph), diffusers' own formulas, torch.compile of the reference (at two
sizes), a device copy of as many bytes, and whole steps of random networks of the sizes of SD 1.5,
SDXL and DiT-S/2 with and without fusion. Every figure is the median of at least 30 runs.

Writes kernels_counts.csv, kernels_<GPU>.csv, kernels_<GPU>_networks.csv and kernels_<GPU>_bars.csv
(the targets, and whether they are met), each with the machine and the versions. A row is written as
soon as it is measured; rows that are there are not measured again, and nothing is begun that does
not fit into --seconds. So two or three calls of ten minutes measure everything.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from sampler_kernels import leaves, map_tree

from sampler.core.benchmark import CASES, BenchmarkStep, count
from scripts.bench import gpu, gpu_networks
from scripts.bench.meters import Cuda, Meter
from scripts.bench.tables import Table, Task, fill

PARTS = ("correct", "counts", "gpu", "networks")
Named = TypeVar("Named")


def main(arguments: list[str] | None = None, meter: Meter | None = None) -> None:
    """Measure what the options ask for. meter: a clock for a machine without a GPU, for tests."""
    given = _parser().parse_args(arguments)
    parts = [given.only] if given.only else PARTS
    if meter is None and torch.cuda.is_available():
        meter = Cuda()
    if "correct" in parts:
        _show("relative error against float64", list(errors()))
    if "counts" in parts:
        _write(given.out / "kernels_counts.csv", list(counts()))
    if meter is None:
        if given.only in ("gpu", "networks"):
            raise SystemExit(f"--only {given.only} needs a CUDA device, and there is none here.")
        return
    sizes = _selected(gpu.GPU_SIZES, given.sizes, "--sizes")
    cases = list(_selected({case.name: case for case in CASES}, given.cases, "--cases").values())
    networks = {network.name: network for network in gpu_networks.NETWORKS}
    networks = list(_selected(networks, given.networks, "--networks").values())
    timed = _table(given.out, "", ("case", "size"))
    whole = _table(given.out, "_networks", ("case", "network"))
    tasks: list[tuple[Table, Iterator[Task]]] = []
    if "gpu" in parts:
        tasks.append((timed, gpu.gpu_tasks(meter, sizes, cases)))
    if "networks" in parts:
        tasks.append((whole, gpu_networks.network_tasks(meter, networks)))
    begin = datetime.datetime.now()
    for table, rows in tasks:
        spent = (datetime.datetime.now() - begin).total_seconds()
        for row in fill(table, rows, given.seconds - spent):
            print("  ".join(f"{k}: {v}" for k, v in row.items()), flush=True)
    if compared := list(bars(timed.rows)):
        _write(given.out / f"kernels_{_device()}_bars.csv", compared)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("docs/figures"), help="folder for the CSVs"
    )
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--sizes", nargs="+", help="latents, by a part of their names")
    parser.add_argument("--cases", nargs="+", help="steps, by a part of their names")
    parser.add_argument("--networks", nargs="+", help="networks, by a part of their names")
    parser.add_argument(
        "--seconds", type=float, default=540.0, help="begin nothing that may not end by then"
    )
    return parser


def _selected(
    found: Mapping[str, Named], wanted: Sequence[str] | None, option: str
) -> dict[str, Named]:
    """The entries whose names contain one of the words; all without words."""
    if not wanted:
        return dict(found)
    for word in wanted:
        if not any(word.lower() in name.lower() for name in found):
            raise SystemExit(f"{option} {word}: no such name; there are {'; '.join(found)}.")
    return {
        name: value
        for name, value in found.items()
        if any(word.lower() in name.lower() for word in wanted)
    }


def _table(folder: Path, suffix: str, key: Sequence[str]) -> Table:
    note = f"python -m scripts.bench.kernels; {', '.join(_machine())}"
    return Table(folder / f"kernels_{_device()}{suffix}.csv", note, key)


def _device() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return name.lower().replace(" ", "-")


def errors() -> Iterator[dict[str, Any]]:
    """Every case against the same step in float64. Raises SystemExit beyond 1e-6."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for case in CASES:
        step = BenchmarkStep(case, (3, 5000), device, torch.float32)
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
    """Compare these rows with the targets of the kernels on an H200; all are open before that."""
    for row in rows:
        for what, least, measured in _targets(row):
            yield {
                "case": row["case"],
                "size": row["size"],
                "bar": f"{what} >= {least}",
                "measured": round(measured, 3),
                "reached": measured >= least,
            }


def _targets(row: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """(target, least value, measured value) of a row."""
    if row["size"] == gpu.BIG:
        yield "copy / ours", 0.9 if row["case"] == "CFG + DDIM" else 0.85, float(row["of copy"])
    for what, least, theirs, ours in (
        ("compiled / ours, graphs", 0.95, "compiled reference in a graph µs", "ours in a graph µs"),
        ("diffusers / ours, host", 1.0, "diffusers host µs", "ours host µs"),
    ):
        if row[theirs] != "":
            yield what, least, float(row[theirs]) / float(row[ours])


def _double(value: Any) -> Any:
    return (
        value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
    )


def machine() -> str:
    """Describe the machine and the day that a figure was made on."""
    return f"{', '.join(_machine())}, {datetime.date.today()}"


def _machine() -> list[str]:
    """The device, the number of threads, and the versions."""
    versions = [f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    if torch.cuda.is_available():
        versions = [f"driver {_driver()}", f"CUDA {torch.version.cuda}", *versions]
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return [here, f"{torch.get_num_threads()} threads", *versions]


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
