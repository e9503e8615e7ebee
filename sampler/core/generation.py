"""Images of a `generate` call, batch by batch, in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sampler import registry
from sampler.core.batch import Output, Result, Sample, clean_latents, sample_batch, to_output
from sampler.core.graphs import graphed
from sampler.core.loop import Loop
from sampler.types import Guidance, Sampler


@dataclass(frozen=True)
class GenerateRequest:
    """Arguments of `generate`, resolved.

    inputs: further arguments of a hosted pipeline's call, one mapping per sample.
    """

    samples: Sequence[Sample]
    size: tuple[int | None, int | None]  # (height, width)
    steps: int
    sampler: Sampler
    guidance: Guidance
    batch_size: int
    inputs: Sequence[Mapping[str, Any]] = ()
    grid: Any = None


@torch.no_grad()
def generate_batches(
    engine: Loop,
    request: GenerateRequest,
    output: Output,
    progress: Callable[[int, int], None] | None,
    image: Any,
    strength: float,
    graph: bool | Literal["auto"],
) -> Result:
    """Generate the images of a request, batch by batch; arguments as for `Engine.generate`."""
    started, adapter, samples = time.perf_counter(), engine.pipeline, request.samples
    size, cut, total = adapter.size(*request.size), request.batch_size, len(request.samples)
    latents: list[Tensor] = []
    images: list[Tensor] = []
    nfe: list[int] = []
    errors: list[float] = []
    graphs = graphed(engine, graph, -(-total // cut))
    x0 = None if image is None else clean_latents(adapter, image, strength, size, total)
    for first in range(0, total, cut):
        clean = None if x0 is None else (x0[first : first + cut], strength)
        with adapter.exclusive():
            done = sample_batch(
                engine, samples[first : first + cut], size, request.steps, request.sampler,
                request.guidance, clean=clean, graphs=graphs, estimate=True,
            )  # fmt: skip
            if output != "latent":
                images.append(adapter.decode(done.latents).cpu())
        latents.append(done.latents)
        nfe.extend(done.nfe)
        errors.extend(done.solver_error or ())
        if progress is not None:
            progress(len(nfe), total)
    start = {} if image is None else {"image": image, "strength": strength}
    return Result(
        images=None if output == "latent" else to_output(torch.cat(images), output),
        latents=torch.cat(latents),
        seeds=[sample.seed for sample in samples],
        nfe=nfe,
        config={**_config_of(request, size), "output": output, **start},
        seconds=time.perf_counter() - started,
        solver_error=errors or None,
    )


def _config_of(request: GenerateRequest, size: tuple[int, int]) -> dict[str, Any]:
    """Arguments of `generate` that give the images of a request again."""
    negative = [sample.negative for sample in request.samples]
    return {
        "prompts": [sample.prompt for sample in request.samples],
        "negative": negative if any(negative) else None,
        "seeds": [sample.seed for sample in request.samples],
        "n": 1,
        "steps": request.steps,
        "height": size[0],
        "width": size[1],
        "sampler": registry.spec_of(request.sampler),
        "guidance": registry.spec_of(request.guidance),
        "batch_size": request.batch_size,
        **({} if request.grid is None else {"grid": request.grid}),
    }
