"""Grids found by `sampler calibrate grid`, looked up for the run at hand.

A file holds grids for one model; each is good for one sampler, number of steps and rule. For any
other the look-up refuses: the best grid changes with all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sampler import registry
from sampler.core.errors import UsageError

FORMAT = 1
PREFIX = "calibrated:"
KEY = ("sampler", "steps", "guidance")


def grid_key(sampler: Any, steps: int, guidance: Any) -> dict[str, Any]:
    """Settings that a calibrated grid holds for; the kind of noise is not one of them."""
    method = dict(registry.spec_of(registry.build("sampler", sampler)))
    method.pop("noise", None)
    rule = registry.spec_of(registry.build("guidance", guidance))
    return json.loads(json.dumps({"sampler": method, "steps": steps, "guidance": rule}))


def grid_of(spec: Any, model: str, sampler: Any, steps: int, guidance: Any) -> Any:
    """The grid of "calibrated:FILE" for a run, None for the model's own; other specs themselves.

    model: `model_name` of the run's. Raises UsageError for a file that cannot be read, another
    model, and a setting that was not calibrated.
    """
    if not (isinstance(spec, str) and spec.startswith(PREFIX)):
        return spec
    path = Path(spec.removeprefix(PREFIX)).expanduser()
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        entries = [({k: entry[k] for k in KEY}, entry["grid"]) for entry in stored["entries"]]
        version, fitted = stored["format"], stored["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is not a readable calibration of grids: "
            f"{getattr(error, 'strerror', None) or error}."
        ) from None
    if version != FORMAT or fitted != model:
        was = f"of format {version}" if version != FORMAT else f"for model {fitted}, not {model}"
        raise UsageError(f"{path} is {was}; run `sampler calibrate grid` for this model.")
    key = grid_key(sampler, steps, guidance)
    for known, grid in entries:
        if known == key:
            return grid
    there = "; ".join(_shown(known) for known, _ in entries)
    raise UsageError(f"{path} has no grid for {_shown(key)}; it has {there}.")


def _shown(key: Mapping[str, Any]) -> str:
    rule = key["guidance"]
    scale = f" {rule['scale']:g}" if "scale" in rule else ""
    return f"{key['sampler']['name']} at {key['steps']} steps with {rule['name']}{scale}"
