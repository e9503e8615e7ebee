"""Hosted engines: a stock pipeline's own call, with our samplers and guidance rules inside.

Pipelines without an adapter are called as they are, with the drop-in scheduler and the guidance of
`sampler.guide`, on a shallow copy that shares the components; the given pipeline is not modified.
"""

from __future__ import annotations

import copy
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from sampler import registry
from sampler.core.batch import DEFAULT_BATCH, Output, Result, Sample, expand
from sampler.core.errors import ModelError, UsageError
from sampler.core.images import strength_of
from sampler.core.inputs import opened, planned
from sampler.core.locks import exclusive
from sampler.core.spacings import count_of
from sampler.engine import Engine
from sampler.models.ip_adapter import has_ip_adapter
from sampler.pipelines.call_arguments import (
    arguments,
    check_names,
    default_of,
    required,
    takes_images,
)
from sampler.pipelines.serving import (
    check_ip_inputs,
    own_names,
    serving_class,
    sized_by,
    with_class,
)
from sampler.registry.constraints import as_int
from sampler.runs.jobs import JobSettings
from sampler.samplers.aliases import named
from sampler.stock.hook import guide
from sampler.stock.hosted_output import converted, first_value, stored
from sampler.stock.hosted_pipeline import HostedPipeline
from sampler.stock.scheduler import scheduler
from sampler.types import Guidance, Sampler, Snapshot
from sampler.workers.best_of import check_best_of, generate_best
from sampler.workers.from_python import GenerateRequest, generate_into

log = logging.getLogger("sampler")


@dataclass(frozen=True)
class StockCall:
    """Settings that calls share. size: (height, width), None where not given."""

    steps: int
    size: tuple[int | None, int | None]
    sampler: Sampler
    guidance: Guidance
    output: Output = "pil"
    grid: Any = None


