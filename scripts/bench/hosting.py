"""Cost of guiding and hosting stock pipelines: time in CPU seconds, and peak memory.

    python -m scripts.bench.hosting [--pairs 20] [--out docs/figures/hosting.csv] [--quick]

Each row compares two sides that take turns in one process of one thread (ours, theirs, theirs,
ours, ...); its value is the median over the pairs with a 95 % bootstrap interval.

- hook: a stock pipeline inside `sampler.guide` with CFG, against the same pipeline by itself; both
  make the same latents.
- hook step: time that the hook adds to a step, against that of a stock step.
- hosted: `generate` of a hosted engine with DDIM and CFG, against the pipeline's own call with its
  DDIM and as many images per call.
- adaptive: the hosted engine with the rule `adaptive` (hold), against the stock call with CFG:
  the share of evaluations and of time that is saved.
- memory: peak resident memory of a forked process that makes one call, ours against theirs, on a
  network that is large beside everything else; a copy of its weights would show.

The networks are random; ControlNet and inpainting belong to one of the size of the bundled model.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

import sampler
from scripts.bench.hosting_cases import PROMPTS, SCALE, Case, controlnet, inpainting, large, tiny
from scripts.bench.overhead import machine, pairs_of, stubbed
from scripts.bench.tables import Table, fill

ROOT = Path(__file__).resolve().parents[2]
CFG = {"name": "cfg", "scale": SCALE}
HOLD = {"name": "adaptive", "rule": CFG, "after": "hold", "threshold": -1.0}
FIELDS = ("measure", "pipeline", "images", "steps", "pairs")
EXTRA = ("evaluations", "networks", "peak_mib", "weights_mib")  # of some measures


def hosted(case: Case, images: int, steps: int, rule: Any = CFG) -> Any:
    """The result of a hosted engine's call."""
    inputs = {k: v for k, v in case.inputs.items() if k not in ("height", "width")}
    size = {k: v for k, v in case.inputs.items() if k in ("height", "width")}
    return case.engine.generate(
        PROMPTS[:images], seeds=list(range(images)), steps=steps, sampler="ddim", guidance=rule,
        output="latent", batch_size=images, inputs=inputs, **size,
    )  # fmt: skip


def interval(values: np.ndarray) -> dict[str, float]:
    """Median of some values, and its 95 % bootstrap interval."""
    draws = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    found = {"value": np.median(values), "low": low, "high": high}
    return {name: round(float(value), 4) for name, value in found.items()}


def hook(case: Case, images: int, steps: int, pairs: int) -> dict[str, Any]:
    """Time inside `sampler.guide` / by itself."""

    def ours() -> Any:
        with sampler.guide(case.pipe, CFG):
            return case.stock(images, steps)

    def theirs() -> Any:
        return case.stock(images, steps)

    same(ours(), theirs())
    taken = pairs_of(ours, theirs, pairs)
    return interval(taken[:, 0] / taken[:, 1])


def hook_step(case: Case, images: int, steps: int, pairs: int) -> dict[str, Any]:
    """Time that the hook adds to a step / that of a step of the stock pipeline.

    The added time is measured beside a network that answers at once, from two run lengths, so that
    neither the network's noise nor what a call costs once is in it.
    """

    def guided(count: int) -> Any:
        with sampler.guide(case.pipe, CFG):
            return case.stock(images, count)

    def plain(count: int) -> Any:
        return case.stock(images, count)

    plain(1)
    whole = pairs_of(lambda: plain(2 * steps), lambda: plain(steps), pairs)
    step = np.median(whole[:, 0] - whole[:, 1]) / steps
    with stubbed(case.pipe):
        guided(1)
        long, short = (
            pairs_of(lambda n=n: guided(n), lambda n=n: plain(n), pairs)
            for n in (11 * steps, steps)
        )
    added = (long - np.median(short, axis=0)) @ (1, -1) / (10 * steps)
    return interval(added / step)


def same_work(case: Case, images: int, steps: int, pairs: int) -> dict[str, Any]:
    """Time of a hosted call / of the stock call."""

    def ours() -> Any:
        return hosted(case, images, steps).latents

    def theirs() -> Any:
        return case.stock(images, steps)

    same(ours(), theirs())
    taken = pairs_of(ours, theirs, pairs)
    return interval(taken[:, 0] / taken[:, 1])


