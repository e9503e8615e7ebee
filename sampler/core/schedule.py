"""Schedules: noise levels of a model and grids of its runs, read from a scheduler's configuration.

Betas, timesteps, log-SNR and flow times occur in this module, `noise_levels.py`, `level_grids.py`,
`grids.py`, `spacings.py` and `ramps.py` only. A Schedule is read from the configuration of a
diffusers scheduler, so that a model is sampled on the levels it was trained with; the scheduler
itself is not used. Dynamic thresholding of x0 (`thresholding`), for pixel models, is not
implemented.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor

from sampler.core import grids
from sampler.core.clocks import clock_of
from sampler.core.edm_settings import edm_settings
from sampler.core.grids import dynamic_mu
from sampler.core.level_grids import SPACINGS, LevelGrids
from sampler.core.noise_levels import Final, Spacing
from sampler.core.schedulers import SCHEDULERS, WITHOUT_LEVELS
from sampler.types import Prediction

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
    "stages": (1,),
    "lambda_min_clipped": (-math.inf,),
    "invert_sigmas": (False,),
    "scale_factors": (),
}
_UNCLIP = {"beta_start": 0.0, "beta_end": 0.0, "beta_schedule": "squaredcos_cap_v2",
           "timestep_spacing": "linspace"}  # fmt: skip
# Settings of pixel models and of stochastic solvers that this project does not apply.
_WITHOUT_EFFECT = ("thresholding", "stochastic_sampling")


class Schedule(LevelGrids):
    """Noise levels of a model, built with `from_config`, `vp`, `edm` or `flow`.

    The fields are those of `NoiseLevels`.
    """

    @staticmethod
    def from_config(config: Mapping[str, Any], scheduler: str = "") -> Schedule:
        """Read a diffusers scheduler's config and class name.

        Raises ValueError for a scheduler or a setting whose levels are not supported.
        """
        if isinstance(config.get("base"), Mapping):  # our drop-in
            return Schedule.from_config(config["base"])
        name = scheduler or str(config.get("_class_name", ""))
        if name and name not in SCHEDULERS:
            why = WITHOUT_LEVELS.get(name)
            raise ValueError(
                f"{name} has no levels that a sampler could step on: {why}."
                if why
                else f"The levels of {name} are not known; use one of {', '.join(SCHEDULERS)}."
            )
        if config.get("timestep_type") == "continuous" and config.get("use_karras_sigmas"):
            return Schedule.continuous(config, name)
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
        if SCHEDULERS.get(name) == "edm":
            return Schedule.edm(config, name)
        if name == "HeliosScheduler" and config.get("shift", 1.0) != 1:
            raise ValueError(f"{name}: shift = {config['shift']} is not supported; use 1, with mu.")
        flow = config.get("prediction_type") == "flow_prediction"
        if config.get("use_flow_sigmas", flow) != flow:
            raise ValueError(
                f"{name}: prediction_type = 'flow_prediction' and use_flow_sigmas = True go "
                "together; set both or none."
            )
        if flow or "FlowM" in name:
            return Schedule.flow(config, name)
        if clock := clock_of(name, config):
            eps = name == "DDPMWuerstchenScheduler"
            return Schedule(
                process="vp",
                prediction="eps" if eps else "v",
                train_steps=int(config.get("num_train_timesteps", 1000)),
                final="sigma_min" if eps else "zero",
                clock=clock,
                closed=name != "IPNDMScheduler",
                noise_std=config.get("sigma_data", 1.0),
            )
        if name == "UnCLIPScheduler":  # a DDPM scheduler whose betas are cosine ones
            config = {**_UNCLIP, **config}
        if config.get("prediction_type", "epsilon") not in _KIND_OF or "beta_start" not in config:
            raise ValueError(
                f"The levels of {name or 'this scheduler'} are not known; use a DDIM, "
                "Euler, DPM-Solver, UniPC, PNDM, EDM or FlowMatch configuration."
            )
        return Schedule.vp(config, name)

    @staticmethod
    def vp(config: Mapping[str, Any], name: str = "DDIMScheduler") -> Schedule:
        """Build a variance-preserving discrete schedule from its betas; the same one every time."""
        given = tuple((key, value) for key, value in config.items() if not key.startswith("_"))
        try:
            return _vp(name, given)
        except TypeError:  # a list among the entries
            return _vp.__wrapped__(name, given)

    @staticmethod
    def edm(config: Mapping[str, Any], name: str = "EDMEulerScheduler") -> Schedule:
        """Build Karras' schedule; the network's output is preconditioned with sigma_data.

        Raises ValueError as `edm_settings` does.
        """
        return Schedule(**edm_settings(config, name))

    @staticmethod
    def continuous(config: Mapping[str, Any], name: str) -> Schedule:
        """Build the levels of a sigma-based scheduler with network input ln(sigma)/4.

        With a v-prediction they are Karras' of data of standard deviation 1 (Salimans and Ho, 2022,
        arXiv:2202.00512, in units of x/alpha). Raises ValueError for another prediction.
        """
        if (
            config.get("prediction_type") != "v_prediction"
            or config.get("sigma_min") is None
            or config.get("final_sigmas_type", "zero") != "zero"
        ):
            raise ValueError(
                f"{name}: timestep_type = 'continuous' is supported for prediction_type = "
                "'v_prediction' with sigma_min and sigma_max and a run that ends at 0 only."
            )
        return Schedule.edm({**config, "sigma_data": 1.0})

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
            open_end=name.startswith((*_OPEN_END, "Helios")),
            from_zero=name.startswith(("DPMSolver", "DEIS", "SASolver")),
            to_zero=name.startswith("FlowMap"),
            final=config.get("final_sigmas_type", final),
            sigma_min=sigma_min,
            shift=config.get("flow_shift") or config.get("shift") or 1.0,
            terminal=config.get("shift_terminal") or None,
            dynamic={n: config[n] for n in wanted if n in config} if dynamic else None,
            ramp=ramp,
        )


@lru_cache(maxsize=64)
def _vp(name: str, given: tuple[tuple[str, Any], ...]) -> Schedule:
    """The schedule of `Schedule.vp`; its tables take as long as a step of a small network."""
    config = dict(given)
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


def clipped(pred: Prediction, x: Tensor, config: Mapping[str, Any], scheduler: str) -> Prediction:
    """Clip x0 of a prediction as a DDIM or DDPM scheduler of this configuration does.

    DDIM keeps the direction of the unclipped prediction, DDPM takes that of the clipped one.
    """
    if not (config.get("clip_sample") or config.get("clip_denoised")):
        return pred
    reach = config.get("clip_sample_range") or 1.0
    x0 = pred.x0.tensor().clamp(-reach, reach)
    keeps = scheduler.startswith("DDIM")
    return Prediction.from_x0(x, x0, pred.level, eps=pred.eps if keeps else None)


def _ramp_of(config: Mapping[str, Any]) -> str | None:
    """The ramp, other than Karras', in a scheduler's configuration."""
    if config.get("use_exponential_sigmas"):
        return "exponential"
    return "beta_sigmas" if config.get("use_beta_sigmas") else None


__all__ = ["SPACINGS", "Final", "Schedule", "Spacing", "clipped", "dynamic_mu"]