class HostedEngine(Engine):
    """Engine over a pipeline class without an adapter; `generate` calls the pipeline itself."""

    hosted = True

    def __init__(self, pipe: Any, sampler: Any = None, guidance: Any = None) -> None:
        hosted = HostedPipeline(pipe)
        rule = guidance or hosted.default_guidance
        super().__init__(self._refused, hosted, sampler or hosted.default_sampler, rule)  # pyright: ignore
        self._one_at_a_time = False
        self._spacing: Any = None
        self._others: dict[type, HostedEngine] = {}

    def _refused(self, *_: Any, **__: Any) -> NoReturn:
        raise UsageError(
            f"{type(self.pipeline.pipe).__name__} is hosted: its own loop runs, so run, steps, "
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
        pipe = self.pipeline.pipe
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
        progress: Callable[[int, int], None] | None = None,
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
        started, given = time.perf_counter(), dict(inputs or {})
        sampler, said = named(sampler)
        grid = next((g for g in (grid, said, self._spacing) if g is not None), None)
        steps = count_of(grid) or steps
        strength = strength_of(image, strength)
        if image is not None:  # image to image
            if twice := [name for name in ("image", "strength") if name in given]:
                raise ValueError(f"{twice[0]} is given twice; leave it out of inputs.")
            given |= {"image": image, "strength": strength}
        given = own_names(type(self.pipeline.pipe), given)
        engine = self.serving(given)
        jobs = expand(prompts, negative, seeds, n, self.pipeline.takes_classes)
        per_job = engine.inputs_of(given, len(jobs) // n, n)
        cut = DEFAULT_BATCH if batch_size is None else as_int(batch_size, "batch_size")
        if cut < 1:
            raise ValueError(f"batch_size = {batch_size} must be at least 1.")
        if output not in ("pil", "tensor", "latent"):
            raise ValueError(f"output = {output!r} must be 'pil', 'tensor' or 'latent'.")
        size = tuple(
            None if value is None else as_int(value, name)
            for name, value in (("height", height), ("width", width))
        )
        rule, method = self.build_guidance(guidance), self.build_sampler(sampler)
        shared = StockCall(as_int(steps, "steps"), size, method, rule, output, grid)  # pyright: ignore
        engine.check(shared, jobs)
        if out is not None:
            if output != "pil":
                raise ValueError("out= stores images; leave out output=.")
            request = GenerateRequest(
                jobs, shared.size, shared.steps, method, rule, cut,
                [dict(own) for own in per_job], grid,
            )  # fmt: skip
            return generate_into(self, str(out), request, progress)
        made: list[Any] = []
        nfe: list[int] = []
        for rows in _batches(jobs, per_job, cut):
            values, counted = engine.call([jobs[k] for k in rows], shared, per_job[rows[0]])
            made.extend(values)
            nfe.extend(counted)
            if progress is not None:
                progress(len(nfe), len(jobs))
        config = {
            "prompts": [job.prompt for job in jobs],
            "negative": [job.negative for job in jobs] if any(j.negative for j in jobs) else None,
            "seeds": [job.seed for job in jobs],
            **{"n": 1, "steps": shared.steps, "height": size[0], "width": size[1]},
            **{"sampler": registry.spec_of(method), "guidance": registry.spec_of(rule)},
            **{"batch_size": cut, "output": output},
            **({} if grid is None else {"grid": grid}),
            "inputs": {name: [own[name] for own in per_job] for name in given},
        }
        if not given:
            del config["inputs"]
        images: Any = made if output == "pil" or not isinstance(made[0], Tensor) else None
        stacked = None if images is not None else torch.stack(made)
        return Result(
            images=None if output == "latent" else (images if images is not None else stacked),
            latents=stacked if output == "latent" else None,  # pyright: ignore[reportArgumentType]
            seeds=[job.seed for job in jobs],
            nfe=nfe,
            config=config,
            seconds=time.perf_counter() - started,
        )

    def inputs_of(self, given: Mapping[str, Any], prompts: int, n: int = 1) -> list[dict[str, Any]]:
        """Planned inputs of every image, checked by name; a list of `prompts` items is one each.

        Raises ValueError for unknown and missing names, UsageError for files.
        """
        cls = type(self.pipeline.pipe)
        check_names(cls, given)
        if missing := required(cls, given):
            raise ValueError(f"{cls.__name__} needs the input {missing[0]!r}: give it in inputs.")
        found: list[dict[str, Any]] = [{} for _ in range(prompts)]
        for name, value in given.items():
            plain = planned(name, value)
            one_each = isinstance(plain, list) and len(plain) == prompts
            if one_each and prompts > 1 and self._several(name) == prompts:
                if not isinstance(plain[0], list):
                    raise ValueError(
                        f"inputs: {name!r} has {prompts} values for {prompts} prompts and as many "
                        "adapters; give a list with one list per prompt."
                    )
            for k, own in enumerate(found):
                own[name] = plain[k] if one_each else plain
        return [own for own in found for _ in range(n)]

    def _several(self, name: str) -> int:
        """Number of ControlNets or IP-Adapters that an input has one value each for."""
        pipe = self.pipeline.pipe
        if name.startswith("ip_adapter"):
            layers = getattr(getattr(pipe, "unet", None), "encoder_hid_proj", None)
            return len(getattr(layers, "image_projection_layers", ()))
        if name.startswith("control") or name == sized_by(type(pipe), [name]):
            return len(getattr(getattr(pipe, "controlnet", None), "nets", ()))
        return 0

    def check(self, shared: StockCall, jobs: Sequence[Sample]) -> None:
        """Raise ValueError for what every call would fail on, before the first one."""
        cls = type(self.pipeline.pipe)
        known = arguments(cls)
        for name, value in zip(("height", "width"), shared.size, strict=True):
            if value is not None and name not in known:
                raise ValueError(f"{cls.__name__} takes no {name}; its inputs decide the size.")
        if self.pipeline.takes_classes and any(not j.prompt.isdecimal() for j in jobs):
            raise ValueError(f"{cls.__name__} takes the numbers of classes as prompts.")
        if "prompt" not in known and "class_labels" not in known and any(j.prompt for j in jobs):
            raise ValueError(f'{cls.__name__} takes no prompt; give "" as the prompt.')
        if any(job.negative for job in jobs) and "negative_prompt" not in known:
            raise ValueError(f"{cls.__name__} takes no negative prompt.")
        scheduler(shared.sampler, self.pipeline.pipe.scheduler, shared.grid)
        with guide(self._twin(shared), shared.guidance):
            pass

    def check_stock(self, settings: JobSettings, jobs: Iterable[Any]) -> None:
        """Raise for what every call of a run with these settings would fail on."""
        engine = self.serving(settings.inputs)
        rule = self.build_guidance(settings.guidance)
        job = next(iter(jobs))
        first = Sample(job.prompt, job.negative_prompt, job.seed)
        hosted: Any = self.pipeline
        if hosted.makes_audio and hosted.sample_rate is None:
            name = type(self.pipeline.pipe).__name__
            raise ValueError(f"{name} does not say its sample rate, so no file can be written.")
        engine.check(_shared(settings, rule), [first])

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
        inputs = own_names(type(self.pipeline.pipe), settings.inputs)
        engine = self.serving(inputs)
        images: list[Any] = []
        nfe: list[int] = []
        for _, part in itertools.groupby(jobs, lambda job: bool(job.negative)):
            made, counted = engine.call([*part], _shared(settings, rule), inputs, on_step)
            images, nfe = images + made, nfe + counted
        hosted: Any = self.pipeline
        rate = hosted.sample_rate if hosted.makes_audio else None
        return [stored(image, rate) for image in images], nfe

    def call(
        self,
        jobs: Sequence[Sample],
        shared: StockCall,
        inputs: Mapping[str, Any],
        on_step: Callable[[Snapshot], None] | None = None,
    ) -> tuple[list[Any], list[int]]:
        """Call the pipeline on some jobs with the same inputs; (one value per job, their NFE).

        Pipelines that take one prompt or generator are called once per job, which is told once; so
        are those that encode an image, whose noise would be that of the first job for all.
        """
        if len(jobs) > 1 and (self._one_at_a_time or self._encodes(inputs)):
            parts = [self.call([job], shared, inputs, on_step) for job in jobs]
            return [v for values, _ in parts for v in values], [c for _, nfe in parts for c in nfe]
        twin, given = self._twin(shared), self._arguments(jobs, shared, inputs)
        try:
            with exclusive(*self._networks()), guide(twin, shared.guidance) as hook:
                hook.on_step = on_step
                out = twin(**given)
        except NameError as error:  # classes of diffusers that use a package without asking for it
            raise ModelError(
                f"{type(twin).__name__} needs the package {error.name}, which is not installed."
            ) from error
        except (TypeError, AttributeError, ValueError) as error:
            one_only = "enerator" in str(error) or "list of prompts" in str(error)
            if self._one_at_a_time or not one_only:
                raise
            self._one_at_a_time = True
            log.warning(
                "%s takes one prompt and one random generator: images are made one at a time.",
                type(twin).__name__,
            )
            return self.call(jobs, shared, inputs, on_step)
        values = converted(first_value(out), shared.output, len(jobs))
        return values, hook.nfe

    def _encodes(self, inputs: Mapping[str, Any]) -> bool:
        """Return True if an image among the inputs may go through the VAE."""
        pipe, seen = self.pipeline.pipe, {"control_image", "ip_adapter_image"}
        if "control_image" not in arguments(type(pipe)) and "controlnet" in pipe.components:
            seen.add("image")
        return any(takes_images(name) for name in set(inputs) - seen)

    def _networks(self) -> list[Any]:
        return [p for p in self.pipeline.pipe.components.values() if isinstance(p, torch.nn.Module)]

    def _twin(self, shared: StockCall) -> Any:
        """Return a shallow copy with the drop-in scheduler; it shares every other component."""
        pipe = self.pipeline.pipe
        twin = copy.copy(pipe)
        try:
            vars(twin)["scheduler"] = scheduler(shared.sampler, pipe.scheduler, shared.grid)
        except ValueError as error:
            raise ModelError(f"{type(pipe).__name__} cannot be hosted: {error}") from None
        return twin

    def _arguments(
        self, jobs: Sequence[Sample], shared: StockCall, inputs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Arguments of the pipeline's call."""
        cls, hosted = type(self.pipeline.pipe), HostedPipeline(self.pipeline.pipe)
        known = arguments(cls)
        generators = [torch.Generator("cpu").manual_seed(job.seed) for job in jobs]
        given: dict[str, Any] = {
            "prompt": [job.prompt for job in jobs],
            "class_labels": [int(j.prompt) for j in jobs] if hosted.takes_classes else None,
            "num_inference_steps": shared.steps,
            "generator": generators,
            "output_type": {"pil": "pil", "tensor": "pt", "latent": "latent"}[shared.output],
            **{k: v for k, v in zip(("height", "width"), shared.size, strict=True) if v},
        }
        guided = "uncond" in shared.guidance.needs
        if any(job.negative for job in jobs) or (guided and "true_cfg_scale" in known):
            given["negative_prompt"] = [job.negative for job in jobs]
        if hosted.scale_argument:
            scale = getattr(shared.guidance, "scale", None)
            usual = default_of(cls, hosted.scale_argument)
            own = scale if isinstance(scale, (int, float)) and scale > 1 else max(2.0, usual or 0)
            given[hosted.scale_argument] = float(own) if guided else 1.0
        if hosted.makes_audio:
            given.pop("output_type")
        if self._one_at_a_time:
            for name in {"prompt", "negative_prompt", "generator"} & set(given):
                given[name] = given[name][0]
        given = {name: value for name, value in given.items() if name in known}
        return {**given, **{name: opened(name, value) for name, value in inputs.items()}}


def _shared(settings: JobSettings, rule: Guidance) -> StockCall:
    method = registry.build("sampler", settings.sampler)
    return StockCall(
        settings.steps, (settings.height, settings.width), method, rule, grid=settings.grid
    )


def _batches(
    jobs: Sequence[Sample], inputs: Sequence[Mapping[str, Any]], cut: int
) -> list[list[int]]:
    """Numbers of the jobs of each call: neighbours with the same inputs, at most `cut`."""
    found: list[list[int]] = []

    def alike(k: int) -> Any:
        return bool(jobs[k].negative), _Same(inputs[k])

    for _, group in itertools.groupby(range(len(jobs)), alike):
        rows = list(group)
        found += [rows[k : k + cut] for k in range(0, len(rows), cut)]
    return found


class _Same:
    """Inputs, equal where every value is the same object or equal plain data."""

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self.inputs = inputs

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same):
            return False
        pairs = ((self.inputs[k], other.inputs.get(k)) for k in self.inputs)
        plain = (str, int, float, bool, dict, list, type(None))
        return all(a is b or (isinstance(a, plain) and isinstance(b, plain) and a == b)
                   for a, b in pairs)  # fmt: skip

    __hash__ = None  # pyright: ignore


__all__ = ["HostedEngine", "StockCall"]
