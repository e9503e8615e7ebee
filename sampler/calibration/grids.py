"""Calibration of the grid of levels for a model: the candidate nearest to a long run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from sampler import registry
from sampler.calibration.momentum import is_better, squared_errors
from sampler.calibration.solvers import FINER, MOST, REFERENCE, on_path
from sampler.core.binding import model_name
from sampler.core.calibrated_grid import FORMAT, grid_key
from sampler.engine import Engine

# Families with values of their one parameter; the best family changes with the number of steps.
CANDIDATES: tuple[Any, ...] = (
    "simple", "normal", "kl_optimal",
    *({"name": "karras", "rho": rho} for rho in (3.0, 5.0, 7.0, 10.0)),
    *({"name": "polyexponential", "rho": rho} for rho in (0.7, 1.0, 1.5)),
    *({"name": "beta", "alpha": a, "beta": b} for a, b in ((0.6, 0.6), (0.5, 0.7), (1.0, 1.0))),
)  # fmt: skip


def calibrate_grid(
    engine: Engine,
    prompts: Sequence[str],
    *,
    sampler: Any = "ddim",
    steps: Sequence[int] = (20,),
    guidance: Sequence[Mapping[str, Any]],
    candidates: Sequence[Any] = CANDIDATES,
    seed: int = 0,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Contents of a calibration file: for every steps × rule the grid of least error.

    The error is the mean square of the latents against a run of ten times the steps on the model's
    own grid (image i has seed + i); a stochastic sampler's is against its own long run on the same
    Brownian path. The best candidate on every other prompt replaces the model's grid where it is
    better on the prompts in between too, beyond their noise (`is_better`); None stands for the
    model's own.

    Raises ValueError for fewer than four prompts, and for what sampler and steps refuse.
    """
    if len(prompts) < 4:
        raise ValueError(f"A calibration of grids needs at least 4 prompts, not {len(prompts)}.")
    method = on_path(sampler)
    done, total = 0, len(steps) * len(guidance) * (len(candidates) + 2)

    def run(count: int, rule: Any, grid: Any, by: Any = method) -> Tensor:
        nonlocal done
        latents = engine.generate(
            list(prompts),
            seeds=seed,
            steps=count,
            sampler=by,
            guidance=rule,
            grid=grid,
            batch_size=batch_size,
            output="latent",
        ).latents
        done += 1
        if progress is not None:
            progress(done, total)
        return latents.double()

    entries: list[dict[str, Any]] = []
    for rule in guidance:
        for count in steps:
            reference = method if method.stochastic else registry.build("sampler", REFERENCE)
            exact = run(min(FINER * count, MOST), rule, None, reference)
            own = squared_errors(run(count, rule, None), exact)
            known = [grid for grid in candidates if _is_possible(engine, grid, count)]
            found = [squared_errors(run(count, rule, grid), exact) for grid in known]
            best = chosen(own, found)
            entries.append(
                {
                    **grid_key(sampler, count, rule),
                    "grid": None if best is None else known[best],
                    "errors": {
                        json.dumps(grid): round(float(errors.mean().sqrt()), 6)
                        for grid, errors in zip([None, *known], [own, *found], strict=True)
                    },
                    "prompts": len(prompts),
                }
            )
    return {"format": FORMAT, "model": model_name(engine.pipeline), "entries": entries}


def chosen(own: Tensor, found: Sequence[Tensor]) -> int | None:
    """Position of the grid to use, None for the model's own, from squared errors [N] per grid."""
    best = min(range(len(found)), key=lambda i: float(found[i][::2].mean()))
    return best if is_better(own[1::2], found[best][1::2]) else None


def _is_possible(engine: Engine, grid: Any, steps: int) -> bool:
    """Return False for a grid that the model refuses, such as one from alpha = 0 under eps."""
    adapter = engine.pipeline.with_grid(grid)
    try:
        adapter.grid(steps, adapter.size(None, None))
    except ValueError:
        return False
    return True
