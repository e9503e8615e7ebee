"""Calibration of LinearAG: full CFG runs over prompts, and the regression on their passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sampler_kernels import Lin

from sampler import registry
from sampler.core.binding import model_name
from sampler.core.trajectory import begin
from sampler.engine import Engine
from sampler.guidance.linear_ag import default_policy, rounded_levels
from sampler.guidance.linear_ag_coefficients import Coefficients, gram_of, solve
from sampler.types import Branch, Cond, Guidance, GuidanceBase, Prediction, Span


@dataclass(frozen=True)
class _Recorder(GuidanceBase):
    """A rule, with every pair of network outputs kept in its state: (state, c_i..., u_i...)."""

    rule: Guidance
    name: ClassVar[str] = "recorder"

    @property
    def needs(self) -> frozenset[str]:
        return self.rule.needs

    def start(self, cond: Cond) -> Any:
        return self.rule.start(cond), (), ()

    def plan(self, x: Any, span: Span, cond: Cond, state: Any) -> Mapping[str, Branch]:
        return self.rule.plan(x, span, cond, state[0])

    def combine(
        self, x: Any, preds: Mapping[str, Prediction], span: Span, state: Any
    ) -> tuple[Prediction, Any]:
        guided, inner = self.rule.combine(x, preds, span, state[0])
        cond, uncond = (Lin.of(preds[name].out) for name in ("cond", "uncond"))
        return guided, (inner, (*state[1], cond), (*state[2], uncond))


def calibrate_linear_ag(
    engine: Engine,
    prompts: Sequence[str],
    *,
    scale: float,
    steps: int = 20,
    sampler: Any = None,
    negative: str = "",
    policy: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Coefficients:
    """LinearAG's coefficients for one engine, sampler, number of steps, scale, negative prompt.

    Runs full CFG for every prompt (image i has seed + i) and solves the normal equations, summed in
    float64. policy: 1 or 0 per step, for which they are fitted (`default_policy`). A few dozen
    prompts are enough: there are at most 2·steps unknowns, and every element of every latent is an
    equation. progress(prompts done, prompts in all) after every batch.

    Raises ValueError for no prompts, scale 1 (there is no pair to record), bad steps, and a policy
    of another length.
    """
    if not prompts:
        raise ValueError("calibrate: no prompts; give a few dozen that are typical of the use.")
    rule = _Recorder(registry.build("guidance", {"name": "cfg", "scale": scale}))
    if "uncond" not in rule.needs:
        raise ValueError("calibrate: scale = 1 evaluates no unconditional pass; there is nothing.")
    method, adapter = engine.build_sampler(sampler), engine.pipeline
    size = adapter.size(None, None)
    grid = method.levels(adapter.grid(steps, size))
    policy = default_policy(len(grid) - 1) if policy is None else policy
    if len(policy) != len(grid) - 1 or set(policy) - {0, 1}:
        raise ValueError(
            f"calibrate: policy must have a 0 or a 1 for each of {len(grid) - 1} steps."
        )
    total = torch.zeros(2 * (len(grid) - 1), 2 * (len(grid) - 1), dtype=torch.float64)
    for first in range(0, len(prompts), batch_size):
        some = list(prompts[first : first + batch_size])
        seeds = [seed + first + i for i in range(len(some))]
        run = begin(engine, some, [negative] * len(some), seeds, steps, size, method, rule)
        with torch.no_grad():
            _, last = engine.run_to_end(*run)
        _, conds, unconds = last.guidance
        total += gram_of(conds, unconds).cpu()
        if progress is not None:
            progress(first + len(some), len(prompts))
    keys = {
        "model": model_name(adapter),
        "sampler": registry.spec_of(method),
        "levels": rounded_levels(grid[:-1]),
        "scale": float(scale),
        "negative": negative,
        "prediction": adapter.schedule.prediction,
        "prompts": len(prompts),
        "seed": seed,
    }
    return solve(total, keys, policy)
