"""The forward process of a model, x_t = alpha·x0 + sigma·eps, and the grids to walk it back.

Betas, timesteps, log-SNR and flow times exist in this file and nowhere else. A Schedule is read
from the configuration of a diffusers scheduler, so that a model is sampled on the levels it was
trained with; the scheduler itself is not used.

    vp     alpha = sqrt(acp_t), sigma = sqrt(1 − acp_t), t an integer index of the training table
    edm    alpha = 1, sigma on Karras' ramp, the network is told t = ln(sigma)/4
    flow   alpha = 1 − sigma, the network is told t = N·sigma

The vp table is kept in float32, as training and the stock schedulers have it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch

from sampler.types import Level, Prediction

Spacing = Literal["leading", "trailing", "linspace", "karras"]
Final = Literal["zero", "sigma_min"]
SPACINGS = ("leading", "trailing", "linspace", "karras")
MAX_STEPS = 1000

_KIND_OF = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "velocity"}
# Stock schedulers that spread n + 1 points and leave the last out.
_OPEN_END = ("DPMSolver", "UniPC", "DEIS", "SASolver", "CogVideoXDPM")
# Stock schedulers that work in units of sigma/alpha, with fractional timesteps.
_SIGMA_UNITS = ("Euler", "Heun", "LMS", "KDPM2")


@dataclass(frozen=True)
class Schedule:
    """The levels of a model. Make one with `from_config`, `vp`, `edm` or `flow`.

    process: "vp", "edm" or "flow"; prediction: what the network's output is ("eps", "v", "x0",
    "velocity"); table: acp_t [N] for vp; spacing, final: the defaults of `grid`.
    """

    process: Literal["vp", "edm", "flow"]
    prediction: str
    table: tuple[float, ...] = ()
    train_steps: int = 1000
    spacing: Spacing = "leading"
    final: Final = "zero"
    offset: int = 0
    open_end: bool = False
    sigma_units: bool = False
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    rho: float = 7.0
    shift: float = 1.0
    dynamic: Mapping[str, float] | None = field(default=None)

    @staticmethod
    def from_config(config: Mapping[str, Any], scheduler: str = "") -> Schedule:
        """From a diffusers scheduler's config and class name.

        Raises ValueError for a scheduler or a setting whose levels are not known here.
        """
        name = scheduler or str(config.get("_class_name", ""))
        if name.startswith("EDM"):
            return Schedule.edm(config)
        if "FlowMatch" in name or config.get("prediction_type") == "flow_prediction":
            return Schedule.flow(config)
        for bad in ("use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "trained_betas"):
            if config.get(bad) is not None and config.get(bad) is not False:
                raise ValueError(
                    f"{name}: {bad} is not supported; choose spacing='karras' or none."
                )
        if config.get("prediction_type", "epsilon") not in _KIND_OF or "beta_start" not in config:
            raise ValueError(
                f"The levels of {name or 'this scheduler'} are not known; use a DDIM, "
                "Euler, DPM-Solver, UniPC, PNDM, EDM or FlowMatch configuration."
            )
        return Schedule.vp(config, name)

    @staticmethod
    def vp(config: Mapping[str, Any], name: str = "DDIMScheduler") -> Schedule:
        """A variance-preserving discrete schedule, from its betas."""
        sigma_units = name.startswith(_SIGMA_UNITS)
        table = _alphas_cumprod(config)
        if config.get("rescale_betas_zero_snr") and (sigma_units or name.startswith(_OPEN_END)):
            table[-1] = 2.0**-24  # those schedulers avoid an infinite sigma/alpha
        if "set_alpha_to_one" in config:
            final = "zero" if config["set_alpha_to_one"] else "sigma_min"
        else:
            final = config.get("final_sigmas_type", "zero")
        karras = bool(config.get("use_karras_sigmas"))
        return Schedule(
            process="vp",
            prediction=_KIND_OF[config.get("prediction_type", "epsilon")],
            table=tuple(table.tolist()),
            train_steps=len(table),
            spacing="karras" if karras else config.get("timestep_spacing", "leading"),
            final=final,
            offset=int(config.get("steps_offset", 0)),
            open_end=name.startswith(_OPEN_END),
            sigma_units=sigma_units,
        )

    @staticmethod
    def edm(config: Mapping[str, Any]) -> Schedule:
        """Karras' schedule; the network's output is preconditioned with sigma_data."""
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
    def flow(config: Mapping[str, Any]) -> Schedule:
        """Flow matching: a static shift, or one that depends on the image size (`grid(mu=...)`)."""
        names = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
        dynamic = bool(config.get("use_dynamic_shifting"))
        return Schedule(
            process="flow",
            prediction="velocity",
            spacing="linspace",
            train_steps=int(config.get("num_train_timesteps", 1000)),
            shift=config.get("flow_shift") or config.get("shift") or 1.0,
            dynamic={n: config[n] for n in names if n in config} if dynamic else None,
        )

    def level(self, t: float) -> Level:
        """The level of timestep t; between two integers sigma/alpha is interpolated linearly."""
        if self.process == "edm":
            return Level(t, 1.0, math.exp(4 * t))
        if self.process == "flow":
            return Level(t, 1 - t / self.train_steps, t / self.train_steps)
        low = math.floor(t)
        if not 0 <= low <= self.train_steps - 1:
            raise ValueError(f"Timestep {t} must lie in 0..{self.train_steps - 1}.")
        if low == t:
            acp = np.float32(self.table[low])
            return Level(t, math.sqrt(acp), math.sqrt(np.float32(1) - acp))
        return _from_ratio(t, float(np.interp(t, (low, low + 1), self._ratios()[low : low + 2])))

    def grid(
        self,
        steps: int,
        spacing: Spacing | None = None,
        final: Final | None = None,
        mu: float | None = None,
    ) -> tuple[Level, ...]:
        """The steps + 1 levels of a run, noisy first; the last is a target, never evaluated.

        spacing: "leading", "trailing", "linspace" or "karras"; final: "zero" (alpha = 1,
        sigma = 0) or "sigma_min" (the least noise of training); both default to the scheduler's
        own. mu: the shift exponent of a flow model with dynamic shifting.

        Raises ValueError for steps outside 1..1000 (or more than the training steps), an unknown
        spacing, and a first level without signal under an eps-prediction.
        """
        if not 1 <= steps <= min(MAX_STEPS, self.train_steps):
            limit = min(MAX_STEPS, self.train_steps)
            raise ValueError(f"steps = {steps} must lie in 1..{limit}.")
        spacing = spacing or self.spacing
        if spacing not in SPACINGS:
            raise ValueError(f"spacing = {spacing!r} must be one of {', '.join(SPACINGS)}.")
        if final not in (None, "zero", "sigma_min"):
            raise ValueError(f"final = {final!r} must be 'zero' or 'sigma_min'.")
        if self.process == "flow":
            levels = self._flow_levels(steps, mu)
        elif self.process == "edm":
            levels = [
                Level(0.25 * math.log(s), 1.0, s)
                for s in _karras(self.sigma_min, self.sigma_max, steps, self.rho)
            ]
        elif spacing == "karras":
            levels = self._karras_levels(steps)
        else:
            levels = [self.level(t) for t in self._timesteps(steps, spacing)]
        if levels[0].alpha == 0 and self.prediction == "eps":
            raise ValueError(
                "This grid starts at alpha = 0, where an eps-prediction says nothing about x0; "
                "use spacing='leading'."
            )
        return (*levels, self._last(final or self.final))

    def initial_scale(self, grid: tuple[Level, ...]) -> float:
        """What the first noise is multiplied with: the stock scheduler's `init_noise_sigma`."""
        if self.process == "edm":
            return math.sqrt(grid[0].sigma ** 2 + 1)
        if self.sigma_units and self.spacing in ("linspace", "trailing"):
            return grid[0].sigma
        return 1.0

    def predict(self, x: Any, out: Any, level: Level) -> Prediction:
        """The network output [B, ...] as a Prediction at x [B, ...].

        For "edm": x0 = c_skip·x + c_out·out (Karras et al., 2022, arXiv:2206.00364, table 1).
        """
        if self.process != "edm":
            return Prediction.of(self.prediction, x, out, level)
        from sampler_kernels import Lin

        s, d = level.sigma, self.sigma_data
        total = s * s + d * d
        c_out = s * d / total**0.5 * (1 if self.prediction == "eps" else -1)
        return Prediction.from_x0(x, Lin.of(x) * (d * d / total) + Lin.of(out) * c_out, level)

    def network_input(self, level: Level) -> float:
        """What x is multiplied with before the network sees it; 1 except for "edm"."""
        if self.process != "edm":
            return 1.0
        return 1 / math.sqrt(level.sigma**2 + self.sigma_data**2)

    def with_defaults(self, spacing: Spacing | None, final: Final | None) -> Schedule:
        """The same process with other defaults for `grid`."""
        return replace(self, spacing=spacing or self.spacing, final=final or self.final)

    def _ratios(self) -> Any:
        """sigma/alpha of every training timestep [N], float64; infinite at alpha = 0."""
        acp = np.asarray(self.table, dtype=np.float32)
        with np.errstate(divide="ignore"):
            return np.sqrt((np.float32(1) - acp) / acp).astype(np.float64)

    def _timesteps(self, steps: int, spacing: str) -> Sequence[float]:
        count = self.train_steps
        if spacing == "trailing":
            return [round(count - i * count / steps) - 1 for i in range(steps)]
        points = steps + 1 if self.open_end else steps
        if spacing == "leading":
            ratio = count // points
            times = [i * ratio + self.offset for i in range(points)]
        else:
            times = np.linspace(0, count - 1, points).tolist()
            if not self.sigma_units:
                times = np.round(times).astype(int).tolist()
        times = [min(t, count - 1) for t in times[points - steps :]]
        return times[::-1]

    def _karras_levels(self, steps: int) -> list[Level]:
        """Karras' ramp between the ends of the table; t by interpolation in log(sigma/alpha)."""
        ratios = self._ratios()
        ratios = ratios[np.isfinite(ratios)]
        sigmas = _karras(float(ratios[0]), float(ratios[-1]), steps, self.rho)
        times = np.interp(np.log(sigmas), np.log(ratios), np.arange(len(ratios)))
        return [_from_ratio(t, s) for t, s in zip(times.tolist(), sigmas, strict=True)]

    def _flow_levels(self, steps: int, mu: float | None) -> list[Level]:
        n = self.train_steps
        if self.dynamic is not None:
            if mu is None:
                raise ValueError("This flow model shifts its grid by the image size: give mu.")
            ends, shift = (1.0, 1 / n), math.exp(mu)
        else:
            ends, shift = (1.0, _shifted(1 / n, self.shift)), self.shift
        sigmas = [_shifted(s, shift) for s in np.linspace(*ends, steps).tolist()]
        return [Level(s * n, 1 - s, s) for s in sigmas]

    def _last(self, final: str) -> Level:
        if final == "zero" or self.process == "flow":
            return Level(0, 1.0, 0.0)
        if self.process == "edm":
            return Level(0.25 * math.log(self.sigma_min), 1.0, self.sigma_min)
        return self.level(0)


