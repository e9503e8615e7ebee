"""Calls of a stock pipeline with a sampler and a guidance rule of ours inside."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sampler import registry
from sampler.core.batch import Output, Sample
from sampler.core.binding import network_hash
from sampler.core.calibrated_grid import PREFIX, grid_of
from sampler.core.errors import ModelError
from sampler.core.inputs import opened
from sampler.core.locks import exclusive
from sampler.engine.hosted_output import converted, first_value, note_further_values
from sampler.engine.hosted_pipeline import HostedPipeline
from sampler.guidance.embedded import Embedded
from sampler.pipelines.call_arguments import (
    arguments,
    default_of,
    embeds_scale,
    scale_name,
    scheduler_name,
    scheduler_of,
    steps_name,
    takes_images,
)
from sampler.stock.clip_layers import readable_layers
from sampler.stock.drop_in import is_exact_on_flow_maps, replaced
from sampler.stock.guided_calls import GuidedCalls
from sampler.stock.hook import guiding, hook_of
from sampler.stock.language_draws import seeded_draws
from sampler.stock.row_count import counted_rows
from sampler.stock.step_arguments import AbsentError
from sampler.stock.stock_calls import denoisers
from sampler.types import Guidance, Sampler, Snapshot

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

    def config(
        self, jobs: Sequence[Sample], per_job: Sequence[Mapping[str, Any]], cut: int
    ) -> dict[str, Any]:
        """The arguments of `generate` that make the images again, by calls of at most `cut`."""
        height, width = self.size
        found: dict[str, Any] = {
            "prompts": [job.prompt for job in jobs],
            "negative": [job.negative for job in jobs] if any(j.negative for j in jobs) else None,
            "seeds": [job.seed for job in jobs],
            **{"n": 1, "steps": self.steps, "height": height, "width": width},
            "sampler": registry.spec_of(self.sampler),
            "guidance": registry.spec_of(self.guidance),
            **{"batch_size": cut, "output": self.output},
        }
        if self.grid is not None:
            found["grid"] = self.grid
        if per_job[0]:
            found["inputs"] = {name: [own[name] for own in per_job] for name in per_job[0]}
        return found


class HostedCalls:
    """Calls of one pipeline; its components are shared, and it is not modified."""

    def __init__(self, hosted: HostedPipeline) -> None:
        self.hosted, self.pipe = hosted, hosted.pipe
        self._one_at_a_time = self._arrays = False
        self._checked: tuple[StockCall, GuidedCalls] | None = None  # the hook of a check

    def grid(self, spec: Any, method: Sampler, rule: Any, steps: int) -> Any:
        """The grid of a run; one of "calibrated:FILE" is looked up for the weights of the network.

        Raises UsageError for a file that has none for these settings.
        """
        if not (isinstance(spec, str) and spec.startswith(PREFIX)):
            return spec
        networks = denoisers(self.pipe)
        return grid_of(spec, network_hash(networks[0]) if networks else "", method, steps, rule)

    def check(self, shared: StockCall, jobs: Sequence[Sample]) -> None:
        """Raise ValueError for what every call would fail on, before the first one."""
        cls = type(self.pipe)
        known = arguments(cls)
        for name, value in zip(("height", "width"), shared.size, strict=True):
            if value is not None and name not in known:
                raise ValueError(f"{cls.__name__} takes no {name}; its inputs decide the size.")
        if self.hosted.takes_classes and any(not j.prompt.isdecimal() for j in jobs):
            raise ValueError(f"{cls.__name__} takes the numbers of classes as prompts.")
        if "prompt" not in known and "class_labels" not in known and any(j.prompt for j in jobs):
            raise ValueError(f'{cls.__name__} takes no prompt; give "" as the prompt.')
        if any(job.negative for job in jobs) and "negative_prompt" not in known:
            raise ValueError(f"{cls.__name__} takes no negative prompt.")
        if isinstance(shared.guidance, Embedded) and not embeds_scale(cls):
            raise ValueError(f"embedded: {cls.__name__} takes no scale as an input; use 'cfg'.")
        self._checked = shared, hook_of(self._copied(shared), _around(shared.guidance))

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
        checked, self._checked = self._checked, None
        known = checked[1] if checked is not None and checked[0] is shared else None
        twin = known.pipe if known is not None else self._twin(shared)
        given = self._arguments(jobs, shared, inputs)
        try:
            layers = readable_layers(twin, given)
            draws = seeded_draws(twin, [job.seed for job in jobs])
            with exclusive(*self._networks()), layers, draws:
                hook = known if known is not None else hook_of(twin, _around(shared.guidance))
                hook.on_step = on_step
                with guiding(hook):
                    out = twin(**given)
        except NameError as error:  # classes of diffusers that use a package without asking for it
            raise ModelError(
                f"{type(twin).__name__} needs the package {error.name}, which is not installed."
            ) from error
        except AbsentError as error:
            raise ModelError(f"{type(twin).__name__} cannot be hosted: {error}") from None
        except (TypeError, AttributeError, ValueError, IndexError) as error:
            no_image = "output_type" in str(error) or "buffer is not large" in str(error)
            if not self._arrays and shared.output == "pil" and no_image:
                self._arrays = True  # depth maps and embeddings are no images
                return self.call(jobs, shared, inputs, on_step)
            signs = "enerator", "list of prompts", "`prompt` has to be of type `str` but"
            one_only = any(sign in str(error) for sign in signs)
            one_only |= isinstance(error, IndexError) and len(jobs) > 1  # frames of one image only
            if self._one_at_a_time or not one_only:
                raise
            self._one_at_a_time = True
            log.warning(
                "%s takes one prompt and one random generator: images are made one at a time.",
                type(twin).__name__,
            )
            return self.call(jobs, shared, inputs, on_step)
        if isinstance(shared.guidance, Embedded) and hook.form and "uncond" in hook.form.roles:
            raise ValueError(
                f"embedded: {type(twin).__name__} evaluates an unconditional branch, so its scale "
                "is no input of the network; use 'cfg'."
            )
        note_further_values(type(twin).__name__, out)
        values = converted(first_value(out), shared.output, len(jobs))
        return values, hook.nfe_of(len(jobs))

    def call_plain(
        self,
        jobs: Sequence[Sample],
        shared: StockCall,
        inputs: Mapping[str, Any],
        on_call: Callable[[], None] = lambda: None,
    ) -> tuple[list[Any], list[int]]:
        """Call the pipeline as it is, with its own scheduler and classifier-free guidance.

        shared: its guidance gives the scale; on_call: called before every network call. Returns one
        value per job and their NFE.
        """
        if len(jobs) > 1 and (self._one_at_a_time or self._encodes(inputs)):
            parts = [self.call_plain([job], shared, inputs, on_call) for job in jobs]
            return [v for values, _ in parts for v in values], [c for _, nfe in parts for c in nfe]
        control = getattr(self.pipe, "controlnet", None)  # belongs to the network's evaluation
        networks = [network for network in denoisers(self.pipe) if network is not control]
        given = self._arguments(jobs, shared, inputs)
        counted = counted_rows(networks, on_call)
        with exclusive(*self._networks()), readable_layers(self.pipe, given), counted as rows:
            out = self.pipe(**given)
        values = converted(first_value(out), shared.output, len(jobs))
        return values, [sum(rows) // len(jobs)] * len(jobs)

    def _encodes(self, inputs: Mapping[str, Any]) -> bool:
        """Return True if an image among the inputs may go through the VAE."""
        pipe, seen = self.pipe, {"control_image", "ip_adapter_image"}
        if "control_image" not in arguments(type(pipe)) and "controlnet" in pipe.components:
            seen.add("image")
        return any(takes_images(name) for name in set(inputs) - seen)

    def _networks(self) -> list[Any]:
        return [p for p in self.pipe.components.values() if isinstance(p, torch.nn.Module)]

    def _copied(self, shared: StockCall) -> Any:
        """Return a shallow copy with the drop-in scheduler; it shares every other component."""
        pipe, own = self.pipe, scheduler_of(self.pipe)
        twin, drop_in = copy.copy(pipe), replaced(shared.sampler, own, shared.grid)
        vars(twin)[scheduler_name(type(pipe))] = drop_in
        for name, part in vars(pipe).items():  # the pipelines that a combined one consists of
            if part is not own and getattr(part, "scheduler", None) is own:
                vars(twin)[name] = copy.copy(part)
                vars(vars(twin)[name])["scheduler"] = drop_in
        return twin

    def _twin(self, shared: StockCall) -> Any:
        """The copy of this call. Raises ModelError for a sampler that cannot be hosted."""
        try:
            return self._copied(shared)
        except ValueError as error:
            raise ModelError(f"{type(self.pipe).__name__} cannot be hosted: {error}") from None

    def _arguments(
        self, jobs: Sequence[Sample], shared: StockCall, inputs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Arguments of the pipeline's call."""
        cls, hosted = type(self.pipe), self.hosted
        known = arguments(cls)
        generators = [torch.Generator("cpu").manual_seed(job.seed) for job in jobs]
        given: dict[str, Any] = {
            "prompt": [job.prompt for job in jobs],
            "class_labels": [int(j.prompt) for j in jobs] if hosted.takes_classes else None,
            steps_name(cls): shared.steps,
            "generator": generators if len(jobs) > 1 else generators[0],
            "output_type": "pt" if shared.output == "tensor" else shared.output,
            **({"output_type": "np"} if self._arrays and shared.output == "pil" else {}),
            "guidance_rescale": 0.0,  # the rule's own takes its place
            **{k: v for k, v in zip(("height", "width"), shared.size, strict=True) if v},
        }
        guided = "uncond" in shared.guidance.needs
        if any(job.negative for job in jobs) or (guided and "true_cfg_scale" in known):
            given["negative_prompt"] = [job.negative for job in jobs]
        scale, named = getattr(shared.guidance, "scale", None), hosted.scale_argument
        if guided:
            named = named or scale_name(cls)  # of classes whose other branch has no prompt
            own = scale if isinstance(scale, (int, float)) and scale > 1 else 0.0
            given[named] = float(own or max(2.0, default_of(cls, named) or 0))
        elif named:
            given[named] = 1.0
        given["guidance_schedule"] = None  # one scale per step, in its place
        if shared.steps != 2:  # SANA-Sprint's default is of two steps, and it refuses others
            given["intermediate_timesteps"] = None
        if not is_exact_on_flow_maps(shared.sampler):  # of AnyFlow: the velocity at a level instead
            given["use_mean_velocity"] = False
        if isinstance(shared.guidance, Embedded):
            given["guidance_scale"] = shared.guidance.scale
        if hosted.makes_audio:
            given.pop("output_type")
        if self._one_at_a_time:
            for name in {"prompt", "negative_prompt"} & set(given):
                given[name] = given[name][0]
        given = {name: value for name, value in given.items() if name in known}
        alpha = hosted.reads_alpha
        return {**given, **{name: opened(name, value, alpha) for name, value in inputs.items()}}


def _around(rule: Guidance) -> Guidance:
    """The rule around a network; a scale that is its input is an argument of the call."""
    return registry.build("guidance", "none") if isinstance(rule, Embedded) else rule
