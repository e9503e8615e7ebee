"""Settings of Karras' noise levels (EDM), read from a stock scheduler's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sampler.core.clocks import clock_of

_KINDS = {"epsilon": "eps", "v_prediction": "v"}
_RAMPS = {"karras": None, "exponential": "exponential"}
# Defaults of the scheduler of Stable Audio, whose network is told 2/pi·atan(sigma).
_COSINE = {"sigma_min": 0.3, "sigma_max": 500.0, "sigma_data": 1.0,
           "sigma_schedule": "exponential", "prediction_type": "v_prediction"}  # fmt: skip


def edm_settings(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Fields of the schedule of a scheduler with this class name.

    A run of one step starts at sigma_max, as its first noise does; on the exponential ramp the
    stock one starts at sigma_min.

    Raises ValueError for another ramp than Karras' and the exponential one, and for a network that
    predicts x0 itself.
    """
    config = {**_COSINE, **config} if name.startswith("Cosine") else config
    ramp, kind = config.get("sigma_schedule", "karras"), config.get("prediction_type", "epsilon")
    for field, value, known in (
        ("sigma_schedule", ramp, _RAMPS),
        ("prediction_type", kind, _KINDS),
    ):
        if value not in known:
            raise ValueError(
                f"{name}: {field} = {value!r:.40} is not supported; use "
                f"{' or '.join(map(repr, known))}."
            )
    return {
        "process": "edm",
        "prediction": _KINDS[kind],
        "spacing": "karras",
        "final": config.get("final_sigmas_type", "zero"),
        "sigma_min": config.get("sigma_min", 0.002),
        "sigma_max": config.get("sigma_max", 80.0),
        "sigma_data": config.get("sigma_data", 0.5),
        "rho": config.get("rho", 7.0),
        "ramp": _RAMPS[ramp],
        "clock": clock_of(name, config),
    }
