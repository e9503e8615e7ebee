"""Hosted engines: a stock pipeline's own call, with our samplers and guidance rules inside.

Pipelines without an adapter are called as they are, with the drop-in scheduler and the guidance of
`sampler.guide`, on a shallow copy that shares the components; the given pipeline is not modified.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from sampler import registry
from sampler.core.batch import DEFAULT_BATCH, Output, Result, Sample, expand
from sampler.core.errors import UsageError
from sampler.core.spacings import count_of
from sampler.engine.engine import Engine
from sampler.engine.hosted_calls import HostedCalls, StockCall
from sampler.engine.hosted_inputs import batches, inputs_per_image, with_start
from sampler.engine.hosted_output import stored
from sampler.engine.hosted_pipeline import HostedPipeline
from sampler.models.ip_adapter import has_ip_adapter
from sampler.pipelines.call_arguments import check_types
from sampler.pipelines.serving import check_ip_inputs, own_names, serving_class, with_class
from sampler.registry.constraints import as_int
from sampler.runs.jobs import JobSettings
from sampler.samplers.aliases import named
from sampler.types import Guidance, Snapshot
from sampler.workers.best_of import check_best_of, generate_best
from sampler.workers.from_python import GenerateRequest, generate_into

Progress = Callable[[int, int], None]


class HostedEngine(Engine):
    """Engine over a pipeline class without an adapter; `generate` calls the pipeline itself."""

    hosted = True

    def __init__(self, pipe: Any, sampler: Any = None, guidance: Any = None) -> None:
        hosted = HostedPipeline(pipe)
        rule = guidance or hosted.default_guidance
        super().__init__(self._refused, hosted, sampler or hosted.default_sampler, rule)  # pyright: ignore
        self.calls = HostedCalls(hosted)
        self._spacing: Any = None
        self._others: dict[type, HostedEngine] = {}

    def _refused(self, *_: Any, **__: Any) -> NoReturn:
        raise UsageError(
            f"{type(self.calls.pipe).__name__} is hosted: its own loop runs, so run, steps, "
            "snapshots and training are not possible; use generate."
        )

    start = steps = predict = run = run_to_end = _refused  # pyright: ignore

    def with_grid(self, spacing: Any) -> HostedEngine:
        """Return the same engine with another default grid of levels; None keeps its own."""
        twin = copy.copy(self)
        twin._spacing = self._spacing if spacing is None else spacing
        return twin

    def serving(self, inputs: Iterable[str]) -> HostedEngine:
        """Return the engine whose call takes inputs of these names: this one, or one over the same
        components by the class for image to image or inpainting, see `serving_class`.

        Raises ValueError for names that no class takes.
        """
        pipe = self.calls.pipe
        inputs = [*inputs]
        check_ip_inputs(inputs, has_ip_adapter(pipe))
        cls = serving_class(type(pipe), inputs)
        if cls is type(pipe):
            return self
        if cls not in self._others:
            other = HostedEngine(with_class(pipe, cls), self.sampler, self.guidance)
            self._others[cls] = other
        return self._others[cls].with_grid(self._spacing)

    @torch.no_grad()
    def generate(
        self,
        prompts: str | int | Sequence[str | int],
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
        progress: Progress | None = None,
        image: Any = None,
        strength: float | None = None,
        out: Any = None,
        graph: Any = False,
        inputs: Mapping[str, Any] | None = None,
        grid: Any = None,
        best_of: int | None = None,
        reward: Any = None,
        drafts: Mapping[str, Any] | None = None,
    ) -> Result:
        """Generate n images per prompt by the pipeline's own call; see `Engine.generate`.

        inputs: further arguments of that call by name, each once for all or a list with one per
        prompt; files, "file:" URLs and folders of frames are opened. Where the class has no such
        arguments, its class for image to image or inpainting is called (`serving`). image,
        strength: the inputs of that name. latents is None. config holds files with the hash of
        their content.

        Raises ValueError for names that the call does not have or that the engine sets, and for a
        strength without image; UsageError for files that are missing or no images, and for graph;
        with out, what `Engine.generate` raises.
        """
        if best_of is not None:
            return generate_best(
                self.generate, prompts, negative, seeds, n, best_of, reward, drafts,
                self.pipeline.takes_classes,
                {"steps": steps, "height": height, "width": width, "sampler": sampler,
                 "guidance": guidance, "batch_size": batch_size, "output": output, "image": image,
                 "progress": progress, "strength": strength, "out": out, "graph": graph,
                 "inputs": inputs, "grid": grid},
            )  # fmt: skip
        check_best_of(reward, drafts)
        if graph is True:
            raise UsageError("A hosted engine records no CUDA graph; leave graph out.")
        started = time.perf_counter()
        sampler, said = named(sampler)
        grid = next((g for g in (grid, said, self._spacing) if g is not None), None)
        given = own_names(type(self.calls.pipe), with_start(inputs, image, strength))
        engine = self.serving(given)
        jobs = expand(prompts, negative, seeds, n, self.pipeline.takes_classes)
        per_job = inputs_per_image(engine.calls.pipe, given, len(jobs) // n, n)
        cut = DEFAULT_BATCH if batch_size is None else as_int(batch_size, "batch_size")
        if cut < 1:
            raise ValueError(f"batch_size = {batch_size} must be at least 1.")
        if output not in ("pil", "tensor", "latent"):
            raise ValueError(f"output = {output!r} must be 'pil', 'tensor' or 'latent'.")
        if out is not None and output != "pil":
            raise ValueError("out= stores images; leave out output=.")
        size = tuple(
            None if value is None else as_int(value, name)
            for name, value in (("height", height), ("width", width))
        )
        rule, method = self.build_guidance(guidance), self.build_sampler(sampler)
        steps = as_int(count_of(grid) or steps, "steps")
        grid = engine.calls.grid(grid, method, rule, steps)
        shared = StockCall(steps, size, method, rule, output, grid)  # pyright: ignore
        engine.calls.check(shared, jobs)
        if out is not None:
            request = GenerateRequest(
                jobs, shared.size, steps, method, rule, cut, [dict(own) for own in per_job], grid
            )
            return generate_into(self, str(out), request, progress)
        made, nfe = engine._generated(jobs, shared, per_job, cut, progress)
        images: Any = made if output == "pil" or not isinstance(made[0], Tensor) else None
        stacked = None if images is not None else torch.stack(made)
        return Result(
            images=None if output == "latent" else (images if images is not None else stacked),
            latents=stacked if output == "latent" else None,  # pyright: ignore[reportArgumentType]
            seeds=[job.seed for job in jobs],
            nfe=nfe,
            config=shared.config(jobs, per_job, cut),
            seconds=time.perf_counter() - started,
        )

    def _generated(
        self,
        jobs: Sequence[Sample],
        shared: StockCall,
        per_job: Sequence[Mapping[str, Any]],
        cut: int,
        progress: Progress | None,
    ) -> tuple[list[Any], list[int]]:
        """The values and the NFE of all jobs, by calls of at most `cut`."""
        made: list[Any] = []
        nfe: list[int] = []
        for rows in batches(jobs, per_job, cut):
            values, counted = self.calls.call([jobs[k] for k in rows], shared, per_job[rows[0]])
            made.extend(values)
            nfe.extend(counted)
            if progress is not None:
                progress(len(nfe), len(jobs))
        return made, nfe

    def check_stock(self, settings: JobSettings, jobs: Iterable[Any]) -> None:
        """Raise for what every call of a run with these settings would fail on."""
        engine = self.serving(settings.inputs)
        check_types(type(engine.calls.pipe), own_names(type(self.calls.pipe), settings.inputs))
        rule = self.build_guidance(settings.guidance)
        job = next(iter(jobs))
        first = Sample(job.prompt, job.negative_prompt, job.seed)
        hosted: Any = self.pipeline
        if hosted.makes_audio and hosted.sample_rate is None:
            name = type(self.calls.pipe).__name__
            raise ValueError(f"{name} does not say its sample rate, so no file can be written.")
        engine.calls.check(self._shared(settings, rule), [first])

    def call_stock(
        self,
        jobs: Sequence[Sample],
        settings: JobSettings,
        rule: Guidance,
        on_step: Callable[[Snapshot], None],
    ) -> tuple[list[Any], list[int]]:
        """Call the pipeline on the jobs of a batch; neighbours without a negative prompt apart.

        Returns what a run folder holds of each, and their NFE; see `hosted_output.stored`.
        """
        inputs = own_names(type(self.calls.pipe), settings.inputs)
        engine, shared = self.serving(inputs), self._shared(settings, rule)
        images: list[Any] = []
        nfe: list[int] = []
        for _, part in itertools.groupby(jobs, lambda job: bool(job.negative)):
            made, counted = engine.calls.call([*part], shared, inputs, on_step)
            images, nfe = images + made, nfe + counted
        hosted: Any = self.pipeline
        rate = hosted.sample_rate if hosted.makes_audio else None
        return [stored(image, rate) for image in images], nfe

    def _shared(self, settings: JobSettings, rule: Guidance) -> StockCall:
        """The settings of a batch whose jobs have this rule."""
        method = registry.build("sampler", settings.sampler)
        grid = self.calls.grid(settings.grid, method, settings.guidance, settings.steps)
        return StockCall(settings.steps, (settings.height, settings.width), method, rule, grid=grid)
