"""Host time of the arithmetic of a step on the Triton backend: planning and launching, no GPU.

    python -m scripts.bench.host [--rounds 300] [--csv docs/figures/host_time.csv]
    python -m scripts.bench.host --wait
    python -m scripts.bench.host --parts

The kernels are replaced by stubs that return at once; all else is what runs before a launch on a
GPU. Compared with diffusers' own functions and with the reference backend, both operation by
operation in torch, on tensors so small that only the dispatch counts. The sides take turns; a
figure is the fastest round in microseconds of thread CPU time, since other programs only add time.
"walked" is ours before a step's launches are replayed (`sampler_kernels.replay`).
A launch through Triton's own `run` (about 14 µs) and, for the operations of torch, the driver's
launch (about 2.5 µs each) come on top.

--wait: what adaptive guidance with lag = 0 costs a GPU at every step, since it waits for the flags
of the last step: the host's time from there to the call of the network, in which a GPU is idle.

--parts: our microseconds per step up to the end of each of its parts.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sampler_kernels import replay, selection, triton_ops, use_backend

import sampler
from sampler.core.benchmark import CASES, BenchmarkStep
from sampler.guidance import adaptive
from sampler.types import Prediction
from scripts.bench.gpu import stock_calls
from scripts.bench.overhead import bundled_pipeline, machine
from scripts.bench.overhead import stubbed as stub_network

SHAPE = (1, 4, 8, 8)
CALLS = 10  # of a step in one round
NAMES = ("CFG + DDIM", "APG + DDIM", "APG + GHVB", "Adaptive CFG + DDIM")
# What a case is compared with, and the largest accepted ratio.
TARGETS = {
    "CFG + DDIM": ("diffusers", 0.8),
    "APG + DDIM": ("diffusers", 0.8),
    "APG + GHVB": ("reference", 0.5),
    "Adaptive CFG + DDIM": ("diffusers, CFG + DDIM", 1.2),
}


class Stub:
    """A kernel that does nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return _nothing


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


@contextmanager
def stubbed() -> Iterator[None]:
    """The Triton backend on any device, with kernels that do nothing."""
    names = ("_formula", "_gram", "_scalar")
    ops: Any = triton_ops
    real = [getattr(ops, name) for name in names]
    works = selection.works
    try:
        for name in names:
            setattr(ops, name, Stub())
        selection.works = lambda device: True  # pyright: ignore[reportAttributeAccessIssue]
        with use_backend("triton"):
            yield
    finally:
        selection.works = works
        for name, kernel in zip(names, real, strict=True):
            setattr(ops, name, kernel)


@contextmanager
def walked() -> Iterator[None]:
    """The same without replays of launches, as the first steps of a process are."""
    possible = replay.is_possible
    try:
        replay.is_possible = lambda: False  # pyright: ignore[reportAttributeAccessIssue]
        with stubbed():
            yield
    finally:
        replay.is_possible = possible


@contextmanager
def reference() -> Iterator[None]:
    """The reference backend, as the context of a side."""
    with use_backend("reference"):
        yield


class Side(NamedTuple):
    """A call to be timed, and the context that it runs in, which is entered outside the timing."""

    call: Callable[[], Any]
    context: Callable[[], AbstractContextManager[Any]]


def sides(name: str) -> dict[str, Side]:
    """The same step on each side."""
    case = next(case for case in CASES if case.name == name)
    step = BenchmarkStep(case, SHAPE)
    found = {
        "ours": Side(step, stubbed),
        "walked": Side(step, walked),
        "reference": Side(step, reference),
    }
    partner = next((c for c in CASES if c.name == name.replace("Adaptive ", "")), case)
    stock = stock_calls(partner, [BenchmarkStep(partner, SHAPE)])
    if stock:
        label = "diffusers" if partner is case else f"diffusers, {partner.name}"
        found[label] = Side(stock[0], reference)
    return found


