"""Methods of image restoration by name: sampler and rule for a measurement.

A method is an entry of METHODS, all of it plain data, so that runs can record it. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from sampler.registry import suggestion
from sampler.registry.constraints import as_float


@dataclass(frozen=True)
class Problem:
    """y = A(x) + noise, and the user's settings for its restoration.

    operator: by name, {"name": ...} or an object; y: image file or tensor; noise: standard
    deviation in units of [-1, 1], None where it is not known; guidance: the rule for the prompt;
    restorer, strength: of `difface`, None for the defaults.
    """

    operator: Any
    y: Any
    noise: float | None = None
    guidance: Any = "none"
    restorer: Any = None
    strength: float | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The fields that all methods share; the measurement is that of a decoded image."""
        return {"operator": self.operator, "y": self.y, "space": "image"}

    @property
    def known(self) -> dict[str, Any]:
        """The fields of methods that know the noise."""
        return {**self.given, "noise": self.noise}

    @property
    def has_holes(self) -> bool:
        """True for inpainting, by name or with the operator's object."""
        if isinstance(self.operator, Mapping):
            return "mask" in cast("Mapping[str, Any]", self.operator)
        return getattr(self.operator, "mask", None) is not None


Strategies = tuple[Any, Any]  # specs of the sampler and of the guidance rule


@dataclass(frozen=True)
class Method:
    """One way to restore: `strategies(problem)` gives the sampler and the rule of an ordinary run.

    needs_noise: refuses a problem without noise. starts: takes a restorer and a strength.
    """

    strategies: Callable[[Problem], Strategies]
    needs_noise: bool = False
    starts: bool = False


def _reddiff(problem: Problem) -> Strategies:
    # lr of the published examples; their lam of 0.25 costs the bundled model 3 to 6 dB
    # (docs/restoring.md).
    return {"name": "reddiff", "lr": 0.25, "lam": 0.05, **problem.given}, problem.guidance


def _data(problem: Problem) -> Strategies:
    rule = {"name": "data", "rule": problem.guidance, **problem.known}
    return {"name": "ddim", "eta": 1.0}, rule


def _daps(problem: Problem) -> Strategies:
    return {"name": "daps", **problem.known}, problem.guidance


def _admm(problem: Problem) -> Strategies:
    # a diffusion network has seen noisy images alone (DiffPIR)
    return {"name": "admm", "renoise": True, "cg": 4, **problem.known}, problem.guidance


def _difface(problem: Problem) -> Strategies:
    """As published; the known pixels around holes are held by the rule `data`."""
    holes = problem.has_holes
    spec: dict[str, Any] = {"name": "difface", **problem.given}
    spec["strength"] = problem.strength or (0.48 if holes else 0.4)
    if problem.restorer is not None:
        spec["restorer"] = problem.restorer
    if not holes:
        return spec, problem.guidance
    spec["sampler"] = {"name": "ddim", "eta": 1.0}
    rule = {"name": "data", "rule": problem.guidance, **problem.known}
    return spec, {**rule, "noise": problem.noise or SMALL_NOISE}


SMALL_NOISE = 0.05
"""Noise that is assumed of known pixels where a method needs one and none is given."""

METHODS: dict[str, Method] = {
    "daps": Method(_daps, needs_noise=True),
    "data": Method(_data, needs_noise=True),
    "admm": Method(_admm, needs_noise=True),
    "reddiff": Method(_reddiff),
    "difface": Method(_difface, starts=True),
}


def default_method(noise: float | None) -> str:
    """`daps` where the noise is known, else `reddiff`."""
    return "reddiff" if noise is None else "daps"


def strategies(name: str | None, problem: Problem) -> tuple[str, Any, Any]:
    """(method, sampler spec, guidance spec) of a problem; None is the default method.

    Raises ValueError for an unknown method, noise that is missing or not positive, and a restorer
    or a strength that the method does not take.
    """
    if problem.noise is not None and as_float(problem.noise, "noise") <= 0:
        raise ValueError(
            f"noise = {problem.noise} must be above 0, the standard deviation of the measurement's "
            "noise in units of [-1, 1]; leave it out for reddiff and difface."
        )
    name = name or default_method(problem.noise)
    if name not in METHODS:
        raise ValueError(f"Unknown method {name!r}{suggestion(name, METHODS)}.")
    method = METHODS[name]
    if method.needs_noise and problem.noise is None:
        free = " or ".join(key for key, other in METHODS.items() if not other.needs_noise)
        raise ValueError(f"The method {name!r} needs noise, such as 0.05; without it use {free}.")
    if not method.starts and (problem.restorer is not None or problem.strength is not None):
        raise ValueError(f"restorer and strength belong to the method 'difface', not to {name!r}.")
    sampler, guidance = method.strategies(problem)
    return name, sampler, guidance
