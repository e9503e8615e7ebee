"""Multistep consistency sampling: jump to x0, noise again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from sampler.core.binding import SamplerContext
from sampler.registry import register
from sampler.types import Level, Move, Prediction, SamplerBase, Span


@register("sampler", "consistency")
@dataclass(frozen=True)
class Consistency(SamplerBase):
    """Consistency-model / LCM multistep sampling: to x0 in one jump, then noise of the next level.

        x' = alpha'·x0 + sigma'·z,   z ~ N(0, I)

    With the rule `student` and a student of its own trajectory (`f_distill`) the noise is the
    student's own estimate instead of z: x' = alpha'·x0 + sigma'·eps, deterministic DDIM between all
    the times that it was trained at, no fewer.

    For networks trained to predict x0 in one step; 1 to 8 steps. The last step (sigma' = 0) draws
    no noise. The boundary factors c_skip, c_out of latent consistency models are left out: at the
    lowest timestep of their grids, 19, c_skip is 7e-6.

    timesteps: the times to evaluate at, noisy first, one per step; None is the model's grid, or
        with the rule `student` the times that the student was trained at.
    """

    timesteps: tuple[float, ...] | None = None

    reference: ClassVar[str] = (
        "Consistency Models (Song et al., 2023), arXiv:2303.01469, Algorithm 1; Latent Consistency "
        "Models (Luo et al., 2023), arXiv:2310.04378, Algorithm 3"
    )

    # of a bound instance: the levels of its timesteps, and whether the noise is the student's own
    _walked: ClassVar[tuple[Level, ...]] = ()
    _own: ClassVar[bool] = False

    def bind(self, context: SamplerContext) -> Consistency:
        """Looks the levels of the timesteps up; see `sampler.core.binding`.

        Raises ValueError where there are not as many as steps, or no such time, and for other times
        than those of a student of its own trajectory.
        """
        steps, times, own = len(context.levels) - 1, self.timesteps, False
        manifest = context.adapter.student
        if manifest is not None and _uses_student(context.guidance):
            known = tuple(manifest["timesteps"])
            own = manifest.get("trajectory") == "own"
            if own and (times or known) + (steps,) != known + (len(known),):
                raise ValueError(
                    "consistency: the student was trained on its own trajectory, where each step "
                    f"begins where the last one ended: t = {', '.join(f'{t:g}' for t in known)}; "
                    f"use steps = {len(known)} without timesteps."
                )
            if times is None:
                times = tuple(known[i * len(known) // steps] for i in range(min(steps, len(known))))
        if times is None:
            return self
        if len(times) != steps:
            raise ValueError(
                f"consistency: {steps} steps, and there are {len(times)} timesteps to evaluate at; "
                f"use steps = {len(times)}."
            )
        found = replace(self, timesteps=times)
        levels = [context.adapter.schedule.level(t) for t in times]
        object.__setattr__(found, "_walked", (*levels, context.levels[-1]))
        object.__setattr__(found, "_own", own)
        return found

    def levels(self, grid: tuple[Level, ...]) -> tuple[Level, ...]:
        return self._walked or grid

    @property
    def convergence(self) -> None:
        return None

    @property
    def stochastic(self) -> bool:
        return not self._own

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        if self._own:
            return Move(span.next.alpha * pred.x0 + span.next.sigma * pred.eps, 0.0, state)
        return Move(span.next.alpha * pred.x0, span.next.sigma, state)


def _uses_student(rule: Mapping[str, Any]) -> bool:
    """Return True for the rule `student`, also inside another such as `nag`."""
    inner: Mapping[str, Any] | None = rule.get("rule")
    return rule["name"] == "student" or (inner is not None and _uses_student(inner))