def dynamic_mu(tokens: int, config: Mapping[str, float], max_shift: float = 1.15) -> float:
    """The shift exponent of a flow model for an image of `tokens` latent tokens.

    Linear in tokens through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift).
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    gain = (top - base) / (high - low)
    return tokens * gain + (base - gain * low)


def _alphas_cumprod(config: Mapping[str, Any]) -> torch.Tensor:
    """acp [N] in float32, by the operations of the stock schedulers so that it rounds as theirs."""
    start, end = config["beta_start"], config["beta_end"]
    count = int(config.get("num_train_timesteps", 1000))
    kind = config.get("beta_schedule", "linear")
    if kind == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float32)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    elif kind == "squaredcos_cap_v2":
        bar = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        betas = torch.tensor([min(1 - b / a, 0.999) for a, b in pairwise(bar)])
    else:
        raise ValueError(f"beta_schedule = {kind!r} is not supported; use scaled_linear or linear.")
    if config.get("rescale_betas_zero_snr"):
        root = torch.cumprod(1 - betas, 0).sqrt()
        first, last = root[0].clone(), root[-1].clone()
        bar = ((root - last) * (first / (first - last))) ** 2
        betas = 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])
    return torch.cumprod(1 - betas, 0)


def _karras(low: float, high: float, steps: int, rho: float) -> list[float]:
    """Karras et al. (2022), arXiv:2206.00364, eq. 5: from high to low, steps points."""
    a, b = high ** (1 / rho), low ** (1 / rho)
    return [(a + u * (b - a)) ** rho for u in np.linspace(0, 1, steps).tolist()]


def _from_ratio(t: float, ratio: float) -> Level:
    """The vp level with sigma/alpha = ratio."""
    if math.isinf(ratio):
        return Level(t, 0.0, 1.0)
    alpha = 1 / math.sqrt(1 + ratio * ratio)
    return Level(t, alpha, ratio * alpha)


def _shifted(sigma: float, shift: float) -> float:
    """Esser et al. (2024), arXiv:2403.03206, eq. 23."""
    return shift * sigma / (1 + (shift - 1) * sigma)
