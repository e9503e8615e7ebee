"""Forward process of a model, x_t = alpha·x0 + sigma·eps, and the grids of its levels.

Betas, timesteps, log-SNR and flow times occur here and in `grids.py` only. A Schedule is read from
the configuration of a diffusers scheduler, so that a model is sampled on the levels it was trained
with; the scheduler itself is not used.

    vp     alpha = sqrt(acp_t), sigma = sqrt(1 − acp_t), t an index of the training table
    edm    alpha = 1, sigma on Karras' ramp, network input t = ln(sigma)/4
    flow   alpha = 1 − sigma, network input t = N·sigma

The vp table is float32, as in training and in the stock schedulers.

Deviations from the stock schedulers:
- A step goes to the next level of the grid. Stock DDIM goes to t − N//n instead, which differs from
  the level it evaluates next wherever n does not divide N ("trailing") and with "linspace". On
  "leading" grids the two are the same.
- Dynamic thresholding of x0 (`thresholding`), for pixel models, is not implemented.
- The timestep of UniPC and DPM-Solver flow configurations is N·sigma itself, not rounded down.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from sampler_kernels import Lin
from torch import Tensor

from sampler.core import grids, spacings
from sampler.core.grids import dynamic_mu
from sampler.core.schedulers import SCHEDULERS
from sampler.registry.constraints import as_int
from sampler.types import Level, Prediction

Spacing = Literal["leading", "trailing", "linspace", "karras"]
Final = Literal["zero", "sigma_min"]
PLAIN = ("leading", "trailing", "linspace")
SPACINGS = ("leading", "trailing", "linspace", "karras")
MAX_STEPS = 1000

_KIND_OF = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "velocity"}
# Stock schedulers that spread n + 1 points and drop the last.
_OPEN_END = ("DPMSolver", "UniPC", "DEIS", "SASolver")
# Stock schedulers that work in units of sigma/alpha, with fractional timesteps.
_SIGMA_UNITS = ("Euler", "Heun", "LMS", "KDPM2")
# Stock schedulers that end at the least noise of the grid and have no option for it.
_FINAL_SIGMA_MIN = ("DEIS", "SASolver")
# Settings that change the levels in unsupported ways: {name: harmless values}.
_UNKNOWN: dict[str, tuple[Any, ...]] = {
    "use_lu_lambdas": (False,),
    "trained_betas": (),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "lambda_min_clipped": (-math.inf,),
    "invert_sigmas": (False,),
    "sigma_schedule": ("karras",),
    "scale_factors": (),
}
# Settings of pixel models and of stochastic solvers that this project does not apply.
_WITHOUT_EFFECT = ("thresholding", "stochastic_sampling")


@dataclass(frozen=True)
class Schedule:
    """Noise levels of a model, built with `from_config`, `vp`, `edm` or `flow`.

    process: forward process. prediction: network output, "eps", "v", "x0" or "velocity".
    train_steps: N, the number of training timesteps; table: acp_t [N] for vp.
    spacing, karras, final: the defaults of `grid`. offset: added to the timesteps of "leading".
    open_end: spread one point more and drop the last. from_zero: spread flow times over
    0..1 − 1/N instead of 1/N..1. sigma_units: work in sigma/alpha, with
    fractional timesteps, as Euler schedulers do. round_karras: round timesteps on Karras' ramp to
    integers.
    sigma_min, sigma_max, rho: ends of Karras' ramp (None: those of the table) and its exponent.
    sigma_data: standard deviation of the data, for the preconditioning in `predict`.
    shift, terminal: of flow times, see `grids.FlowSpread`; dynamic: configuration of a shift that
    follows the image size, None for a static one.
    origin: number of timesteps that a latent consistency model was distilled on, 0 for other
    models. timestep_scaling: s = timestep_scaling·t in its boundary factors, see `predict`.
    ramp: "exponential" or "beta_sigmas" as the default of `grid`, "karras" on flow models.
    """

    process: Literal["vp", "edm", "flow", "consistency"]
    prediction: str
    table: tuple[float, ...] = ()
    train_steps: int = 1000
    spacing: Spacing = "leading"
    karras: bool = False
    final: Final = "zero"
    offset: int = 0
    open_end: bool = False
    from_zero: bool = False
    sigma_units: bool = False
    round_karras: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    sigma_data: float = 0.5
    rho: float = 7.0
    shift: float = 1.0
    terminal: float | None = None
    dynamic: Mapping[str, Any] | None = None
    origin: int = 0
    timestep_scaling: float = 10.0
    ramp: str | None = None

    @staticmethod
    def from_config(config: Mapping[str, Any], scheduler: str = "") -> Schedule:
        """Read a diffusers scheduler's config and class name.

        Raises ValueError for a scheduler or a setting whose levels are not supported.
        """
        if isinstance(config.get("base"), Mapping):  # our drop-in
            return Schedule.from_config(config["base"])
        name = scheduler or str(config.get("_class_name", ""))
        if name and name not in SCHEDULERS:
            raise ValueError(
                f"The levels of {name} are not known; use one of {', '.join(SCHEDULERS)}."
            )
        for key in _WITHOUT_EFFECT:
            if config.get(key):
                warnings.warn(f"{name}: {key} = True has no effect here.", stacklevel=2)
        for key, harmless in _UNKNOWN.items():
            value = config.get(key)
            # A config that went through JSON may hold -inf as the text "-inf".
            if value is not None and value not in harmless and str(value) != "-inf":
                raise ValueError(
                    f"{name}: {key} = {value!r:.40} is not supported; "
                    "use a scheduler configuration without it."
                )
        if name.startswith("EDM"):
            return Schedule.edm(config)
        flow = config.get("prediction_type") == "flow_prediction"
        if config.get("use_flow_sigmas", flow) != flow:
            raise ValueError(
                f"{name}: prediction_type = 'flow_prediction' and use_flow_sigmas = True go "
                "together; set both or none."
            )
        if flow or "FlowMatch" in name:
            return Schedule.flow(config, name)
        if config.get("prediction_type", "epsilon") not in _KIND_OF or "beta_start" not in config:
            raise ValueError(
                f"The levels of {name or 'this scheduler'} are not known; use a DDIM, "
                "Euler, DPM-Solver, UniPC, PNDM, EDM or FlowMatch configuration."
            )
        return Schedule.vp(config, name)

    @staticmethod
    def vp(config: Mapping[str, Any], name: str = "DDIMScheduler") -> Schedule:
        """Build a variance-preserving discrete schedule from its betas."""
        sigma_units, open_end = name.startswith(_SIGMA_UNITS), name.startswith(_OPEN_END)
        table = grids.alphas_cumprod(config)
        if config.get("rescale_betas_zero_snr") and (sigma_units or open_end):
            table[-1] = 2.0**-24  # as in those schedulers, to keep sigma/alpha finite
        if "set_alpha_to_one" in config:
            final = "zero" if config["set_alpha_to_one"] else "sigma_min"
        elif name.startswith(_FINAL_SIGMA_MIN):
            final = "sigma_min"
        else:
            final = config.get("final_sigmas_type", "zero")
        single = name.startswith("DPMSolverSinglestep")  # it has no timestep_spacing
        lcm = name.startswith("LCM")
        cosine = config.get("beta_schedule") == "squaredcos_cap_v2"
        return Schedule(
            process="vp",
            prediction=_KIND_OF[config.get("prediction_type", "epsilon")],
            table=tuple(grids.floats(table)),
            train_steps=len(table),
            spacing=config.get("timestep_spacing", "linspace" if single else "leading"),
            karras=bool(config.get("use_karras_sigmas")),
            final="zero" if lcm else final,
            offset=int(config.get("steps_offset", 0)),
            open_end=open_end,
            origin=int(config.get("original_inference_steps", 50)) if lcm else 0,
            timestep_scaling=float(config.get("timestep_scaling", 10.0)),
            sigma_units=sigma_units,
            round_karras=open_end and not (cosine and name.startswith("DPMSolver")),
            sigma_min=config.get("sigma_min") if sigma_units else None,
            sigma_max=config.get("sigma_max") if sigma_units else None,
            ramp=_ramp_of(config),
        )

    @staticmethod
    def edm(config: Mapping[str, Any]) -> Schedule:
        """Build Karras' schedule; the network's output is preconditioned with sigma_data."""
        return Schedule(
            process="edm",
            prediction=_KIND_OF[config.get("prediction_type", "epsilon")],
            spacing="karras",
            final=config.get("final_sigmas_type", "zero"),
            sigma_min=config.get("sigma_min", 0.002),
            sigma_max=config.get("sigma_max", 80.0),
            sigma_data=config.get("sigma_data", 0.5),
            rho=config.get("rho", 7.0),
        )

    @staticmethod
    def flow(config: Mapping[str, Any], name: str = "FlowMatchEulerDiscreteScheduler") -> Schedule:
        """Build a flow-matching schedule; its shift is static or follows the image size (`mu`).

        Raises ValueError for a ramp over flow times in schedulers that shift it once more.
        """
        ramp = "karras" if config.get("use_karras_sigmas") else _ramp_of(config)
        if ramp is not None and "FlowMatchEuler" not in name:
            raise ValueError(
                f"{name}: use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas are not "
                "supported for flow matching here; use grid = 'karras', 'exponential' or "
                "'beta_sigmas'."
            )
        names = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
        wanted = (*names, "time_shift_type")
        dynamic = bool(config.get("use_dynamic_shifting"))
        final = "sigma_min" if name.startswith(_FINAL_SIGMA_MIN) else "zero"
        sigma_min = None
        if name.startswith("DPMSolver"):  # it ends at the least noise of its vp table
            acp = grids.alphas_cumprod(config)[0].item()
            sigma_min = math.sqrt((1 - acp) / acp)
        return Schedule(
            process="flow",
            prediction="velocity",
            spacing="linspace",
            train_steps=int(config.get("num_train_timesteps", 1000)),
            open_end=name.startswith(_OPEN_END),
            from_zero=name.startswith(("DPMSolver", "DEIS", "SASolver")),
            final=config.get("final_sigmas_type", final),
            sigma_min=sigma_min,
            shift=config.get("flow_shift") or config.get("shift") or 1.0,
            terminal=config.get("shift_terminal") or None,
            dynamic={n: config[n] for n in wanted if n in config} if dynamic else None,
            ramp=ramp,
        )

    def level(self, t: float) -> Level:
        """Return the level of timestep t; between integers sigma/alpha is interpolated linearly.

        Raises ValueError for a timestep outside the training table.
        """
        if self.process == "edm":
            return Level(t, 1.0, math.exp(4 * t))
        if self.process == "flow":
            return Level(t, 1 - t / self.train_steps, t / self.train_steps)
        low = math.floor(t)
        if not 0 <= low <= self.train_steps - 1:
            raise ValueError(f"Timestep {t} must lie in 0..{self.train_steps - 1}.")
        if low == t:
            alphas, sigmas = self._roots
            return Level(t, alphas[low], sigmas[low])
        return _from_ratio(t, float(np.interp(t, (low, low + 1), self._ratios()[low : low + 2])))

    def level_of(self, t: float, sigma: float) -> Level:
        """Return the level of a stock scheduler's `sigmas`: sigma of a flow, else sigma/alpha."""
        if self.process == "flow":
            return Level(t, 1 - sigma, sigma)
        return _from_ratio(t, sigma)

    def time_of(self, ratio: float) -> float:
        """Return t of the level with sigma/alpha = ratio, interpolated in ln(ratio) for vp."""
        if self.process == "edm":
            return 0.25 * math.log(ratio)
        if self.process == "flow":
            return self.train_steps * ratio / (1 + ratio)
        known = self._ratios()
        known = known[np.isfinite(known)]
        return float(np.interp(math.log(ratio), np.log(known), np.arange(len(known))))

    def grid(
        self,
        steps: int,
        spacing: Any = None,
        final: Final | None = None,
        mu: float | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> tuple[Level, ...]:
        """Return the steps + 1 levels of a run, noisy first; the last is never evaluated.

        spacing: "leading", "trailing", "linspace", "karras", a name of `spacings`, {"name": ...,
        setting: ...}, `steps` numbers (noise, or timesteps), or {"sigmas" | "timesteps" | "times":
        numbers}: sigma/alpha, on flow models sigma after the shift, times before it. final: "zero"
        (alpha = 1, sigma = 0) or "sigma_min" (the least noise of training; of a flow model that of
        the scheduler, else of the last step); both default to the scheduler's own. mu: shift
        exponent of a flow model with dynamic shifting. sigmas: `steps` flow times before the
        shift, instead of the scheduler's.

        Raises ValueError for steps outside 1..1000 (or more than the training steps), an unknown
        spacing, and a first level without signal under an eps-prediction.
        """
        steps = as_int(steps, "steps")
        one_more = self.open_end and self.process == "vp" and spacing in (None, *PLAIN)
        limit = min(MAX_STEPS, self.train_steps - one_more)
        distilled = self.origin > 0 and spacing is None
        limit = min(limit, self.origin) if distilled else limit
        if not 1 <= steps <= limit:
            raise ValueError(f"steps = {steps} must lie in 1..{limit}.")
        chosen = None
        if not isinstance(spacing, str | None) or spacing not in (None, *SPACINGS):
            chosen = spacings.parsed(spacing)
        elif spacing == "karras" and self.process == "flow":
            chosen = spacings.parsed("karras")
        if final not in (None, "zero", "sigma_min"):
            raise ValueError(f"final = {final!r} must be 'zero' or 'sigma_min'.")
        if sigmas is not None and (self.process != "flow" or len(sigmas) != steps):
            raise ValueError(f"sigmas are {steps} flow times, for flow matching only.")
        if isinstance(chosen, spacings.Calibrated):
            raise ValueError(
                "grid: 'calibrated:...' is looked up for a sampler, steps and a rule, by generate "
                f"and in run folders only; give the grid that {chosen.path} holds."
            )
        if isinstance(chosen, spacings.Listed):
            levels = self._listed_levels(steps, chosen, mu)
        elif chosen is not None:
            found = spacings.places(chosen.name, self._axis(mu), steps, chosen.options)
            levels = self._placed(found)
        elif self.process == "flow":
            levels = self._flow_levels(steps, mu, sigmas)
        elif self.process == "edm":
            levels = [Level(0.25 * math.log(s), 1.0, s) for s in self._ramp(steps, 1.0, 1.0)]
        elif distilled:
            times = grids.consistency_timesteps(steps, self.train_steps, self.origin)
            levels = [self.level(t) for t in times]
        elif spacing == "karras" or (spacing is None and self.karras):
            levels = self._ramp_levels(steps, "karras", as_stock=spacing is None)
        elif spacing is None and self.ramp is not None:
            levels = self._ramp_levels(steps, self.ramp)
        else:
            levels = [self.level(t) for t in self._timesteps(steps, spacing or self.spacing)]
        if levels[0].alpha == 0 and self.prediction == "eps":
            raise ValueError(
                "This grid starts at alpha = 0, where an eps-prediction does not determine x0; "
                "use spacing='leading'."
            )
        return (*levels, self._last(final or self.final, levels[-1]))

    def initial_scale(self, grid: tuple[Level, ...]) -> float:
        """Factor on the first noise: the stock scheduler's `init_noise_sigma`."""
        if self.process == "edm":
            return math.sqrt(grid[0].sigma ** 2 + 1)
        if self.sigma_units and self.spacing in ("linspace", "trailing"):
            return grid[0].sigma
        return 1.0

    def predict(self, x: Tensor, out: Tensor, level: Level) -> Prediction:
        """Interpret the network output [B, ...] at x [B, ...] as a Prediction.

        For "edm": x0 = c_skip·x + c_out·out (Karras et al., 2022, arXiv:2206.00364, table 1). For a
        latent consistency model: f = c_skip·x + c_out·x0, c_skip = d²/(s² + d²), c_out =
        s/sqrt(s² + d²), s = timestep_scaling·t, d = sigma_data (arXiv:2310.04378, section 4.1).
        """
        if self.process != "edm" and not self.origin:
            return Prediction.of(self.prediction, x, out, level)
        s, d = level.sigma, self.sigma_data
        if self.origin:
            s = self.timestep_scaling * level.t
            norm, x0 = s * s + d * d, Prediction.of(self.prediction, x, out, level).x0
            return Prediction.from_x0(x, x0 * (s / norm**0.5) + Lin.of(x) * (d * d / norm), level)
        total = s * s + d * d
        c_out = s * d / total**0.5 * (1 if self.prediction == "eps" else -1)
        return Prediction.from_x0(x, Lin.of(x) * (d * d / total) + Lin.of(out) * c_out, level)

    def output_of(self, x: Tensor, pred: Prediction, level: Level) -> Lin:
        """Network output of a Prediction at x [B, ...]; the inverse of `predict` for "edm"."""
        s, d = level.sigma, self.sigma_data
        total = s * s + d * d
        c_out = s * d / total**0.5 * (1 if self.prediction == "eps" else -1)
        return (pred.x0 - Lin.of(x) * (d * d / total)) / c_out

    def network_input(self, level: Level) -> float:
        """Factor on x before it enters the network; 1 except for "edm"."""
        if self.process != "edm":
            return 1.0
        return 1 / math.sqrt(level.sigma**2 + self.sigma_data**2)

    @cached_property
    def _roots(self) -> tuple[list[float], list[float]]:
        """alpha and sigma of every training timestep.

        By torch's float32 square root, as in the stock schedulers; numpy's differs by one bit.
        """
        acp = torch.tensor(self.table)
        return grids.floats(acp**0.5), grids.floats((1 - acp) ** 0.5)

    def _ratios(self) -> npt.NDArray[np.float64]:
        """sigma/alpha of every training timestep [N], float64; infinite at alpha = 0."""
        acp: Any = np.asarray(self.table, dtype=np.float32)
        with np.errstate(divide="ignore"):
            return np.asarray(np.sqrt((np.float32(1) - acp) / acp), dtype=np.float64)

    def _timesteps(self, steps: int, spacing: str) -> Sequence[float]:
        spacing = "leading" if spacing == "karras" else spacing
        return grids.timesteps(
            steps, self.train_steps, spacing, self.offset, self.open_end, self.sigma_units
        )

    def _ramp(self, steps: int, low: float, high: float, name: str = "karras") -> list[float]:
        low = low if self.sigma_min is None else self.sigma_min
        high = high if self.sigma_max is None else self.sigma_max
        options = spacings.options_of(name, {"rho": self.rho} if name == "karras" else None)
        return spacings.RAMPS[name](low, high, steps, options) if steps > 1 else [high]

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
        return self._placed([spacings.Place(s) for s in sigmas], as_stock)

    def _axis(self, mu: float | None) -> spacings.Axis:
        """The training levels, for named grids."""
        N = self.train_steps
        if self.process == "flow":
            shift = self._shift(mu)

            def shifted(place: float) -> float:
                time = (place + 1) / N
                return shift * time / (1 + (shift - 1) * time)

            table = [shifted(j) for j in range(N)]
            return spacings.Axis(table, shifted, N - 1, N * table[0] - 1, self.prediction)
        if self.process == "edm":
            table = self._ramp(N, 0.002, 80.0)[::-1]
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
        return spacings.Axis(table, between, N - 1, 0, self.prediction, ends)

    def _placed(self, found: Sequence[spacings.Place], as_stock: bool = False) -> list[Level]:
        """Levels of places; times are rounded where they stay distinct, or `as_stock`."""
        if self.process == "flow":
            noise = self._stretched([place.noise for place in found])
            return [self.level_of(self.train_steps * s, s) for s in noise]
        if self.process == "edm":
            return [Level(0.25 * math.log(p.noise), 1.0, p.noise) for p in found]
        times = [self.time_of(p.noise) if p.time is None else p.time for p in found]
        whole = [round(t) for t in times]
        exact = all(t == w for t, w in zip(times, whole, strict=True))
        if exact and found[0].time is not None:
            return [self.level(t) for t in whole]
        distinct = as_stock or len(set(whole)) == len(whole)
        if self.round_karras and found[0].time is None and distinct:
            times = whole
        return [_from_ratio(t, p.noise) for t, p in zip(times, found, strict=True)]

    def _listed_levels(self, steps: int, listed: spacings.Listed, mu: float | None) -> list[Level]:
        """Levels given as numbers; ValueError for another number of them, or one out of range."""
        unit, values = listed
        if len(values) != steps:
            raise ValueError(f"grid: {len(values)} levels are {len(values)} steps, not {steps}.")
        axis = self._axis(mu)
        if unit == "times" and self.process != "flow":
            raise ValueError("grid: 'times' are flow times before the shift; use 'timesteps'.")
        if unit == "times" or (unit == "timesteps" and self.process == "vp"):
            top = 1.0 if unit == "times" else self.train_steps - 1
            if values[0] > top:
                raise ValueError(f"grid: {values[0]:g} must be at most {top:g} here.")
            at = [self.train_steps * v - 1 if unit == "times" else v for v in values]
            return self._placed([spacings.Place(axis.noise(t), t) for t in at])
        if unit == "timesteps":
            values = tuple(self.level(t).sigma for t in values)
        if self.process == "flow" and values[0] > 1:
            raise ValueError(f"grid: sigma = {values[0]:g} of a flow model must be at most 1.")
        return self._placed([spacings.Place(v) for v in values])

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
        )
        times, timesteps = spread.times(steps, sigmas)
        if (
            self.ramp is not None
        ):  # between the ends of the shifted times, as in the stock scheduler
            options = spacings.options_of(self.ramp)
            ramp = spacings.RAMPS[self.ramp]
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
            return Level(0.25 * math.log(low), 1.0, low)
        return self.level(0)


