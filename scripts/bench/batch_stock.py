"""Images per second of a run folder, against a typical stock diffusers script.

The script: a loop over the prompts, classifier-free guidance, `image.save`. Ours: the same prompts,
seeds, steps and noise levels as runs of their own, 16 prompts each, with all their files. The two
take turns (A B, B A, ...) over the same 256 prompts, one thread, after a warm-up.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import sampler
from sampler import bundled
from sampler.bundled import FOLDER
from sampler.runs.plan import AUTO_MAX

Row = tuple[str, Any, str]
PROMPTS, CHUNK, STEPS, SCALE = 256, 16, 20, 3.0
PLAIN: Any = {"name": "cfg", "scale": SCALE}
HOLD: Any = {"name": "adaptive", "rule": PLAIN, "threshold": 0.97, "after": "hold", "refresh": 3}


def plain(folder: Path) -> Iterator[Row]:
    """Against our plain classifier-free guidance: the same network evaluations."""
    yield from compare(folder, "CFG", PLAIN, ">= 1.3")


def adaptive(folder: Path) -> Iterator[Row]:
    """Against adaptive guidance with `after: hold`: equal accuracy, fewer evaluations."""
    yield from compare(folder, "adaptive guidance", HOLD, ">= 1.8")


def compare(folder: Path, label: str, guidance: Any, wanted: str) -> Iterator[Row]:
    """Return times of both sides, network times, and the accuracy of the images."""
    torch.set_num_threads(1)
    pipe, engine = _stock_pipe(), sampler.load()
    asked = bundled.prompts(PROMPTS)
    texts = [prompt.text for prompt in asked]
    networks = [_Clock(pipe.unet), _Clock(engine.pipeline.network)]
    _stock(pipe, folder / "warm-stock", texts[:2], 0)
    _ours(engine, folder / "warm", texts[:AUTO_MAX], 0, guidance)
    for clock in networks:
        clock.seconds = 0.0
    stock, ours, rows = [], [], 0
    for first in range(0, PROMPTS, CHUNK):
        part, name = texts[first : first + CHUNK], f"{first:03d}"
        order = ["stock", "ours"] if (first // CHUNK) % 2 == 0 else ["ours", "stock"]
        for turn in order:
            if turn == "stock":
                stock.append(_stock(pipe, folder / "stock", part, first))
            else:
                seconds, evaluated = _ours(engine, folder / name, part, first, guidance)
                ours.append(seconds)
                rows += evaluated
    ratios = sorted(a / b for a, b in zip(stock, ours, strict=True))
    yield "prompts", PROMPTS, "256"
    yield "stock loop, images/s", f"{PROMPTS / sum(stock):.3f}", ""
    yield f"run folder with {label}, images/s", f"{PROMPTS / sum(ours):.3f}", ""
    yield f"ratio with {label}", f"{sum(stock) / sum(ours):.2f}", wanted
    turns = f"{statistics.median(ratios):.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f}"
    yield f"ratio of {len(ratios)} single turns: median, range", turns, ""
    alone = [clock.seconds / PROMPTS * 1000 for clock in networks]
    yield "the network alone, ms per image: stock, ours", f"{alone[0]:.0f}, {alone[1]:.0f}", ""
    rest = [(sum(s) / PROMPTS) * 1000 - a for s, a in zip((stock, ours), alone, strict=True)]
    yield "everything else, ms per image: stock, ours", f"{rest[0]:.0f}, {rest[1]:.0f}", ""
    yield "NFE per image: stock, ours", f"{2 * STEPS}, {rows / PROMPTS:.1f}", ""
    made = [sorted((folder / "stock").glob("*.png")), sorted(folder.glob("*/images/*.png"))]
    made[1] = [path for path in made[1] if "warm" not in path.parts[-3]]
    right = [_recognised(paths, asked) for paths in made]
    yield "concept recognised: stock, ours", f"{right[0]:.3f}, {right[1]:.3f}", "within 0.01"


def network(folder: Path) -> Iterator[Row]:
    """Milliseconds per sample of the bundled network alone, by batch size."""
    torch.set_num_threads(1)
    adapter = sampler.load().pipeline
    states = adapter.encode(["a fox"], [""], False, (64, 64)).cond["encoder_hidden_states"]
    best: dict[int, float] = {}
    with torch.no_grad():
        for _ in range(4):
            for rows in (1, 2, 4, 8, 16, 32, 48, 64):
                x = torch.randn(rows, *adapter.latent_shape(64, 64))
                text = states.expand(rows, -1, -1).contiguous()
                for _ in range(max(1, 32 // rows)):
                    began = time.perf_counter()
                    adapter.network(x, torch.tensor(500), encoder_hidden_states=text)
                    taken = (time.perf_counter() - began) / rows * 1000
                    best[rows] = min(taken, best.get(rows, taken))
    for rows, taken in best.items():
        yield f"network alone, batch of {rows}, ms per sample, best", f"{taken:.2f}", ""


class _Clock:
    """Seconds inside a module's forward."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.seconds = 0.0
        module.register_forward_pre_hook(lambda *_: self._add(-1))
        module.register_forward_hook(lambda *_: self._add(1))

    def _add(self, sign: int) -> None:
        self.seconds += sign * time.perf_counter()


def _stock_pipe() -> Any:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    pipe = StableDiffusionPipeline.from_pretrained(
        FOLDER / "pipeline", dtype=torch.float32, safety_checker=None
    )
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _stock(pipe: Any, folder: Path, prompts: list[str], first: int) -> float:
    folder.mkdir(exist_ok=True)
    began = time.perf_counter()
    for k, prompt in enumerate(prompts, first):
        generator = torch.Generator("cpu").manual_seed(k)
        image = pipe(prompt, num_inference_steps=STEPS, guidance_scale=SCALE, generator=generator)
        image.images[0].save(folder / f"{k:04d}.png")
    return time.perf_counter() - began


def _ours(
    engine: Any, folder: Path, prompts: list[str], first: int, guidance: Any
) -> tuple[float, int]:
    began = time.perf_counter()
    seeds = list(range(first, first + len(prompts)))
    result = engine.generate(prompts, seeds=seeds, steps=STEPS, guidance=guidance,
                             batch_size=AUTO_MAX, out=folder)  # fmt: skip
    return time.perf_counter() - began, sum(result.nfe)


def _recognised(paths: list[Path], asked: Any) -> float:
    """The share of images in which the bundled classifier sees the concept of their prompt."""
    from sampler.bundled import classifier

    network, right = classifier.load(), 0
    for path, prompt in zip(paths, asked, strict=True):
        with Image.open(path) as image:
            pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
            batch = pixels.view(1, image.height, image.width, 3).permute(0, 3, 1, 2) / 255
        with torch.no_grad():
            right += int(network(batch).concept.argmax()) == prompt.concept
    return right / len(paths)
