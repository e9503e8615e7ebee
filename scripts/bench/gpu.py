"""Times of the arithmetic of a step on a GPU, one row per case and size; part of `kernels`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from sampler_kernels import use_backend

from sampler.core.benchmark import CASES, SIZES, BenchmarkStep, Case, count
from scripts.bench.meters import Meter
from scripts.bench.tables import Task

RUNS, INNER = 50, 20
BIG = "256 Mi elements"  # bandwidth and nothing else
SDXL = "SDXL, 1024²"
GPU_SIZES = {**SIZES, BIG: (256, 1024, 1024)}
COMPILED = (SDXL, BIG)  # sizes at which torch.compile is timed: 5 to 10 seconds of compiler a row
ROTATED = 3 * 60 * 2**20  # bytes of inputs to cycle through: three times an H200's L2 cache


def gpu_tasks(
    meter: Meter,
    sizes: Mapping[str, Sequence[int]] = GPU_SIZES,
    cases: Sequence[Case] = CASES,
    repeats: tuple[int, int] = (RUNS, INNER),
) -> Iterator[Task]:
    """The rows (case, size): microseconds per step; GB/s of the bytes that our launches count.

    repeats: medians of so many timings, of so many calls each.
    """
    for name, shape in sizes.items():
        for case in cases:
            if name != BIG or case.name in ("CFG + DDIM", "APG + DDIM"):
                yield (case.name, name), partial(_measured, meter, repeats, case, name, shape)


def _measured(
    meter: Meter, repeats: tuple[int, int], case: Case, name: str, shape: Sequence[int]
) -> dict[str, Any]:
    try:
        return Timings(meter, repeats).row(case, name, (1, *shape))
    finally:
        meter.released()


class Timings:
    """Medians of timings of calls in turn."""

    def __init__(self, meter: Meter, repeats: tuple[int, int]) -> None:
        self.meter = meter
        self.runs, self.inner = repeats

    def row(self, case: Case, name: str, shape: Sequence[int]) -> dict[str, Any]:
        """The times of one case at one size, on each side."""
        steps = self._rotation(case, shape)
        mine = count(case, "triton")
        moved = mine.bytes * steps[0].x.numel()
        with torch.no_grad(), use_backend("triton"):
            called, again, host = self.called(steps), self.called(steps), self.queued(steps)
            replayed = self.replayed(steps)
        with torch.no_grad(), use_backend("reference"):
            eager, eager_host = self.called(steps), self.queued(steps)
            compiled = self._compiled(steps) if name in COMPILED else (None, None)
            stock = stock_calls(case, steps)
            stock_us = self.called(stock) if stock else None
            stock_host = self.queued(stock) if stock else None
        copied = self._copy(moved)
        figures = {
            "ours": called,
            "ours again": again,
            "ours host": host,
            "ours in a graph": replayed,
            "reference": eager,
            "reference host": eager_host,
            "compiled reference": compiled[0],
            "compiled reference in a graph": compiled[1],
            "diffusers": stock_us,
            "diffusers host": stock_host,
            "copy of as many bytes": copied,
        }
        return {
            "case": case.name,
            "size": name,
            "elements": steps[0].x.numel(),
            "launches": mine.kernels,
            "bytes": int(moved),
            **{f"{k} µs": "" if v is None else round(v, 2) for k, v in figures.items()},
            "GB/s": round(moved / replayed / 1e3, 1),
            "of copy": round(copied / replayed, 3),
        }

    def called(self, fns: Sequence[Callable[[], Any]]) -> float:
        """Microseconds of a call, launches and Python included."""
        return self._median(self.meter.microseconds, self._in_turn(fns))

    def queued(self, fns: Sequence[Callable[[], Any]]) -> float:
        """Microseconds of the host for a call: Python and launches, without waiting."""
        return self._median(self.meter.host_microseconds, self._in_turn(fns))

    def replayed(self, fns: Sequence[Callable[[], Any]]) -> float:
        """Microseconds of a call as one of `inner` in a replayed CUDA graph."""
        return self._median(self.meter.microseconds, self.meter.captured(self._in_turn(fns)))

    def _in_turn(self, fns: Sequence[Callable[[], Any]]) -> Callable[[], None]:
        def many() -> None:
            for k in range(self.inner):
                fns[k % len(fns)]()

        return many

    def _median(
        self, clock: Callable[[Callable[[], Any]], float], many: Callable[[], Any]
    ) -> float:
        many()
        return statistics.median(clock(many) / self.inner for _ in range(self.runs))

    def _compiled(self, steps: Sequence[BenchmarkStep]) -> tuple[float, float]:
        """The reference compiled by torch.compile: called, and in a graph."""
        fn = self.meter.compiled(steps[0].function()[0])
        calls = [partial(fn, *step.function()[1]) for step in steps]
        return self.called(calls), self.replayed(calls)

    def _rotation(self, case: Case, shape: Sequence[int]) -> list[BenchmarkStep]:
        """Copies of a step with inputs of their own: three to 64, up to ROTATED bytes together.

        Latents of SD 1.5 and SDXL at batch 1 still fit into the L2 cache of an H200, where a
        network's fresh predictions would be too.
        """
        first = BenchmarkStep(case, shape, self.meter.device)
        size = first.x.numel() * 8
        copies = min(max(3, -(-ROTATED // size)), 64) if self.inner > 1 else 3
        return [first, *(BenchmarkStep(case, shape, self.meter.device) for _ in range(copies - 1))]

    def _copy(self, moved: float) -> float:
        """Microseconds of a copy that reads and writes `moved` bytes together, in a graph."""
        many = min(max(2, int(ROTATED // max(moved, 1))), 64) if self.inner > 1 else 2
        size = max(int(moved) // 2, 16)
        pairs = [torch.empty(2, size, dtype=torch.uint8, device=self.meter.device)
                 for _ in range(many)]  # fmt: skip
        return self.replayed([partial(pair[1].copy_, pair[0]) for pair in pairs])


def stock_calls(case: Case, steps: Sequence[BenchmarkStep]) -> list[Callable[[], Any]] | None:
    """The same arithmetic by diffusers: its guider's function and its scheduler's step."""
    from diffusers.guiders.adaptive_projected_guidance import (
        MomentumBuffer,
        normalized_guidance,
    )
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    if case.name not in ("CFG + DDIM", "APG + DDIM"):
        return None
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    scheduler.set_timesteps(20)
    t = int(scheduler.timesteps[10])
    buffer = MomentumBuffer(-0.5)

    def call(step: BenchmarkStep) -> Any:
        if case.name == "CFG + DDIM":
            guided = step.u + 7.5 * (step.c - step.u)
        else:
            guided = normalized_guidance(step.c, step.u, 7.5, buffer, 0.0, 15.0)
        return scheduler.step(guided, t, step.x, return_dict=False)[0]

    return [partial(call, step) for step in steps]
