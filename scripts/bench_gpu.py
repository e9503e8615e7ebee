"""The part of bench_kernels.py that needs a GPU: CUDA event times, one row per case and size."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from sampler_kernels import use_backend

from sampler.benchmark import CASES, SIZES, Case, Step, count

RUNS, INNER = 50, 20
BIG = (256, 1024, 1024)  # 256 Mi elements: bandwidth and nothing else
ROTATED = 3 * 60 * 2**20  # bytes of inputs to cycle through: three times an H200's L2 cache


def gpu_rows() -> Iterator[dict[str, Any]]:
    """Microseconds per step; GB/s of the bytes that our launches count."""
    for name, shape in {**SIZES, "256 Mi elements": BIG}.items():
        for case in CASES:
            if name.startswith("256") and case.name not in ("CFG + DDIM", "APG + DDIM"):
                continue
            yield _row(case, name, (1, *shape))
            torch.cuda.empty_cache()


def _row(case: Case, name: str, shape: Sequence[int]) -> dict[str, Any]:
    torch.manual_seed(0)
    steps = _rotation(case, shape)
    mine = count(case, "triton")
    moved = mine.bytes * steps[0].x.numel()
    with torch.no_grad(), use_backend("triton"):
        called, again = _called(steps), _called(steps)
        replayed = None if case.on_host else _replayed(steps)
    with torch.no_grad(), use_backend("reference"):
        eager = _called(steps)
        fn, _ = steps[0].function()
        torch.compiler.reset()
        compiled = torch.compile(fn, fullgraph=True)
        compiled_us = _called([_bound(compiled, step) for step in steps])
    stock = _stock(case, steps)
    with torch.no_grad():
        stock_us = _called(stock) if stock else None
    copied = _copy(moved)
    figures = {
        "ours": called,
        "ours again": again,
        "ours in a graph": replayed,
        "reference": eager,
        "compiled reference": compiled_us,
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
        "GB/s": round(moved / (replayed or called) / 1e3, 1),
        "of copy": round(copied / (replayed or called), 3),
    }


def _bound(fn: Callable[..., Any], step: Step) -> Callable[[], Any]:
    args = step.function()[1]
    return lambda: fn(*args)


def _rotation(case: Case, shape: Sequence[int]) -> list[Step]:
    """Enough copies of a step that its inputs do not come from the L2 cache; at least three."""
    first = Step(case, shape, "cuda")
    size = first.x.numel() * 8
    copies = min(max(3, -(-ROTATED // size)), 64)
    return [first, *(Step(case, shape, "cuda") for _ in range(copies - 1))]


def _called(fns: Sequence[Callable[[], Any]]) -> float:
    """Median microseconds of a call, launches and Python included."""
    for fn in fns[:3]:
        fn()
    return _median(lambda k: fns[k % len(fns)]())


def _replayed(fns: Sequence[Callable[[], Any]]) -> float:
    """Median microseconds of a call as one of INNER nodes in a replayed CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for fn in fns[:3]:
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for k in range(INNER):
            fns[k % len(fns)]()
    times = [_events(graph.replay) / INNER for _ in range(RUNS)]
    return statistics.median(times)


def _median(call: Callable[[int], Any]) -> float:
    def many() -> None:
        for k in range(INNER):
            call(k)

    many()
    return statistics.median(_events(many) / INNER for _ in range(RUNS))


def _events(fn: Callable[[], Any]) -> float:
    """Microseconds between two events around a call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    fn()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def _copy(moved: float) -> float:
    """Microseconds of a device copy that reads and writes `moved` bytes together, in a graph."""
    pairs = [torch.empty(2, max(int(moved) // 2, 16), dtype=torch.uint8, device="cuda")
             for _ in range(min(max(2, int(ROTATED // max(moved, 1))), 64))]  # fmt: skip
    return _replayed([lambda pair=pair: pair[1].copy_(pair[0]) for pair in pairs])


def _stock(case: Case, steps: Sequence[Step]) -> list[Callable[[], Any]] | None:
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