def adaptive(case: Case, images: int, steps: int, pairs: int) -> dict[str, Any]:
    """Share of the time of the stock call that the rule saves; of its evaluations, and of that time
    in the networks alone, which cost less per row in a larger batch.
    """
    own = case.pipe.scheduler.config
    config = {**own, "prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    case.pipe.scheduler = type(case.pipe.scheduler).from_config(config)  # rows latch at once
    full = hosted(case, images, steps).nfe
    kept = hosted(case, images, steps, HOLD).nfe
    case.stock(images, 1)
    inside = Inside(case.pipe)
    taken = pairs_of(
        inside.of(lambda: hosted(case, images, steps, HOLD)),
        inside.of(lambda: case.stock(images, steps)),
        pairs,
    )
    networks = np.array(inside.taken).reshape(pairs, 2)
    networks[1::2] = networks[1::2, ::-1]  # every second pair began with the stock call
    found = interval(1 - taken[:, 0] / taken[:, 1])
    spared = np.median((networks[:, 1] - networks[:, 0]) / taken[:, 1])
    return {
        **found,
        "evaluations": round(1 - sum(kept) / sum(full), 4),
        "networks": round(float(spared), 4),
    }


class Inside:
    """CPU seconds in the network and the ControlNet of a pipeline; taken: of every call in turn."""

    def __init__(self, pipe: Any) -> None:
        self.taken: list[float] = []
        self._sum = self._started = 0.0
        for network in (pipe.unet, getattr(pipe, "controlnet", None)):
            if network is not None:
                network.register_forward_pre_hook(self._begin)
                network.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self._started = time.process_time()

    def _end(self, *_: Any) -> None:
        self._sum += time.process_time() - self._started

    def of(self, action: Callable[[], Any]) -> Callable[[], Any]:
        """The action, whose time inside is kept."""

        def timed() -> Any:
            self._sum = 0.0
            made = action()
            self.taken.append(self._sum)
            return made

        return timed


def memory(case: Case, images: int, steps: int, pairs: int) -> dict[str, Any]:
    """Peak memory of a process that makes a hosted call / the stock call."""
    sides = (lambda: hosted(case, images, steps), lambda: case.stock(images, steps))
    sides[0]()
    sides[1]()
    peaks = np.array([[peak(side) for side in sides] for _ in range(pairs)])
    weights = sum(p.numel() * p.element_size() for p in case.pipe.unet.parameters()) / 2**20
    found = interval(peaks[:, 0] / peaks[:, 1])
    return {**found, "peak_mib": round(float(np.median(peaks))), "weights_mib": round(weights)}


def peak(action: Callable[[], Any]) -> float:
    """Peak resident memory of a fork that does something, in MiB."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        action()
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        os.write(write, repr(used).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        return float(file.read())


def same(ours: Any, theirs: Any) -> None:
    """Raise SystemExit where the two sides make other latents: then times say nothing."""
    if float((ours - theirs).abs().max()) > 1e-5 * float(theirs.abs().max()):
        raise SystemExit("The two sides differ, so their times cannot be compared.")


ROWS: dict[tuple[str, str], tuple[Callable[[], Case], Callable[..., dict[str, Any]], int, int]] = {
    ("hook", "tiny SD"): (tiny, hook, 1, 20),
    ("hook step", "tiny SD"): (tiny, hook_step, 1, 20),
    ("hosted", "tiny SD"): (tiny, same_work, 1, 20),
    ("hosted", "inpainting"): (inpainting, same_work, 1, 10),
    ("hosted", "ControlNet"): (controlnet, same_work, 1, 10),
    ("adaptive", "inpainting"): (inpainting, adaptive, 1, 20),
    ("adaptive", "ControlNet"): (controlnet, adaptive, 2, 20),
    ("memory", "large SD"): (large, memory, 1, 1),
}


def tasks(pairs: int, quick: bool) -> Iterator[tuple[tuple[str, ...], Callable[[], Any]]]:
    """The rows of the table, by measure and pipeline."""
    for (measure, pipeline), (build, run, images, steps) in ROWS.items():

        def row(
            measure: str = measure, build: Any = build, run: Any = run, n: int = images,
            steps: int = 2 if quick else steps,
        ) -> dict[str, Any]:  # fmt: skip
            case = build()
            case.pipe.set_progress_bar_config(disable=True)
            count = min(pairs, 5) if measure == "memory" else pairs
            named = (measure, case.name, n, steps, count)
            found = dict.fromkeys(("value", "low", "high", *EXTRA), "")
            found |= run(case, n, steps, count)
            return {**dict(zip(FIELDS, named, strict=True)), **found, **machine()}

        yield (measure, pipeline), row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20, help="how often each side runs (20)")
    parser.add_argument("--quick", action="store_true", help="two steps: does it run at all?")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures" / "hosting.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    note = f"python -m scripts.bench.hosting --pairs {options.pairs}"
    table = Table(options.out, note, ("measure", "pipeline"))
    for row in fill(table, tasks(options.pairs, options.quick), 1e9):
        print(*list(row.values())[:12], flush=True)


if __name__ == "__main__":
    main()
