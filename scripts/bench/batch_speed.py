"""Time and memory of planning, resuming and saving."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sampler.core.batch import Sample, sample_batch, to_output
from sampler.engine import Engine
from sampler.runs.location import RunLocation
from tests.runs.stub import StubAdapter, make, prompts

Row = tuple[str, Any, str]
SIZE, STEPS = (512, 512), 4

_PLAN = """
import resource, sys, time
from pathlib import Path
from sampler.runs.settings import RunDefaults, complete_spec
from sampler.runs.jobs import Model, JobSettings
from sampler.runs.planner import Planner
from sampler.runs.location import RunLocation, open_locked
from sampler.runs.start import plan_run, start
from sampler.runs.tables import read_table
settings = JobSettings(20, None, None, complete_spec("sampler", "ddim"),
                    complete_spec("guidance", {"name": "cfg", "scale": 3.0}))
model = Model("files:" + "0" * 64, native=(64, 64))
began = time.perf_counter()
with open_locked(RunLocation(sys.argv[2])) as store:
    planner = Planner(model, RunDefaults(settings), "auto")
    run = start(store, plan_run(planner, read_table(sys.argv[1])))
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
    make(
        folder / "run", prompts(10_000), batch_size=500, steps=1, location=_unsynced(folder / "run")
    )
    line = [sys.executable, "-m", "sampler", "resume", str(folder / "run"), "-q"]
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

    def written(lines: Any) -> None:
        done[0] += len(lines)
        seen.append((done[0], _resident()))

    make(
        folder / "run",
        prompts(2000),
        batch_size=8,
        on_written=written,
        location=_unsynced(folder / "run"),
    )
    late = [(count, memory) for count, memory in seen if count > 400]
    half = len(late) // 2
    first = sorted(memory for _, memory in late[:half])[half // 2]
    last = sorted(memory for _, memory in late[half:])[(len(late) - half) // 2]
    growth = (last - first) / ((2000 - 400) / 2) * 100
    yield "images", 2000, "2000"
    yield "growth of memory, MiB per 100 images", f"{growth:.3f}", "<= 0.5"


def saving(folder: Path) -> Iterator[Row]:
    """A network of 50 ms a step, 512 x 512: the loop alone, the run, a loop that saves inline.

    Taken in turns, A B C C B A, after a warm-up, each over 64 images in batches of two.
    """
    ways = [_loop, _run, _loop_with_save]
    taken = dict.fromkeys(ways, 0.0)
    for way in ways:
        way(folder / f"warm-{way.__name__}", 4)
    for turn, way in enumerate([*ways, *reversed(ways)]):
        began = time.perf_counter()
        way(folder / str(turn), 64)
        taken[way] += time.perf_counter() - began
    alone, ours, inline = taken.values()
    yield "images", 128, ""
    yield "denoiser, loop and decoding alone, s", f"{alone:.2f}", ""
    yield "the run with all its files, s", f"{ours:.2f}", ""
    yield "ratio to denoising alone", f"{ours / alone:.3f}", "<= 1.05"
    yield "inline image.save() instead, s", f"{inline:.2f}", ""


class _Decoding(StubAdapter):
    """Stub VAE of factor 8 whose images have grain, so that they compress like photographs."""

    def __init__(self) -> None:
        super().__init__(pause=0.05)
        noise = torch.Generator().manual_seed(0)
        self.grain = 0.05 * torch.rand(3, *SIZE, generator=noise)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        return (3, height // 8, width // 8)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        wide = torch.nn.functional.interpolate(latents, scale_factor=8.0, mode="bilinear")
        return (wide / 4 + 0.5 + self.grain).clamp(0, 1)


def _run(folder: Path, count: int) -> None:
    adapter: Any = _Decoding()
    height, width = SIZE
    table: Any = [
        (line[0], {**line[1], "height": height, "width": width}) for line in _lines(count)
    ]
    made = Engine(adapter, adapter, "ddim", {"name": "cfg", "scale": 3.0})
    make(folder, table, made, batch_size=2, steps=STEPS)


def _loop(folder: Path, count: int) -> None:
    for _ in _images(count):
        pass


def _loop_with_save(folder: Path, count: int) -> None:
    folder.mkdir()
    for number, images in enumerate(_images(count)):
        for k, image in enumerate(to_output(images, "pil")):
            image.save(folder / f"{2 * number + k}.png")


def _lines(count: int) -> Any:
    """Return lines of a prompt table, (place, cells) first."""
    return prompts(count)


def _images(count: int) -> Iterator[torch.Tensor]:
    """Return items in pairs."""
    adapter: Any = _Decoding()
    made = Engine(adapter, adapter, "ddim", {"name": "cfg", "scale": 3.0})
    texts = [line[1]["prompt"] for line in _lines(count)]
    for first in range(0, count, 2):
        jobs = [Sample(text, "", first) for text in texts[first : first + 2]]
        with torch.no_grad():
            done = sample_batch(made, jobs, SIZE, STEPS, made.sampler, made.guidance)
            yield adapter.decode(done.latents)


def _unsynced(where: Path) -> RunLocation:
    """Disable fsync, so that the disk is not measured."""
    return RunLocation(str(where), fsync=False)


def _resident() -> float:
    """Return the resident memory of this process in MiB."""
    with open("/proc/self/statm", encoding="ascii") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