def fastest(sides: Mapping[str, Side], rounds: int) -> dict[str, float]:
    """Microseconds per step of each side: the fastest of rounds in turn."""
    found = dict.fromkeys(sides, float("inf"))
    for _ in range(rounds):
        for name, (call, context) in sides.items():
            with context():
                started = time.thread_time()
                for _ in range(CALLS):
                    call()
                taken = time.thread_time() - started
            found[name] = min(found[name], taken / CALLS * 1e6)
    return found


@torch.no_grad()
def rows(rounds: int) -> Iterator[dict[str, Any]]:
    """One row per case, with the ratio to its target's side."""
    for name in NAMES:
        compared = sides(name)
        fastest(compared, 3)
        found = fastest(compared, rounds)
        side, most = TARGETS[name]
        ratio = found["ours"] / found[side]
        yield {
            "case": name,
            "ours µs": round(found["ours"], 1),
            "walked µs": round(found["walked"], 1),
            "reference µs": round(found["reference"], 1),
            "compared with": side,
            "its µs": round(found[side], 1),
            "ratio": round(ratio, 3),
            "at most": most,
            "reached": ratio <= most,
            **machine(),
        }


@torch.no_grad()
def parts(name: str, rounds: int) -> dict[str, float]:
    """Microseconds of a step of ours from its begin to the end of each part: fastest round."""
    step = BenchmarkStep(next(case for case in CASES if case.name == name), SHAPE)
    rule, method = step.rule, step.method

    def predicted() -> dict[str, Prediction]:
        pair = (("cond", step.c), ("uncond", step.u))
        return {k: Prediction.of(step.case.kind, step.x, v, step.span.now) for k, v in pair}

    def guided() -> tuple[Prediction, Any]:
        return rule.combine(step.x, predicted(), step.span, step.states[0])

    def moved() -> tuple[Any, Any]:
        pred, state = guided()
        return method.step(step.x, pred, step.span, step.states[1]), state

    calls = {"predictions": predicted, "rule": guided, "sampler": moved, "settle": step}
    return fastest({part: Side(call, stubbed) for part, call in calls.items()}, rounds)


def waiting(steps: int = 200) -> float:
    """Microseconds from the decision of adaptive guidance to the call of a stub network: median."""
    pipe = bundled_pipeline()
    with stub_network(pipe):
        decided: list[float] = []
        taken: list[float] = []
        engine = sampler.load(pipe)
        pipe.unet.register_forward_pre_hook(
            lambda *_: taken.append(time.thread_time() - decided[-1]) if decided else None
        )
        wait = adaptive.wait

        def decide(flags: Any) -> Any:
            live = wait(flags)
            decided.append(time.thread_time())
            return live

        setattr(adaptive, "wait", decide)  # noqa: B010 - a module has no such attribute to assign
        try:
            rule = {"name": "adaptive", "threshold": 1.0}  # always evaluates the pair
            engine.generate("a fox", seeds=0, steps=steps, sampler="ddim", guidance=rule)
        finally:
            setattr(adaptive, "wait", wait)  # noqa: B010
    return statistics.median(taken) * 1e6


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=300, help="rounds of every side")
    parser.add_argument("--csv", type=Path, help="write the rows there")
    parser.add_argument("--wait", action="store_true", help="the cost of lag = 0 instead")
    parser.add_argument("--parts", action="store_true", help="the parts of a step instead")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.parts:
        for name in NAMES:
            print(name, {k: round(v, 1) for k, v in parts(name, given.rounds).items()}, flush=True)
        return
    if given.wait:
        print(f"from the flags to the network: {waiting():.0f} µs a step")
        return
    found: list[dict[str, Any]] = []
    for row in rows(given.rounds):
        found.append(row)
        print({k: v for k, v in row.items() if k not in machine()}, flush=True)
    if given.csv:
        given.csv.parent.mkdir(parents=True, exist_ok=True)
        with given.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(found[0]))
            writer.writeheader()
            writer.writerows(found)


if __name__ == "__main__":
    main()
