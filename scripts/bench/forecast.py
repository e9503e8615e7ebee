"""Time of `forecast` inside stock pipelines, against the same pipelines with their own CFG.

    python -m scripts.bench.forecast [--pairs 5]       writes docs/figures/forecast_time.csv

20 DDIM steps, batches of 1 and 8: the bundled model with the default tolerance, and Stable
Diffusion XL with random weights, whose predictions no error criterion could judge, so it evaluates
a fixed policy of as many steps. The sides take turns; CPU seconds of one thread for a whole call of
the pipeline, text encoders and decoder included, and the median of the ratios within the pairs.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

import sampler
from scripts.bench.overhead import bundled_pipeline, machine
from scripts.study.forecast import CFG, POLICY
from tests import tiny

FIGURE = Path(__file__).resolve().parents[2] / "docs" / "figures" / "forecast_time.csv"
STEPS = len(POLICY)
WIDTH = 96  # of the first block: enough that the network takes most of the time
# Evaluates 11 of 20 steps, the NFE that the default tolerance has on the bundled model.
FIXED = (*POLICY[:-2], 1, 1)


def wide_sdxl() -> Any:
    """Stable Diffusion XL's classes with random weights, 32 x 32 latents."""
    pipe = tiny.sdxl()
    config = {**tiny.unet_config(64), **tiny.TEXT_TIME}
    config.update(block_out_channels=(WIDTH, 2 * WIDTH), sample_size=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.unet = UNet2DConditionModel(**config).eval().requires_grad_(False)
    return pipe


def models() -> Iterator[tuple[str, Any, dict[str, Any], list[str]]]:
    """Name, pipeline, rule and prompts of each model."""
    bundled = bundled_pipeline()
    bundled.scheduler = DDIMScheduler.from_config(bundled.scheduler.config)
    forecast = {"name": "forecast", "rule": CFG}
    texts = [f"a {thing} on a green background" for thing in ("fox", "dog", "cat", "panda")]
    yield "bundled, tolerance 0.016", bundled, forecast, texts
    yield "SDXL, random weights, 11 of 20 steps", wide_sdxl(), {**forecast, "policy": FIXED}, ["a"]


def seconds(
    pipe: Any, prompts: list[str], around: Callable[[], AbstractContextManager[Any]]
) -> tuple[float, list[int]]:
    """CPU seconds of one call, and the evaluations of each image where a rule counts them."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    started = time.thread_time()
    with around() as calls:
        pipe(prompts, num_inference_steps=STEPS, guidance_scale=CFG["scale"], generator=generators)
    taken = time.thread_time() - started
    return taken, [2 * STEPS] * len(prompts) if calls is None else list(calls.nfe)


def rows(pairs: int) -> Iterator[dict[str, Any]]:
    """A row per model and batch."""
    for name, pipe, rule, texts in models():
        pipe.set_progress_bar_config(disable=True)

        def guided(pipe: Any = pipe, rule: Any = rule) -> AbstractContextManager[Any]:
            return sampler.guide(pipe, rule)

        for batch in (1, 8):
            prompts = (texts * 8)[:batch]
            found = [
                (seconds(pipe, prompts, nullcontext), seconds(pipe, prompts, guided))
                for _ in range(pairs + 1)
            ][1:]
            nfe = found[0][1][1]
            yield {
                "model": name,
                "batch": batch,
                "stock_s": round(median(a for (a, _), _ in found), 3),
                "forecast_s": round(median(b for _, (b, _) in found), 3),
                "ratio": round(median(a / b for (a, _), (b, _) in found), 3),
                "stock_nfe": 2 * STEPS,
                "nfe": round(sum(nfe) / len(nfe), 2),
                "pairs": pairs,
                **machine(),
            }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    torch.set_num_threads(1)
    found = []
    for row in rows(parser.parse_args().pairs):
        found.append(row)
        print(list(row.values())[:8], flush=True)
    with FIGURE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main()
