"""Images per second of `sampler generate`'s path and of a plain loop over a stock pipeline."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import sampler
from sampler import bundled
from sampler.bundled import FOLDER

Row = tuple[str, Any, str]
PROMPTS, STEPS, SCALE = 256, 20, 3.0


def compare(folder: Path) -> Iterator[Row]:
    """A B B A for plain CFG and for adaptive guidance; the stock loop is the same one."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    torch.set_num_threads(1)
    pipe = StableDiffusionPipeline.from_pretrained(
        FOLDER / "pipeline", dtype=torch.float32, safety_checker=None
    )
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    engine = sampler.load()
    half = [prompt.text for prompt in bundled.prompts(PROMPTS // 2)]
    plain = {"name": "cfg", "scale": SCALE}
    adaptive = {"name": "adaptive", "rule": plain}
    _ours(engine, folder / "warm", half[:8], plain)
    _stock(pipe, folder / "warm-stock", half[:2])
    stock = _stock(pipe, folder / "s1", half)
    ours, rows = _ours(engine, folder / "a1", half, plain)
    fewer, fewer_rows = _ours(engine, folder / "b1", half, adaptive)
    fewer_again, _ = _ours(engine, folder / "b2", half, adaptive)
    again, _ = _ours(engine, folder / "a2", half, plain)
    stock_again = _stock(pipe, folder / "s2", half)
    stock += stock_again
    yield "prompts", PROMPTS, "256"
    yield "stock loop, images/s", f"{PROMPTS / stock:.3f}", ""
    yield "run folder with CFG, images/s", f"{PROMPTS / (ours + again):.3f}", ""
    yield "ratio with CFG", f"{stock / (ours + again):.2f}", ">= 1.3"
    yield (
        "run folder with adaptive guidance, images/s",
        f"{PROMPTS / (fewer + fewer_again):.3f}",
        "",
    )
    yield "ratio with adaptive guidance", f"{stock / (fewer + fewer_again):.2f}", ">= 1.8"
    yield "denoiser rows per image: CFG, adaptive", f"{rows:.1f}, {fewer_rows:.1f}", ""
    yield from _accuracy(engine, folder)


def _stock(pipe: Any, folder: Path, prompts: list[str]) -> float:
    folder.mkdir()
    began = time.perf_counter()
    for k, prompt in enumerate(prompts):
        generator = torch.Generator("cpu").manual_seed(k)
        image = pipe(prompt, num_inference_steps=STEPS, guidance_scale=SCALE, generator=generator)
        image.images[0].save(folder / f"{k:04d}.png")
    return time.perf_counter() - began


def _ours(engine: Any, folder: Path, prompts: list[str], guidance: Any) -> tuple[float, float]:
    began = time.perf_counter()
    seeds = list(range(len(prompts)))
    result = engine.generate(prompts, seeds=seeds, steps=STEPS, guidance=guidance, batch_size=16,
                             out=folder)  # fmt: skip
    return time.perf_counter() - began, sum(result.nfe) / len(prompts)


def _accuracy(engine: Any, folder: Path) -> Iterator[Row]:
    """How often the bundled classifier sees the concept of the prompt, of the images just made."""
    from sampler.bundled import classifier

    network = classifier.load()
    prompts = bundled.prompts(PROMPTS // 2)
    texts = [prompt.text for prompt in prompts]
    plain: Any = {"name": "cfg", "scale": SCALE}
    rules = {"CFG": ("a1", plain), "adaptive": ("b1", {"name": "adaptive", "rule": plain})}
    for label, (name, rule) in rules.items():
        found = engine.generate(texts, seeds=list(range(len(texts))), steps=STEPS, guidance=rule,
                                batch_size=16, out=folder / name)  # fmt: skip
        right = 0
        for prompt, image in zip(prompts, found.images, strict=True):
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            batch = pixels.view(1, image.height, image.width, 3).permute(0, 3, 1, 2) / 255
            with torch.no_grad():
                right += int(network(batch).concept.argmax()) == prompt.concept
        yield f"concept recognised, {label}", f"{right / len(texts):.3f}", ""
