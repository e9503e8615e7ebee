"""Accuracy of samplers on a model: distance to a run of many steps, and contrast.

    distance     ‖x − x*‖/‖x*‖,    x* of ten times the most steps, over the latents of all images
    spread       ‖x‖/‖x*‖
    solver_error the estimate that a run makes without x*, relative to rms(x*), over the images

x* of a deterministic sampler is the solution of the probability-flow ODE, by `REFERENCE`. That of a
stochastic one is its own long run on the same Brownian path (`noise: path`), since its samples are
those of another equation for every path; without such runs its spread is relative to the ODE's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from sampler import registry
from sampler.core.batch import Output, Result
from sampler.engine import Engine
from sampler.samplers.aliases import named

# Ten times the steps, with the second-order sampler that is stable on the grids of all families.
FINER, MOST, REFERENCE = 10, 1000, {"name": "dpmpp_2m"}
SAMPLERS: tuple[Any, ...] = (
    "ddim", {"name": "ab", "order": 2}, "dpmpp_2m", "unipc", "res_multistep", "deis", "res_2s",
    "euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde", "er_sde", "sa_solver", "dpmpp_sde",
)  # fmt: skip


class Measured(NamedTuple):
    """One sampler at one number of steps and on one grid (None: the model's own)."""

    sampler: Any
    grid: Any
    steps: int
    nfe: int
    distance: float | None
    spread: float
    solver_error: float | None
    result: Result


def measured(
    engine: Engine,
    prompts: Sequence[str],
    *,
    samplers: Sequence[Any] = SAMPLERS,
    steps: Sequence[int] = (8, 20),
    grids: Sequence[Any] = (None,),
    guidance: Any = None,
    seed: int = 0,
    batch_size: int = 8,
    output: Output = "latent",
    own_paths: bool = True,
    finer: int = FINER,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Measured]:
    """Yield one row per sampler, grid and number of steps; image i has seed + i.

    Two-evaluation samplers take half the steps, so that rows of equal `steps` cost about the same.
    own_paths: whether stochastic samplers are compared with long runs of their own, which cost more
    than all else; without, they have no distance. finer: factor from the most steps to those of the
    long runs. Raises ValueError for no prompts and for what samplers, grids and steps refuse.
    """
    if not prompts:
        raise ValueError("Measuring samplers needs at least one prompt.")

    done = 0

    def run(method: Any, count: int, grid: Any, output: Output = "latent") -> Result:
        result = engine.generate(
            list(prompts),
            seeds=seed,
            steps=count,
            sampler=method,
            guidance=guidance,
            grid=grid,
            batch_size=batch_size,
            output=output,
        )
        nonlocal done
        done += 1
        if progress is not None:
            progress(done)
        return result

    long = min(finer * max(steps), MOST)
    solution: Tensor | None = None
    for spec in samplers:
        method = on_path(spec)
        if method.stochastic and own_paths:
            exact = run(method, long // method.evaluations, None).latents
        else:
            if solution is None:
                solution = run(REFERENCE, long, None).latents
            exact = solution
        scale = _rms(exact)
        for grid in grids:
            for count in steps:
                made = run(method, max(1, count // method.evaluations), grid, output)
                known = not method.stochastic or own_paths
                errors = made.solver_error
                yield Measured(
                    spec, grid, count, max(made.nfe),
                    _rms(made.latents - exact) / scale if known else None,
                    _rms(made.latents) / scale,
                    None if errors is None else sum(errors) / len(errors) / scale,
                    made,
                )  # fmt: skip


def on_path(spec: Any) -> Any:
    """Build a sampler by any of its names; the noise of a stochastic one is that of a path."""
    method = registry.build("sampler", named(spec)[0])
    if method.stochastic and "noise" in registry.spec_of(method):
        return replace(method, noise="path")
    return method


def row_of(found: Measured) -> dict[str, Any]:
    """A measurement as a row of a table: three digits, None for what is not finite or not there."""
    numbers = {
        "distance": found.distance,
        "spread": found.spread,
        "solver_error": found.solver_error,
    }
    return {
        "sampler": name_of(found.sampler),
        **({} if found.grid is None else {"grid": found.grid}),
        "steps": found.steps,
        "nfe": found.nfe,
        **{k: float(f"{v:.3g}") if v and math.isfinite(v) else None for k, v in numbers.items()},
    }


def name_of(spec: Any) -> str:
    """A sampler as text: its name and the settings that are given."""
    if not isinstance(spec, Mapping):
        return str(spec)
    return " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in spec.values())


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())
