"""Time of a run in the engine and in the stock pipeline: same sampler, guidance and seed.

    python -m scripts.bench.overhead [--quick] [--pairs 30] [--csv docs/figures/overhead.csv]

In CPU seconds of this process, which runs one thread: waiting for a busy machine is not in them.
Batch 1, DDIM with classifier-free guidance at scale 3. The two sides take turns in one process
(engine, stock, stock, engine, ...), so that what else the machine does to caches meets both. The
ratio is the median over pairs of neighbours, with a 95 % bootstrap interval. `network` is the real
one, or a stub that returns a constant: then what is left is the loop's own time. The time per step
comes from the difference of two run lengths, so that encoding the prompt is not in it.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

import sampler
from sampler.bundled import FOLDER

PROMPT = "a red apple on a blue background"
SCALE = 3.0
Run = Callable[[int], Any]


@dataclass(frozen=True)
class Setting:
    """pairs: how often each side runs; steps: the run lengths whose ratio is reported; short,
    long: the run lengths whose difference gives the time per step of the stub."""

    pairs: int = 30
    steps: tuple[int, ...] = (20, 50)
    short: int = 20
    long: int = 420


QUICK = Setting(pairs=2, steps=(2,), short=1, long=3)


class Stub(torch.nn.Module):
    """Answers with the same tensor at once; the rest of the network's face is kept."""

    def __init__(self, network: Any, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.config, self.dtype, self.device = network.config, network.dtype, network.device
        noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        self.answers = {rows: noise[:rows].clone() for rows in (1, 2)}

    def forward(self, x: torch.Tensor, timestep: Any, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        return (self.answers[x.shape[0]],)


def tiny_pipeline() -> Any:
    """A Stable Diffusion of the bundled architecture's kind with a small random network."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    pipe = bundled_pipeline()
    config = {**pipe.unet.config, "block_out_channels": (32, 64), "norm_num_groups": 8}
    torch.manual_seed(0)
    network = UNet2DConditionModel.from_config(config)
    return type(pipe)(**{**pipe.components, "unet": network}, requires_safety_checker=False)


def bundled_pipeline() -> Any:
    return sampler.load(FOLDER / "pipeline", device="cpu").pipeline.pipe


@contextmanager
def stubbed(pipe: Any) -> Iterator[None]:
    """The pipeline with a stub for its network."""
    real, size = pipe.unet, pipe.unet.config.sample_size
    pipe.unet = Stub(real, (pipe.unet.config.in_channels, size, size))
    try:
        yield
    finally:
        pipe.unet = real


def sides(pipe: Any) -> tuple[Run, Run]:
    """The two sides: a number of steps to latents."""
    engine = sampler.load(pipe)
    pipe.set_progress_bar_config(disable=True)

    def ours(steps: int) -> Any:
        rule = {"name": "cfg", "scale": SCALE}
        return engine.generate(
            PROMPT, seeds=0, steps=steps, sampler="ddim", guidance=rule, output="latent"
        ).latents

    def stock(steps: int) -> Any:
        return pipe(
            [PROMPT],
            num_inference_steps=steps,
            guidance_scale=SCALE,
            generator=[torch.Generator().manual_seed(0)],
            output_type="latent",
        ).images

    return ours, stock


def pairs_of(ours: Callable[[], Any], stock: Callable[[], Any], count: int) -> np.ndarray:
    """CPU seconds [count, 2] of (ours, stock), measured in turns: ABBA."""
    measured = np.empty((count, 2))
    for i in range(count):
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            started = time.process_time()
            (ours, stock)[side]()
            measured[i, side] = time.process_time() - started
    return measured


def summary(seconds: np.ndarray, steps: int) -> dict[str, float]:
    """Milliseconds per step of both sides, and the median ratio of the pairs with its interval."""
    ratios = seconds[:, 0] / seconds[:, 1]
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    engine, stock = np.median(seconds, axis=0) / steps * 1000
    return {
        "engine_ms_per_step": round(float(engine), 4),
        "stock_ms_per_step": round(float(stock), 4),
        "ratio": round(float(np.median(ratios)), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
    }


def measure(name: str, pipe: Any, setting: Setting) -> Iterator[dict[str, Any]]:
    """The rows of one pipeline; raises where the two sides do not make the same latents."""
    ours, stock = sides(pipe)
    if not torch.equal(ours(2), stock(2)):
        raise SystemExit(f"{name}: the two sides differ, so their times cannot be compared.")
    for steps in setting.steps:

        def run(side: Run, steps: int = steps) -> Callable[[], Any]:
            return lambda: side(steps)

        seconds = pairs_of(run(ours), run(stock), setting.pairs)
        row = {"pipeline": name, "network": "real", "steps": steps}
        yield {**row, "pairs": setting.pairs, **summary(seconds, steps)}
    with stubbed(pipe):
        ours, stock = sides(pipe)
        extra = setting.long - setting.short
        ours(2)
        stock(2)
        long = pairs_of(lambda: ours(setting.long), lambda: stock(setting.long), setting.pairs)
        short = pairs_of(lambda: ours(setting.short), lambda: stock(setting.short), setting.pairs)
    row = {"pipeline": name, "network": "stub", "steps": extra}
    # Both terms are medians: a difference of single runs would be mostly noise.
    per_step = long - np.median(short, axis=0)
    yield {**row, "pairs": setting.pairs, **summary(per_step, extra)}


def machine() -> dict[str, Any]:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers")]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": f"{cpu_name()}, {torch.get_num_threads()} thread of {os.cpu_count()} cores",
        "load": round(os.getloadavg()[0], 1),  # how busy others kept it
        "versions": f"python {platform.python_version()}, {', '.join(versions)}",
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="tiny counts: does it run at all?")
    parser.add_argument("--pairs", type=int, help="how often each side runs (30)")
    parser.add_argument("--csv", type=Path, help="write the rows there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    setting = QUICK if options.quick else Setting()
    setting = replace(setting, pairs=options.pairs or setting.pairs)
    rows: list[dict[str, Any]] = []
    for name, build in (("bundled", bundled_pipeline), ("tiny SD", tiny_pipeline)):
        for row in measure(name, build(), setting):
            rows.append({**row, **machine()})
            print(
                f"{name:8} {row['network']:5} {row['steps']:4} steps  "
                f"engine {row['engine_ms_per_step']:8.3f} ms  stock {row['stock_ms_per_step']:8.3f}"
                f" ms a step  ratio {row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
                flush=True,
            )
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
