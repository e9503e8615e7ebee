"""How fast, and how much memory: planning, resuming, saving, and runs against a stock loop."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sampler.runs.session import Place
from tests.runs.stub import engine, make, prompts

Row = tuple[str, Any, str]

_PLAN = """
import resource, sys, time
from pathlib import Path
from sampler.runs import rows
from sampler.runs.folder import Facts
from sampler.runs.jobs import Model, Settings
from sampler.runs.planner import Planner
from sampler.runs.session import Place, held
from sampler.runs.start import start
from sampler.runs.tables import read_table
settings = Settings(20, None, None, rows.resolved("sampler", "ddim"),
                    rows.resolved("guidance", {"name": "cfg", "scale": 3.0}))
model = Model("files:" + "0" * 64, native=(64, 64))
began = time.perf_counter()
with held(Place(sys.argv[2])) as store:
    planner = Planner(model, rows.Defaults(settings), "auto")
    run = start(store, planner, read_table(sys.argv[1]), True, Facts(model))
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
      run.total, "torch" in sys.modules)
"""


def million(folder: Path) -> Iterator[Row]:
    """A million rows with seeds and a meta column, planned into a run folder."""
    table = folder / "p.csv"
    with open(table, "w", encoding="utf-8") as stream:
        stream.write("prompt,seed,meta_id\n")
        stream.writelines(f"a red fox in the snow number {k},{k},{k}\n" for k in range(10**6))
    line = [sys.executable, "-c", _PLAN, str(table), str(folder / "run")]
    seconds, memory, jobs, heavy = subprocess.run(
        line, capture_output=True, text=True, check=True
    ).stdout.split()
    yield "rows planned", jobs, "1000000"
    yield "seconds", f"{float(seconds):.1f}", "<= 40"
    yield "peak memory, MiB", f"{float(memory):.0f}", "<= 400"
    yield "torch imported", heavy, "False"


def noop(folder: Path) -> Iterator[Row]:
    """`sampler resume` of a finished run of 10,000 images, whole process, best of five."""
    make(folder / "run", prompts(10_000), batch_size=500, steps=1, place=_unsynced(folder / "run"))
    line = [sys.executable, "-m", "sampler.cli", "resume", str(folder / "run"), "-q"]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    before, times = used.ru_utime + used.ru_stime, []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run(line, check=True)
        times.append(time.perf_counter() - began)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    yield "images", 10_000, "10000"
    yield "CPU seconds, mean", f"{(used.ru_utime + used.ru_stime - before) / 5:.2f}", ""
    yield "seconds, best of five", f"{min(times):.2f}", "<= 1.5"
    yield "seconds, worst of five", f"{max(times):.2f}", ""


def leak(folder: Path) -> Iterator[Row]:
    """Resident memory over 2,000 images in batches of 8, after the first 400."""
    seen: list[tuple[int, float]] = []
    done = [0]

    def told(lines: Any) -> None:
        done[0] += len(lines)
        seen.append((done[0], _resident()))

    make(folder / "run", prompts(2000), batch_size=8, told=told, place=_unsynced(folder / "run"))
    late = [(count, memory) for count, memory in seen if count > 400]
    half = len(late) // 2
    first = sorted(memory for _, memory in late[:half])[half // 2]
    last = sorted(memory for _, memory in late[half:])[(len(late) - half) // 2]
    growth = (last - first) / ((2000 - 400) / 2) * 100
    yield "images", 2000, "2000"
    yield "growth of memory, MiB per 100 images", f"{growth:.3f}", "<= 0.5"


def saving(folder: Path) -> Iterator[Row]:
    """A network of 50 ms a step, 512 x 512: a run against its denoiser time; inline saving."""
    table, pause, steps = prompts(24), 0.05, 4
    table = [(where, {**cells, "width": 512, "height": 512}) for where, cells in table]
    slow = engine(pause=pause)
    began = time.perf_counter()
    make(folder / "run", table, slow, batch_size=2, steps=steps)
    ours = time.perf_counter() - began
    bare = engine(pause=pause)
    rest = _denoising(bare, table, steps)
    inline = _inline(folder / "inline", table, steps, pause)
    yield "images", len(table), ""
    yield "denoiser, loop and decoding alone, s", f"{rest:.2f}", ""
    yield "the run with all its files, s", f"{ours:.2f}", ""
    yield "ratio to denoising alone", f"{ours / rest:.3f}", "<= 1.05"
    yield "inline image.save() instead, s", f"{inline:.2f}", ""


def throughput(folder: Path) -> Iterator[Row]:
    """The bundled model, 256 prompts, against the script that one would write with stock diffusers.

    A B B A over halves of the prompts, one thread, after a warm-up; the ratio is of the sums.
    """
    import batch_stock

    yield from batch_stock.compare(folder)


def _denoising(made: Any, table: Any, steps: int) -> float:
    from sampler.batch import Job, sample_batch

    began = time.perf_counter()
    for first in range(0, len(table), 2):
        jobs = [
            Job(cells["prompt"], "", k) for k, (_, cells) in enumerate(table[first : first + 2])
        ]
        x, _ = sample_batch(made, jobs, (512, 512), steps, made.sampler, made.guidance)
        made.pipeline.decode(x)
    return time.perf_counter() - began


def _inline(folder: Path, table: Any, steps: int, pause: float) -> float:
    from sampler.batch import Job, sample_batch, to_output

    folder.mkdir()
    made = engine(pause=pause)
    began = time.perf_counter()
    for first in range(0, len(table), 2):
        jobs = [
            Job(cells["prompt"], "", k) for k, (_, cells) in enumerate(table[first : first + 2])
        ]
        x, _ = sample_batch(made, jobs, (512, 512), steps, made.sampler, made.guidance)
        for k, image in enumerate(to_output(made.pipeline.decode(x), "pil")):
            image.save(folder / f"{first + k}.png")
    return time.perf_counter() - began


def _unsynced(where: Path) -> Place:
    """Without fsync: what is measured is not the disk."""
    return Place(str(where), fsync=False)


def _resident() -> float:
    """MiB of this process in memory now."""
    with open("/proc/self/statm", encoding="ascii") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
