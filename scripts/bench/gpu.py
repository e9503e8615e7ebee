"""The part of bench_kernels.py that needs a GPU: CUDA event times, one row per case and size.

Everything that only a GPU has is in `Cuda`. With `Dry` the same code runs on a CPU, on tiny sizes,
for a test: its times mean nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from sampler_kernels import use_backend

from sampler.core.benchmark import CASES, SIZES, Case, Step, count

RUNS, INNER = 50, 20
BIG = "256 Mi elements"  # bandwidth and nothing else
GPU_SIZES = {**SIZES, BIG: (256, 1024, 1024)}
ROTATED = 3 * 60 * 2**20  # bytes of inputs to cycle through: three times an H200's L2 cache


class Cuda:
    """Events, graphs and the compiler of a CUDA device."""

    device = "cuda"

    def microseconds(self, fn: Callable[[], Any]) -> float:
        """Between two events around a call."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        fn()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    def captured(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            fn()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fn()
        return graph.replay

    def compiled(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        torch.compiler.reset()
        return torch.compile(fn, fullgraph=True)

    def released(self) -> None:
        torch.cuda.empty_cache()


class Dry:
    """The same on a CPU, where nothing is captured or compiled."""

    device = "cpu"

    def microseconds(self, fn: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        fn()
        return (time.perf_counter() - begin) * 1e6

    def captured(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        return fn

    def compiled(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return fn

    def released(self) -> None:
        pass


Meter = Cuda | Dry


def gpu_rows(
    meter: Meter | None = None,
    sizes: Mapping[str, Sequence[int]] = GPU_SIZES,
    repeats: tuple[int, int] = (RUNS, INNER),
) -> Iterator[dict[str, Any]]:
    """Microseconds per step; GB/s of the bytes that our launches count.

    repeats: medians of so many timings, of so many calls each.
    """
    for name, shape in sizes.items():
        for case in CASES:
            if name == BIG and case.name not in ("CFG + DDIM", "APG + DDIM"):
                continue
            taken = _Taken(meter or Cuda(), repeats)
            yield taken.row(case, name, (1, *shape))
            taken.meter.released()


class _Taken:
    """The timings of one row."""

    def __init__(self, meter: Meter, repeats: tuple[int, int]) -> None:
        self.meter = meter
        self.runs, self.inner = repeats

    def row(self, case: Case, name: str, shape: Sequence[int]) -> dict[str, Any]:
        steps = self._rotation(case, shape)
        mine = count(case, "triton")
        moved = mine.bytes * steps[0].x.numel()
        with torch.no_grad(), use_backend("triton"):
            called, again = self._called(steps), self._called(steps)
            replayed = self._replayed(steps)
        with torch.no_grad(), use_backend("reference"):
            eager = self._called(steps)
            compiled = self.meter.compiled(steps[0].function()[0])
            theirs = [_bound(compiled, step) for step in steps]
            compiled_us, compiled_graph = self._called(theirs), self._replayed(theirs)
        stock = stock_calls(case, steps)
        with torch.no_grad():
            stock_us = self._called(stock) if stock else None
        copied = self._copy(moved)
        figures = {
            "ours": called,
            "ours again": again,
            "ours in a graph": replayed,
            "reference": eager,
            "compiled reference": compiled_us,
            "compiled reference in a graph": compiled_graph,
            "diffusers": stock_us,
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

    def _rotation(self, case: Case, shape: Sequence[int]) -> list[Step]:
        """Enough copies of a step that its inputs do not come from the L2 cache; at least three."""
        first = Step(case, shape, self.meter.device)
        size = first.x.numel() * 8
        copies = min(max(3, -(-ROTATED // size)), 64) if self.inner > 1 else 3
        return [first, *(Step(case, shape, self.meter.device) for _ in range(copies - 1))]

    def _called(self, fns: Sequence[Callable[[], Any]]) -> float:
        """Median microseconds of a call, launches and Python included."""

        def many() -> None:
            for k in range(self.inner):
                fns[k % len(fns)]()

        many()
        return statistics.median(self.meter.microseconds(many) / self.inner
                                 for _ in range(self.runs))  # fmt: skip

    def _replayed(self, fns: Sequence[Callable[[], Any]]) -> float:
        """Median microseconds of a call as one of `inner` in a replayed CUDA graph."""

        def many() -> None:
            for k in range(self.inner):
                fns[k % len(fns)]()

        replay = self.meter.captured(many)
        return statistics.median(self.meter.microseconds(replay) / self.inner
                                 for _ in range(self.runs))  # fmt: skip

    def _copy(self, moved: float) -> float:
        """Microseconds of a copy that reads and writes `moved` bytes together, in a graph."""
        many = min(max(2, int(ROTATED // max(moved, 1))), 64) if self.inner > 1 else 2
        size = max(int(moved) // 2, 16)
        pairs = [torch.empty(2, size, dtype=torch.uint8, device=self.meter.device)
                 for _ in range(many)]  # fmt: skip
        return self._replayed([lambda pair=pair: pair[1].copy_(pair[0]) for pair in pairs])


def _bound(fn: Callable[..., Any], step: Step) -> Callable[[], Any]:
    args = step.function()[1]
    return lambda: fn(*args)


def stock_calls(case: Case, steps: Sequence[Step]) -> list[Callable[[], Any]] | None:
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

    def call(step: Step) -> Any:
        if case.name == "CFG + DDIM":
            guided = step.u + 7.5 * (step.c - step.u)
        else:
            guided = normalized_guidance(step.c, step.u, 7.5, buffer, 0.0, 15.0)
        return scheduler.step(guided, t, step.x, return_dict=False)[0]

    return [lambda step=step: call(step) for step in steps]
