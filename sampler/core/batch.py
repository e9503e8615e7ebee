"""Jobs of `generate` and their sampling, one batch at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sampler.core.adapter import PipelineAdapter
from sampler.core.graphs import GraphedRuns
from sampler.core.images import as_images, check_strength, steps_left, to_pixels
from sampler.core.loop import Loop
from sampler.core.solver_error import SolverError, has_estimate
from sampler.core.trajectory import begin
from sampler.registry.constraints import as_int
from sampler.types import MAX_SEED, Cond, Guidance, Sampler, Snapshot

Output = Literal["pil", "tensor", "latent"]
DEFAULT_BATCH = 8


@dataclass(frozen=True)
class Sample:
    """One image to generate."""

    prompt: str
    negative: str
    seed: int


@dataclass(frozen=True)
class Result:
    """Result of `generate`, one entry per image.

    images: PIL images, a tensor [B, 3, H, W] in [0, 1], or None for output="latent";
    latents [B, ...]; seeds; nfe: network evaluations, counted; config: plain data with which
    `generate(**config)` gives the same images; seconds: wall time.

    solver_error: estimate of the error that the finite number of steps makes, in units of x (rms
    over the elements of x), to compare numbers of steps and samplers:

        sum over steps of ‖x'_{p+1} − x'_p‖/sqrt(D)

    x'_p is the step as taken, x'_{p+1} that of the next order: one more stored prediction, no
    evaluation. For `unipc` and `sa_solver` it is ‖corrected − predicted‖. It is mostly above the
    true error, and does not rank the images of one run. None where the sampler has no estimate, or
    the run too few steps for one, and for images in a run folder and of hosted pipelines.

    best_of: of images that were chosen from drafts, one record per prompt: seeds, scores and
    evaluations (draft_nfe) of the drafts; the chosen seeds, best first, with the scores and
    evaluations of their full runs, and whether these are in the order of the drafts (order_held).
    """

    images: Any
    latents: Tensor
    seeds: list[int]
    nfe: list[int]
    config: dict[str, Any]
    seconds: float
    solver_error: list[float] | None = None
    best_of: list[dict[str, Any]] | None = None


class Sampled(NamedTuple):
    """latents [B, ...] of a batch; NFE and `Result.solver_error`, one entry per row."""

    latents: Tensor
    nfe: tuple[int, ...]
    solver_error: tuple[float, ...] | None = None


@torch.no_grad()
def sample_batch(
    engine: Loop,
    jobs: Sequence[Sample],
    size: tuple[int, int],
    steps: int,
    method: Sampler,
    rule: Guidance,
    cond: Cond | None = None,
    on_step: Callable[[Snapshot], None] | None = None,
    clean: tuple[Tensor, float] | None = None,
    graphs: GraphedRuns | None = None,
    estimate: bool = False,
) -> Sampled:
    """Sample some jobs; with `estimate` also their solver error.

    cond: their conditions, where they are encoded already. on_step receives every snapshot; where
    `graphs` replays the run, the next batch overwrites its tensors. clean: latents [B, ...] to
    start from and the strength of the noise on them, instead of noise alone.
    """
    if clean is not None and steps_left(steps, clean[1]) == 0:
        return Sampled(clean[0], (0,) * len(jobs))
    run = begin(
        engine,
        [job.prompt for job in jobs],
        [job.negative for job in jobs],
        [job.seed for job in jobs],
        steps,
        size,
        method,
        rule,
        cond,
        clean,
    )
    error = SolverError(run, on_step) if estimate and has_estimate(run) else None
    if error is not None:
        run, on_step = error.run, error
    if graphs is None:
        x, last = engine.run_to_end(*run, on_step=on_step)
    else:
        x, last = graphs(run, on_step)
    return Sampled(x, last.nfe, None if error is None else error.total())


def clean_latents(
    adapter: PipelineAdapter, image: Any, strength: float, size: tuple[int, int], count: int
) -> Tensor:
    """Encode the image to start from, one latent per job [count, ...].

    Raises ValueError for a strength outside 0..1, and images of another size or number.
    """
    check_strength(strength)
    images = as_images(image)
    if tuple(images.shape[-2:]) != size or len(images) not in (1, count):
        raise ValueError(
            f"image: {len(images)} of {images.shape[-1]} x {images.shape[-2]} pixels for {count} "
            f"images of {size[1]} x {size[0]}; give one, or one each, of that size."
        )
    latents = adapter.latents_of(images)
    return latents.expand(count, *latents.shape[1:])


def expand(
    prompts: str | int | Sequence[str | int],
    negative: str | Sequence[str] | None,
    seeds: int | Sequence[int] | None,
    n: int,
    classes: bool = False,
) -> list[Sample]:
    """List the images of a `generate` call, in order; raises ValueError as there.

    classes: class numbers are allowed as prompts.
    """
    given: list[Any] = [prompts] if isinstance(prompts, (str, int)) else list(prompts)
    if not given:
        raise ValueError("No prompts: give a text or a list of at least one.")
    texts = [str(text) if classes and type(text) is int else text for text in given]
    if bad := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"A prompt is a text, not {bad[0]!r:.60}.")
    n = as_int(n, "n")
    if n < 1:
        raise ValueError(f"n = {n} must be at least 1 image per prompt.")
    against = (
        [negative or ""] * len(texts)
        if negative is None or isinstance(negative, str)
        else [*negative]
    )
    if len(against) != len(texts):
        raise ValueError(f"{len(against)} negative prompts for {len(texts)} prompts.")
    images = [(t, a, i) for t, a in zip(texts, against, strict=True) for i in range(n)]
    if seeds is None:
        chosen = [_derived_seed(text, i) for text, _, i in images]
    else:
        chosen = _given_seeds(seeds, len(images))
    if len(chosen) != len(images):
        raise ValueError(f"{len(chosen)} seeds for {len(images)} images; give one int or one each.")
    if bad := [s for s in chosen if not 0 <= s <= MAX_SEED]:
        raise ValueError(f"seed = {bad[0]} must lie in 0..2^63 − 1.")
    return [Sample(t, a, s) for (t, a, _), s in zip(images, chosen, strict=True)]


def _given_seeds(seeds: Any, count: int) -> list[int]:
    try:
        return [as_int(seed, "seeds") for seed in seeds]
    except TypeError:  # not iterable: one number
        first = as_int(seeds, "seeds")
        return [first + k for k in range(count)]


def _derived_seed(prompt: str, index: int) -> int:
    """Derive the seed of image `index` of a prompt; the same at every call."""
    digest = hashlib.sha256(f"{index}:{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") & MAX_SEED


def to_output(images: Tensor, output: Output) -> Any:
    """Convert images [B, 3, H, W] in [0, 1]; PIL images are rounded to uint8 as in diffusers."""
    if output == "tensor":
        return images
    if images.ndim == 5:  # videos [B, 3, F, H, W]
        return [to_output(frames.transpose(0, 1), output) for frames in images]
    from PIL import Image

    return [Image.fromarray(pixels) for pixels in to_pixels(images)]