def clipped(pred: Prediction, x: Tensor, config: Mapping[str, Any], scheduler: str) -> Prediction:
    """Clip x0 of a prediction as a DDIM or DDPM scheduler of this configuration does.

    DDIM keeps the direction of the unclipped prediction, DDPM takes that of the clipped one.
    """
    if not config.get("clip_sample"):
        return pred
    reach = config.get("clip_sample_range") or 1.0
    x0 = pred.x0.tensor().clamp(-reach, reach)
    keeps = scheduler.startswith("DDIM")
    return Prediction.from_x0(x, x0, pred.level, eps=pred.eps if keeps else None)


def _ramp_of(config: Mapping[str, Any]) -> str | None:
    """The ramp that a scheduler's configuration asks for beside Karras'."""
    if config.get("use_exponential_sigmas"):
        return "exponential"
    return "beta_sigmas" if config.get("use_beta_sigmas") else None


def _from_ratio(t: float, ratio: float) -> Level:
    """Return the vp level with sigma/alpha = ratio."""
    if math.isinf(ratio):
        return Level(t, 0.0, 1.0)
    alpha = 1 / math.sqrt(1 + ratio * ratio)
    return Level(t, alpha, ratio * alpha)


__all__ = ["SPACINGS", "Final", "Schedule", "Spacing", "clipped", "dynamic_mu"]
