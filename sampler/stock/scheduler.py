"""The drop-in scheduler: a registered sampler under the interface of a diffusers scheduler.

Levels, parametrisation, first noise and clipping (`clip_sample`, of pixel models) are those of the
replaced scheduler; the moves are the sampler's. Latents equal those of the engine bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config

# diffusers looks for SchedulerMixin in the module of a scheduler that it loads
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from sampler_kernels import Lin, settle
from torch import Tensor

from sampler import registry
from sampler.core.errors import SamplerError
from sampler.core.noise import Noise, with_noise
from sampler.core.schedule import clipped
from sampler.core.spacings import count_of
from sampler.core.stock_schedule import schedule_of
from sampler.stock.requested_grid import requested_grid
from sampler.stock.scheduler_parts import SchedulerParts
from sampler.stock.step_arguments import (
    BESIDE_STEPS,
    StepAnswer,
    common,
    is_integer_part,
    moving_tokens,
    refuse,
    without_variance,
)
from sampler.stock.step_seeds import NOT_PASSED, step_seeds
from sampler.types import Level, Prediction, SamplerBase, Span, spans


class SamplerScheduler(SchedulerParts):
    """Drop-in scheduler; mutable, as pipelines expect. `set_timesteps` starts a new run.

    sampler: {"name": ..., field: ...}; base: the configuration of the replaced scheduler, with its
    "_class_name"; grid: a named grid or a list of levels, None for the scheduler's own.
    """

    config_name = "scheduler_config.json"
    _rounding: ClassVar[float] = 0.0  # of the timesteps that a pipeline gives to a step
    _targets: ClassVar[bool] = False  # whether a step answers with x0 too, and at last with x
    over_alpha: ClassVar[bool] = False  # whether the pipeline holds x/alpha

    @register_to_config
    def __init__(
        self, sampler: Any = "ddim", base: Mapping[str, Any] | None = None, grid: Any = None
    ) -> None:
        if base is None:
            raise ValueError("Build a drop-in with sampler.scheduler(name, pipe.scheduler).")
        name = str(base.get("_class_name", ""))
        if why := BESIDE_STEPS.get(name):
            raise ValueError(f"{name} stays where it is: {why}.")
        self.schedule = schedule_of(base, name)
        self.method = registry.build("sampler", sampler)
        if type(self.method).start is not SamplerBase.start:
            raise ValueError(
                f"{self.method.name} starts from an x of its own, which a stock pipeline does not "
                "use; use engine.generate."
            )
        self.method = self.method.with_schedule(self.schedule)
        self.timesteps = torch.arange(self.schedule.train_steps - 1, -1, -1)
        self._spacing = grid
        count = count_of(grid) or 4
        mu = None if self.schedule.dynamic is None else 1.0
        self._trial = self.schedule.grid(count, spacing=grid, mu=mu)
        self.method.levels(self._trial)  # refuses levels of another process
        # evaluations per requested timestep; pipelines skip that many when they start midway
        self.order = self.method.evaluations
        self._grid: tuple[Level, ...] = ()
        self._spans: list[Span] = []
        self._reset()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Set the grid of a run and reset the state.

        sigmas: flow times before the shift. timesteps: on a vp model the levels follow them; on a
        flow model the network receives them as they are, at the levels of `sigmas` or, without
        those, of timesteps / N, shifted, as in the stock scheduler. mu: exponent of a dynamic
        shift. With a grid of the drop-in's own, sigmas give the number of steps only.

        Raises ValueError for lengths that differ, levels that do not fall, timesteps together with
        sigmas on a vp model, and what `Schedule.grid` raises.
        """
        times = None if timesteps is None else [float(t) for t in timesteps]
        given = None if sigmas is None else [float(s) for s in sigmas]
        self._grid = requested_grid(
            self.schedule, num_inference_steps, times, given, mu, self._spacing
        )
        self._spans = spans(self.method.levels(self._grid))
        self.num_inference_steps = len(self._grid) - 1
        t_of_spans = [span.now.t for span in self._spans]
        integers = all(isinstance(t, int) for t in t_of_spans)
        dtype = torch.int64 if integers else torch.float32
        self.timesteps = torch.tensor(t_of_spans, dtype=dtype, device=device)
        self._reset()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Scale x for the network. Raises ValueError for a level in the place of x."""
        if not sample.ndim:
            raise ValueError(
                "This pipeline computes with the sigmas of an Euler scheduler beside its steps, "
                "and those of a drop-in belong to another x; keep the scheduler that it came with."
            )
        self._scaled = True
        if not self.schedule.preconditioned:
            return sample
        return sample * self.schedule.network_input(self._level(timestep))

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: Any = NOT_PASSED,
        return_dict: bool = True,
        **others: Any,
    ) -> SchedulerOutput | Sequence[Tensor]:
        """Take one step; noise is seeded at the first step of a run, see `step_seeds`.

        Channels of a learned variance are dropped. Raises ValueError for a timestep that is not the
        next one of the grid, for eta, which is a setting of the sampler, for a two-evaluation
        sampler that takes over a run midway, for a pipeline made for levels of another kind, for
        timesteps that differ within the batch, and for other arguments of the replaced scheduler's
        `step`, unless they change nothing; SamplerError at the last step for a result that is not
        finite.
        """
        base: Any = self._internal_dict["base"]
        refuse(base, self.method.name, eta, use_clipped_model_output, others)
        if self.schedule.scales_input and not self._scaled and not return_dict:
            raise ValueError(
                "This pipeline does not call scale_model_input, so it is made for flow matching or "
                f"for its own steps, and the replaced scheduler has {self.schedule.process} "
                "levels; start from the scheduler that the pipeline came with."
            )
        timestep = common(timestep)
        index = self._due_index(timestep, others.get("prev_timestep"))
        x = self._precise(sample, self._spans[index].now)
        tokens = others.get("per_token_timesteps")
        if tokens is not None:  # LTXConditionPipeline; the stock step has the other sign then
            model_output = -model_output
            if (
                abs(self._spans[index].now.sigma * self.schedule.train_steps - self._t[index])
                > 1e-3
            ):
                raise ValueError(
                    "per_token_timesteps are levels of a schedule without a shift; use a scheduler "
                    "with shift = 1."
                )
        level, x0 = self._spans[index].now, others.get("pred_original_sample")
        if x0 is None:
            pred = self.schedule.predict(x, without_variance(model_output, x, base), level)
            pred = clipped(pred, x, base, str(base.get("_class_name", "")))
        else:
            pred = Prediction.from_x0(x, x0, level)
        if self._index is None:
            self._check_start(index)
            self._check_noise()
        take = partial(self._taken, index, x, pred, sample, generator, tokens)
        if return_dict:
            return SchedulerOutput(prev_sample=take())
        return self._answer(index, take, pred)

    def _due_index(self, timestep: Any, after: Any) -> int:
        """Position of the step that is due. Raises ValueError for another one's timestep.

        after: the next timestep, of UnCLIP's pipelines.
        """
        index = self._first(timestep) if self._index is None else self._index
        t = self._t[index] if index < len(self._spans) else -1.0
        if abs(float(timestep) - t) > self._rounding and not is_integer_part(timestep, t):
            raise ValueError(
                f"Timestep {float(timestep):g} is not the next one of this run; "
                "call set_timesteps before every run."
            )
        if after is not None and float(after) not in self._t[index + 1 : index + 2]:
            raise ValueError(f"prev_timestep = {float(after):g} is not the next one of this run.")
        return index

    def _taken(
        self, index: int, x: Tensor, pred: Prediction, sample: Tensor, generator: Any, tokens: Any
    ) -> Tensor:
        """Sample after step `index`, with which the state of the run advances."""
        if self.method.stochastic and not self._seeds:
            self._seeds = step_seeds(generator, sample)
        span = self._spans[index]
        move = self.method.step(x, pred, with_noise(span, self.method, self._seeds), self._state)
        mean = Lin.of(move.mean)
        if move.std != 0:
            noise = Noise(self._seeds).of_move(index, x, move.over)
            mean = mean + (move.std * self.schedule.noise_std) * Lin.of(noise)
        x, self._state = settle((mean, move.state))
        if index == len(self._spans) - 1:
            x = settle(self.method.finish(x, self._state))
            self._check_finite(x)
        self._index, self._x = index + 1, x
        out = self._held(x, span.next).to(sample.dtype)
        if tokens is None:
            return out
        moving = moving_tokens(tokens, self._t[index], sample, bool(self._state))
        return out.where(moving, sample)

    def _answer(self, index: int, take: Callable[[], Tensor], pred: Prediction) -> Sequence[Tensor]:
        """Answer of step `index` to pipelines that ask for a tuple; take: gives the sample."""
        out = take()
        if not self._targets:
            return StepAnswer((out,))
        last = index == len(self._spans) - 1
        return out, out if last else settle(pred.x0).to(out.dtype)

    def _check_finite(self, x: Tensor) -> None:
        if not bool(x.isfinite().all()):
            raise SamplerError(
                f"The latents are not finite after the last step of {self.method.name}; load the "
                "pipeline in float32, or use another sampler or a lower guidance scale."
            )

    def _check_start(self, index: int) -> None:
        inside = index and self._spans[index].now not in self._grid
        if (index and self.order > 1 and not self._noised) or inside:
            raise ValueError(
                f"{self.method.name} evaluates each step twice and cannot take over in the middle "
                "of a run (denoising_start): the cut falls between the two evaluations. Use a "
                "sampler with one evaluation per step, such as 'dpmpp_2m'."
            )

    def _reset(self) -> None:
        self._scaled = self._noised = False
        self._index: int | None = None
        self._begin: int | None = None
        self._sigmas: Tensor | None = None
        self._state: Any = ()
        self._x: Tensor | None = None
        self._seeds: tuple[int, ...] = ()
