"""From prompts to images: encoding, seeds, micro-batches, the loop, decoding."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sampler import registry
from sampler.binding import Request, Setting, bound, bound_sampler
from sampler.engine import Engine, Result
from sampler.graphs import GraphedRuns, graphed
from sampler.images import as_images, encode, start_from
from sampler.noise import MAX_SEED, initial
from sampler.types import Cond, Guidance, Sampler, Snapshot

Output = Literal["pil", "tensor", "latent"]
DEFAULT_BATCH = 8


@dataclass(frozen=True)
class Job:
    """One image to be made."""

    prompt: str
    negative: str
    seed: int


def generate(
    engine: Engine,
    prompts: str | Sequence[str],
    *,
    negative: str | Sequence[str] | None = None,
    seeds: int | Sequence[int] | None = None,
    n: int = 1,
    steps: int = 20,
    height: int | None = None,
    width: int | None = None,
    sampler: Any = None,
    guidance: Any = None,
    batch_size: int | None = None,
    output: Output = "pil",
    progress: Callable[[int, int], None] | None = None,
    image: Any = None,
    strength: float = 0.6,
    out: Any = None,
    graph: bool | Literal["auto"] = False,
) -> Result:
    """Images from prompts, n for each, in the order of the prompts.

    prompts: text or texts; negative: one for all, or one per prompt. seeds: one int (image i of
    the run has seed + i), or one per image; without, a seed is derived from the prompt and the
    number of the image, and recorded. steps: network evaluations, 1 to 1000. height, width: pixels,
    the model's own by default. sampler, guidance: a name, a mapping or an instance; by default the
    engine's. batch_size: rows per evaluation (8); it is part of what makes images bit-equal, since
    networks round differently with other batch sizes. output: "pil", "tensor" ([B, 3, H, W] in
    [0, 1]) or "latent" (images is None). progress(images done, images in all) after every batch.
    image: a file, a PIL image or a tensor [B or 1, 3, H, W] in [0, 1] to start from, noised to the
    last floor(strength·steps) of the steps (image to image); strength 0 gives it back. out: a run
    folder, which is written and, where it exists, gone on with; images are then read from it
    lazily, and latents is None. graph: whether batches after the first replay a CUDA graph of it;
    "auto" where that is possible and worth it. The images are the same.

    Raises ValueError, before any network call, for an empty prompt list, counts that do not fit,
    and what the strategies and the schedule refuse.
    """
    started = time.perf_counter()
    method, rule = engine._method(sampler), engine._rule(guidance)
    jobs = expand(prompts, negative, seeds, n)
    if output not in ("pil", "tensor", "latent"):
        raise ValueError(f"output = {output!r} must be 'pil', 'tensor' or 'latent'.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size = {batch_size} must be at least 1.")
    if "uncond" not in rule.needs and any(job.negative for job in jobs):
        warnings.warn(
            f"Guidance {rule.name!r} with these settings evaluates no unconditional branch: the "
            "negative prompt has no effect.",
            stacklevel=3,
        )
    adapter = engine.pipeline
    size = adapter.size(height, width)
    # what does not fit is refused before anything is spent
    rule_spec, grid = registry.spec_of(rule), adapter.grid(steps, size)
    method = bound_sampler(method, Setting(adapter, grid, rule_spec, size))
    cut = batch_size or DEFAULT_BATCH
    if out is not None:
        from sampler.workers.python import Asked, generate_into

        if image is not None or output != "pil":
            raise ValueError("out= keeps images of prompts: leave out image= and output=.")
        asked = Asked(jobs, size, steps, method, rule, cut)
        return generate_into(engine, str(out), asked, progress)
    latents, images, nfe = [], [], []
    runs = graphed(engine, graph, -(-len(jobs) // cut))
    with torch.no_grad():
        origin = None if image is None else _origin(adapter, image, strength, size, len(jobs))
        for first in range(0, len(jobs), cut):
            start = None if origin is None else (origin[first : first + cut], strength)
            x, counted = sample_batch(
                engine, jobs[first : first + cut], size, steps, method, rule, start=start, runs=runs
            )
            latents.append(x)
            nfe.extend(counted)
            if output != "latent":
                images.append(adapter.decode(x).cpu())
            if progress is not None:
                progress(len(nfe), len(jobs))
    config = {
        "prompts": [job.prompt for job in jobs],
        "negative": [job.negative for job in jobs] if any(j.negative for j in jobs) else None,
        "seeds": [job.seed for job in jobs],
        "n": 1,
        "steps": steps,
        "height": size[0],
        "width": size[1],
        "sampler": registry.spec_of(method),
        "guidance": rule_spec,
        "batch_size": cut,
        "output": output,
        **({} if image is None else {"image": image, "strength": strength}),
    }
    return Result(
        images=None if output == "latent" else to_output(torch.cat(images), output),
        latents=torch.cat(latents),
        seeds=config["seeds"],
        nfe=nfe,
        config=config,
        seconds=time.perf_counter() - started,
    )


def sample_batch(
    engine: Engine,
    jobs: Sequence[Job],
    size: tuple[int, int],
    steps: int,
    method: Sampler,
    rule: Guidance,
    cond: Cond | None = None,
    on_step: Callable[[Snapshot], None] | None = None,
    start: tuple[Tensor, float] | None = None,
    runs: GraphedRuns | None = None,
) -> tuple[Tensor, tuple[int, ...]]:
    """The latents [B, ...] of some jobs, and the rows evaluated for each.

    cond: their conditions, where they are encoded already. on_step sees every snapshot. start:
    clean latents [B, ...] and the strength of the noise to start from, instead of noise alone.
    runs: what replays a graph, instead of the engine's own loop (on_step is not called then).
    """
    adapter = engine.pipeline
    if cond is None:
        encoded: Cond = adapter.encode(
            [job.prompt for job in jobs],
            [job.negative for job in jobs],
            "uncond" in rule.needs,
            size,
        )
    else:
        encoded = cond
    grid, seeds = adapter.grid(steps, size), [job.seed for job in jobs]
    x = initial(seeds, adapter.latent_shape(*size)).to(adapter.device)
    x = x * adapter.schedule.initial_scale(grid)
    if start is not None:
        x, grid = start_from(start[0], grid, start[1], seeds)
        if len(grid) == 1:
            return x, (0,) * len(jobs)
    request = Request(
        adapter,
        [job.prompt for job in jobs],
        [job.negative for job in jobs],
        registry.spec_of(method),
        method.levels(grid)[:-1],
        size,
    )
    rule, encoded = bound(rule, request, encoded)
    if runs is not None:
        x, snap = runs(x, grid, encoded, method, rule, seeds)
    else:
        x, snap = engine._finished(x, grid, encoded, method, rule, seeds, on_step=on_step)
    return x, snap.nfe


def _origin(adapter: Any, image: Any, strength: float, size: tuple[int, int], rows: int) -> Tensor:
    """The image to start from as latents, one row per job [rows, ...]."""
    if not 0 <= strength <= 1:
        raise ValueError(f"strength = {strength} must lie in 0..1; 0 returns the image.")
    images = as_images(image)
    if tuple(images.shape[-2:]) != size or len(images) not in (1, rows):
        raise ValueError(
            f"image: {len(images)} of {images.shape[-1]} x {images.shape[-2]} pixels for {rows} "
            f"images of {size[1]} x {size[0]}; give one, or one each, of that size."
        )
    latents = encode(adapter, images)
    return latents.expand(rows, *latents.shape[1:])


def expand(
    prompts: str | Sequence[str],
    negative: str | Sequence[str] | None,
    seeds: int | Sequence[int] | None,
    n: int,
) -> list[Job]:
    """The images that `generate` makes of these arguments, in order; ValueError as there."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise ValueError("No prompts: give a text or a list of at least one.")
    if bad := [t for t in texts if not isinstance(t, str)]:
        raise ValueError(f"A prompt is a text, not {bad[0]!r:.60}.")
    if n < 1:
        raise ValueError(f"n = {n} must be at least 1 image per prompt.")
    against = (
        [negative or ""] * len(texts)
        if negative is None or isinstance(negative, str)
        else [*negative]
    )
    if len(against) != len(texts):
        raise ValueError(f"{len(against)} negative prompts for {len(texts)} prompts.")
    rows = [(t, a, i) for t, a in zip(texts, against, strict=True) for i in range(n)]
    if seeds is None:
        chosen = [_derived_seed(text, i) for text, _, i in rows]
    elif isinstance(seeds, int):
        chosen = [seeds + k for k in range(len(rows))]
    else:
        chosen = [int(s) for s in seeds]
    if len(chosen) != len(rows):
        raise ValueError(f"{len(chosen)} seeds for {len(rows)} images; give one int or one each.")
    if bad := [s for s in chosen if not 0 <= s <= MAX_SEED]:
        raise ValueError(f"seed = {bad[0]} must lie in 0..2^63 − 1.")
    return [Job(t, a, s) for (t, a, _), s in zip(rows, chosen, strict=True)]


def _derived_seed(prompt: str, index: int) -> int:
    """A seed for image `index` of a prompt when none is given: the same ones at every call."""
    digest = hashlib.sha256(f"{index}:{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") & MAX_SEED


def to_output(images: Tensor, output: Output) -> Any:
    """Images [B, 3, H, W] in [0, 1] as asked for; PIL rounds to uint8 as diffusers does."""
    if output == "tensor":
        return images
    from PIL import Image

    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(row) for row in pixels]
