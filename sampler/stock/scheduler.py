"""Any registered sampler as a diffusers scheduler, for stock pipelines.

    pipe.scheduler = sampler.scheduler("ghvb", pipe.scheduler)

The levels, the parametrisation and the first noise are those of the scheduler that was there, and
it clips where that one does (`clip_sample`, of pixel models); the moves are the sampler's. Latents
are those of the engine, bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from sampler_kernels import Lin, settle
from torch import Tensor

from sampler import registry
from sampler.core.noise import Noise
from sampler.core.schedule import Schedule, clipped
from sampler.types import Level, SamplerBase, Span, spans


def scheduler(sampler: Any, base: Any) -> SamplerScheduler:
    """A sampler (name, {"name": ..., field: ...} or instance) in the place of scheduler `base`.

    Raises ValueError for a base whose levels are not known, and for a sampler that a stock
    pipeline would silently break: one that starts from an x of its own (reddiff), or that cannot
    be written into a configuration file.
    """
    name = type(base).__name__
    if name.startswith("LCM"):
        raise ValueError(
            "A latent consistency pipeline decodes a second answer of its own scheduler; use "
            "engine.generate with the sampler 'consistency'."
        )
    config = {**base.config, "_class_name": name}
    if isinstance(base, SamplerScheduler):
        config = base.config["base"]
    spec = registry.spec_of(registry.build("sampler", sampler))
    try:
        plain = json.loads(json.dumps({"sampler": spec, "base": dict(config)}))
    except TypeError as error:
        raise ValueError(
            f"{spec['name']} in a pipeline must be plain data, to be saved with it: {error}."
        ) from None
    return SamplerScheduler(**plain)


class SamplerScheduler(SchedulerMixin, ConfigMixin):
    """The drop-in. Mutable, as pipelines expect; a run starts afresh with every `set_timesteps`.

    sampler: {"name": ..., field: ...}; base: the configuration of the scheduler it replaces, with
    its "_class_name".
    """

    config_name = "scheduler_config.json"

    @register_to_config
    def __init__(self, sampler: Any = "ddim", base: Mapping[str, Any] | None = None) -> None:
        if base is None:
            raise ValueError("Make a drop-in with sampler.scheduler(name, pipe.scheduler).")
        self.schedule = Schedule.from_config(base, str(base.get("_class_name", "")))
        self.method = registry.build("sampler", sampler)
        if type(self.method).start is not SamplerBase.start:
            raise ValueError(
                f"{self.method.name} starts from an x of its own, which a stock pipeline does not "
                "ask for; use engine.generate."
            )
        self.timesteps = torch.arange(self.schedule.train_steps - 1, -1, -1)
        trial = self.schedule.grid(4, mu=1.0 if self.schedule.dynamic else None)
        # Evaluations per timestep asked for; pipelines skip that many when they start midway.
        self.order = round(len(self.method.levels(trial)) / len(trial))
        self._grid: tuple[Level, ...] = ()
        self._spans: list[Span] = []
        self._reset()

    @property
    def config(self) -> Any:
        """What was saved, and beside it the replaced scheduler's entries: pipelines read those."""
        own = self._internal_dict
        return FrozenDict({**own["base"], **own})

    @property
    def init_noise_sigma(self) -> float:
        """What a pipeline multiplies the first noise with."""
        return self.schedule.initial_scale(self._grid) if self._grid else 1.0

    @property
    def sigmas(self) -> Tensor:
        """sigma of every step's level and of the last, in flow matching; else sigma/alpha."""
        grid = [*(span.now for span in self._spans), *(span.next for span in self._spans[-1:])]
        flow = self.schedule.process == "flow"
        return torch.tensor([v.sigma / (1.0 if flow else v.alpha or math.nan) for v in grid])

    @property
    def step_index(self) -> int | None:
        return self._index

    @property
    def begin_index(self) -> int | None:
        return self._begin

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The number of the first step: image-to-image pipelines skip the noisiest ones."""
        self._begin = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """The grid of a run, and a fresh start; timesteps or (flow) sigmas where given.

        Raises ValueError for timesteps that do not fall, and what `Schedule.grid` refuses.
        """
        if timesteps is not None:
            times = [t.item() if isinstance(t, Tensor) else t for t in timesteps]
            if any(b >= a for a, b in zip(times, times[1:], strict=False)):
                raise ValueError(f"timesteps = {times} must fall from each to the next.")
            last = self.schedule.grid(1, mu=mu)[-1]
            grid = (*(self.schedule.level(t) for t in times), last)
        else:
            given = None if sigmas is None else [float(s) for s in sigmas]
            count = len(given) if given is not None else int(num_inference_steps or 0)
            grid = self.schedule.grid(count, mu=mu, sigmas=given)
        self._grid = grid
        self._spans = spans(self.method.levels(grid))
        self.num_inference_steps = len(grid) - 1
        told = [span.now.t for span in self._spans]
        whole = all(isinstance(t, int) for t in told)
        dtype = torch.int64 if whole else torch.float32
        self.timesteps = torch.tensor(told, dtype=dtype, device=device)
        self._reset()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """x as the network wants to see it."""
        self._scaled = True
        if self.schedule.process != "edm":
            return sample
        return sample * self.schedule.network_input(self._level(timestep))

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: Any = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """One move. Stochastic samplers take the seed of each row from `generator`.

        generator: one per image (row b has its seed), or one for all (row b has its seed + b).
        Raises ValueError for a timestep that is not the next one of the grid, for eta, which is a
        setting of the sampler here, and for a pipeline that is not made for levels of this kind.
        """
        self._refuse(eta, use_clipped_model_output, return_dict)
        index = self._first(timestep) if self._index is None else self._index
        if index >= len(self._spans) or float(timestep) != self._told[index]:
            raise ValueError(
                f"Timestep {float(timestep):g} is not the next one of this run; "
                "call set_timesteps before every run."
            )
        span = self._spans[index]
        x = self._precise(sample)
        base = self.config["base"]
        pred = self.schedule.predict(x, model_output, span.now)
        pred = clipped(pred, x, base, str(base.get("_class_name", "")))
        move = self.method.step(x, pred, span, self._state)
        mean = Lin.of(move.mean)
        if move.std != 0:
            self._seeds = self._seeds or _seeds(generator, len(x))
            mean = mean + move.std * Lin.of(Noise(self._seeds).draw(index, x))
        x, self._state = settle((mean, move.state))
        if index == len(self._spans) - 1:
            x = settle(self.method.finish(x, self._state))
        self._index, self._x = index + 1, x
        out = x.to(sample.dtype)
        return SchedulerOutput(prev_sample=out) if return_dict else (out,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha·x0 + sigma·noise, each row at its timestep: where image-to-image starts."""
        levels = [self._level(t) for t in timesteps.reshape(-1)]
        shape = (-1, *(1,) * (original_samples.ndim - 1))
        alpha, sigma = (
            torch.tensor([getattr(level, k) for level in levels]).view(shape).to(original_samples)
            for k in ("alpha", "sigma")
        )
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` under the name that flow-matching pipelines use."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return self.schedule.train_steps

    def _refuse(self, eta: float, recomputed: bool | None, return_dict: bool) -> None:
        """Flow-matching pipelines give a velocity and never ask for a scaled input."""
        if eta or recomputed:
            raise ValueError(
                "eta is a setting of the sampler here: "
                "sampler.scheduler({'name': 'ddim', 'eta': 1}, pipe.scheduler)."
            )
        if self.schedule.process != "flow" and not self._scaled and not return_dict:
            raise ValueError(
                "This pipeline does not call scale_model_input, so it is made for flow matching or "
                f"for its own steps, and the replaced scheduler is of {self.schedule.process} "
                "levels; start from the scheduler that the pipeline came with."
            )

    def _reset(self) -> None:
        self._scaled = False
        self._index: int | None = None
        self._begin: int | None = None
        self._state: Any = ()
        self._x: Tensor | None = None
        self._seeds: tuple[int, ...] = ()

    @property
    def _told(self) -> list[float]:
        return self.timesteps.tolist()

    def _first(self, timestep: Any) -> int:
        if self._begin is not None:
            return self._begin
        told = self._told
        return told.index(float(timestep)) if float(timestep) in told else len(told)

    def _level(self, timestep: Any) -> Level:
        """The level of a timestep, of this run's grid where it is on it."""
        t = float(timestep)
        for span, told in zip(self._spans, self._told, strict=False):
            if told == t:
                return span.now
        return self.schedule.level(int(t) if t.is_integer() else t)

    def _precise(self, sample: Tensor) -> Tensor:
        """float32 or float64: what the last step left, unless the pipeline changed it since."""
        if sample.dtype in (torch.float32, torch.float64):
            return sample
        if self._x is not None and torch.equal(self._x.to(sample.dtype), sample):
            return self._x
        return sample.float()


def _seeds(generator: Any, rows: int) -> tuple[int, ...]:
    if isinstance(generator, (list, tuple)):
        return tuple(g.initial_seed() for g in generator)
    first = torch.initial_seed() if generator is None else generator.initial_seed()
    return tuple((first + b) % 2**63 for b in range(rows))
