"""Grids of a run: the levels of a forward process that a number of steps walks.

Deviations from the stock schedulers:
- A step goes to the next level of the grid. Stock DDIM goes to t − N//n instead, which differs from
  the level it evaluates next wherever n does not divide N ("trailing") and with "linspace". On
  "leading" grids the two are the same.
- The timestep of UniPC and DPM-Solver flow configurations is N·sigma itself, not rounded down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sampler.core import grids, named_grids, spacings
from sampler.core.noise_levels import Final, NoiseLevels, from_ratio
from sampler.core.ramps import RAMPS
from sampler.registry.constraints import as_int
from sampler.types import Level

PLAIN = ("leading", "trailing", "linspace")
SPACINGS = ("leading", "trailing", "linspace", "karras")
MAX_STEPS = 1000


class LevelGrids(NoiseLevels):
    """Noise levels with the grids of runs over them."""

    def grid(
        self,
        steps: int,
        spacing: Any = None,
        final: Final | None = None,
        mu: float | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> tuple[Level, ...]:
        """Return the steps + 1 levels of a run, noisy first; the last is never evaluated.

        spacing: "leading", "trailing" or "linspace" (over training timesteps), "karras", a name of
        `spacings`, {"name": ..., setting: ...}, `steps` numbers (noise, or timesteps), or {"sigmas"
        | "timesteps" | "times": numbers}: sigma/alpha, on flow models sigma after the shift, times
        before it; the scheduler's own by default. final: "zero"
        (alpha = 1, sigma = 0) or "sigma_min" (the least noise of training; of a flow model that of
        the scheduler, else of the last step); both default to the scheduler's own. mu: shift
        exponent of a flow model with dynamic shifting. sigmas: `steps` flow times before the
        shift, instead of the scheduler's.

        Raises ValueError for steps outside 1..1000 (or more than the training steps), an unknown
        spacing, one over training timesteps that the model does not have, one beside `sigmas`, and
        a first level without signal under an eps-prediction.
        """
        steps = as_int(steps, "steps")
        if spacing in PLAIN and (self.process != "vp" or self.clock is not None):
            raise ValueError(
                f"grid: {spacing!r} counts the training timesteps of a discrete model, which this "
                "one does not have; give 'karras', another grid, or none for the scheduler's own."
            )
        if spacing is not None and sigmas is not None:
            raise ValueError("grid: give either a spacing or sigmas.")
        one_more = self.open_end and self.process == "vp" and spacing in (None, *PLAIN)
        continuous = self.process == "flow" and self.train_steps == 1  # times in 0..1
        limit = MAX_STEPS if continuous else min(MAX_STEPS, self.train_steps - one_more)
        if self.origin > 0 and spacing is None:
            limit = min(limit, self.origin)
        if not 1 <= steps <= limit:
            raise ValueError(f"steps = {steps} must lie in 1..{limit}.")
        if final not in (None, "zero", "sigma_min"):
            raise ValueError(f"final = {final!r} must be 'zero' or 'sigma_min'.")
        if sigmas is not None and (self.process != "flow" or len(sigmas) != steps):
            raise ValueError(f"sigmas are {steps} flow times, for flow matching only.")
        own = spacing is None or (isinstance(spacing, str) and spacing in SPACINGS)
        if own and (spacing != "karras" or self.process != "flow"):
            levels = self._own_levels(steps, spacing, mu, sigmas)
        else:
            levels = self._requested_levels(steps, spacing, mu)
        if levels[0].alpha == 0 and self.prediction == "eps":
            raise ValueError(
                "This grid starts at alpha = 0, where an eps-prediction does not determine x0; "
                "use spacing='leading'."
            )
        return (*levels, self._last(final or self.final, levels[-1]))

    def _requested_levels(self, steps: int, spacing: Any, mu: float | None) -> list[Level]:
        """Levels of a grid by name, or of the levels that it lists."""
        spec = spacings.parsed(spacing)
        if isinstance(spec, spacings.Calibrated):
            raise ValueError(
                "grid: 'calibrated:...' is looked up for a sampler, steps and a rule, by generate "
                f"and in run folders only; give the grid that {spec.path} holds."
            )
        if isinstance(spec, spacings.Listed):
            return self._listed_levels(steps, spec, mu)
        return self._placed(named_grids.places(spec.name, self._axis(mu), steps, spec.options))

    def _own_levels(
        self, steps: int, spacing: str | None, mu: float | None, sigmas: Sequence[float] | None
    ) -> list[Level]:
        """Levels as the model's scheduler spaces them, or by one of SPACINGS."""
        if self.process == "flow":
            return self._flow_levels(steps, mu, sigmas)
        if self.process == "edm":
            ramp = "karras" if spacing == "karras" else self.ramp or "karras"
            return [Level(self.time_of(s), 1.0, s) for s in self._ramp(steps, 1.0, 1.0, ramp)]
        if self.clock is not None and spacing != "karras":
            return [self.level(t) for t in self.clock.times(steps)]
        if self.origin > 0 and spacing is None:
            times = grids.consistency_timesteps(steps, self.train_steps, self.origin)
            return [self.level(t) for t in times]
        if spacing == "karras" or (spacing is None and self.karras):
            return self._ramp_levels(steps, "karras", as_stock=spacing is None)
        if spacing is None and self.ramp is not None:
            return self._ramp_levels(steps, self.ramp)
        return [self.level(t) for t in self._timesteps(steps, spacing or self.spacing)]

    def _timesteps(self, steps: int, spacing: str) -> Sequence[float]:
        spacing = "leading" if spacing == "karras" else spacing
        return grids.timesteps(
            steps, self.train_steps, spacing, self.offset, self.open_end, self.sigma_units
        )

    def _ramp(self, steps: int, low: float, high: float, name: str) -> list[float]:
        low = low if self.sigma_min is None else self.sigma_min
        high = high if self.sigma_max is None else self.sigma_max
        options = spacings.options_of(name, {"rho": self.rho} if name == "karras" else None)
        return RAMPS[name](low, high, steps, options) if steps > 1 else [high]

    def _ramp_levels(self, steps: int, name: str, as_stock: bool = False) -> list[Level]:
        """A ramp of sigma/alpha; t by interpolation in log(sigma/alpha).

        Its ends are those of the table or, for Euler schedulers, of the plain grid's levels.
        as_stock: times are rounded even where that repeats one.
        """
        ratios = self._ratios()
        known = ratios[np.isfinite(ratios)]
        ends = (float(known[0]), float(known[-1]))
        if self.sigma_units:
            times = self._timesteps(steps, self.spacing)
            index = np.arange(len(ratios))
            noisy, clean = (float(np.interp(times[i], index, ratios)) for i in (0, -1))
            ends = (clean, min(noisy, float(known[-1])))
        sigmas = self._ramp(steps, *ends, name)
        return self._placed([named_grids.Place(s) for s in sigmas], as_stock)

    def _axis(self, mu: float | None) -> named_grids.TrainingLevels:
        """The training levels, for named grids."""
        N = self.train_steps
        if self.process == "flow":
            shift = self._shift(mu)

            def shifted(place: float) -> float:
                time = (place + 1) / N
                return shift * time / (1 + (shift - 1) * time)

            table = [shifted(j) for j in range(N)]
            return named_grids.TrainingLevels(
                table, shifted, N - 1, N * table[0] - 1, self.prediction
            )
        if self.process == "edm":
            table = self._ramp(N, 0.002, 80.0, self.ramp or "karras")[::-1]
        else:
            table = self._ratios().tolist()
        logs = np.log(table)

        def between(place: float) -> float:
            low = math.floor(place)
            if low == place:
                return table[low]
            if math.isinf(table[low + 1]):  # alpha falls to 0 along a line
                alpha = (low + 1 - place) / math.sqrt(1 + table[low] ** 2)
                return math.sqrt(1 - alpha * alpha) / alpha
            return math.exp(logs[low] + (place - low) * (logs[low + 1] - logs[low]))

        ends = (self.sigma_min, self.sigma_max)
        return named_grids.TrainingLevels(table, between, N - 1, 0, self.prediction, ends)

    def _placed(self, found: Sequence[named_grids.Place], as_stock: bool = False) -> list[Level]:
        """Levels of places; times are rounded where they stay distinct, or `as_stock`."""
        if self.process == "flow":
            noise = self._stretched([place.noise for place in found])
            return [self.level_of(self.train_steps * s, s) for s in noise]
        if self.process == "edm":
            return [Level(self.time_of(p.noise), 1.0, p.noise) for p in found]
        if self.clock is not None:
            return [from_ratio(self.time_of(p.noise), p.noise) for p in found]
        times = [self.time_of(p.noise) if p.time is None else p.time for p in found]
        whole = [round(t) for t in times]
        exact = all(t == w for t, w in zip(times, whole, strict=True))
        if exact and found[0].time is not None:
            return [self.level(t) for t in whole]
        distinct = as_stock or len(set(whole)) == len(whole)
        if self.round_karras and found[0].time is None and distinct:
            times = whole
        return [from_ratio(t, p.noise) for t, p in zip(times, found, strict=True)]

    def _listed_levels(self, steps: int, listed: spacings.Listed, mu: float | None) -> list[Level]:
        """Levels given as numbers; ValueError for another number of them, or one out of range."""
        unit, values = listed
        if len(values) != steps:
            raise ValueError(f"grid: {len(values)} levels are {len(values)} steps, not {steps}.")
        axis = self._axis(mu)
        if unit == "times" and self.process != "flow":
            raise ValueError("grid: 'times' are flow times before the shift; use 'timesteps'.")
        if unit == "timesteps" and self.clock is not None:
            return [self.level(t) for t in values]
        if unit == "times" or (unit == "timesteps" and self.process == "vp"):
            top = 1.0 if unit == "times" else self.train_steps - 1
            if values[0] > top:
                raise ValueError(f"grid: {values[0]:g} must be at most {top:g} here.")
            at = [self.train_steps * v - 1 if unit == "times" else v for v in values]
            return self._placed([named_grids.Place(axis.noise(t), t) for t in at])
        if unit == "timesteps":
            values = tuple(self.level(t).sigma for t in values)
        if self.process == "flow" and values[0] > 1:
            raise ValueError(f"grid: sigma = {values[0]:g} of a flow model must be at most 1.")
        return self._placed([named_grids.Place(v) for v in values])

    def _stretched(self, sigmas: list[float]) -> list[float]:
        if self.terminal is None or sigmas[-1] >= 1:
            return sigmas
        factor = (1 - self.terminal) / (1 - sigmas[-1])
        return [1 - (1 - s) * factor for s in sigmas]

    def _shift(self, mu: float | None) -> float:
        """Shift of the flow times. Raises ValueError for a dynamic one without `mu`."""
        if self.dynamic is None:
            return self.shift
        if mu is None:
            raise ValueError("This flow model shifts its grid by the image size: give mu.")
        return mu if self.dynamic.get("time_shift_type") == "linear" else math.exp(mu)

    def _flow_levels(
        self, steps: int, mu: float | None, sigmas: Sequence[float] | None
    ) -> list[Level]:
        spread = grids.FlowSpread(
            self.train_steps,
            self._shift(mu),
            self.dynamic is None,
            self.open_end,
            self.from_zero,
            self.terminal,
            self.to_zero,
        )
        times, timesteps = spread.times(steps, sigmas)
        if self.ramp is not None:  # between the ends of the shifted times, as in stock schedulers
            options = spacings.options_of(self.ramp)
            ramp = RAMPS[self.ramp]
            times = ramp(times[-1], times[0], steps, options) if steps > 1 else times
            timesteps = [self.train_steps * s for s in times]
        return [self.level_of(t, s) for t, s in zip(timesteps, times, strict=True)]

    def _last(self, final: str, evaluated: Level) -> Level:
        if final == "zero":
            return Level(0, 1.0, 0.0)
        if self.process == "flow":
            s = evaluated.sigma if self.sigma_min is None else self.sigma_min
            return self.level_of(self.train_steps * s, s)
        if self.process == "edm":
            low = self.sigma_min or 0.002
            return Level(self.time_of(low), 1.0, low)
        return self.level(0)
