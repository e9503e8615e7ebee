"""Steps of an update that draw noise; the others follow the deterministic sampler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from sampler import registry
from sampler.registry.constraints import Count, Fraction, Positive, checked
from sampler.training.policy.base import noisy_steps

if TYPE_CHECKING:
    from sampler.training.session import Session


@checked("grpo: window")
@dataclass(frozen=True)
class NoiseWindow:
    """The window of stochastic steps [first, first + size), a function of the update alone.

    size: steps. every: updates between its moves, by `stride` steps. strategy: "progressive",
    "decay", "exp_decay" (with `decay`), or "random"; see `sampler.objectives.sde_window`. within:
    the share of the run, from its start, in which it moves. roll_back: start again at the end of
    that share; without it the window stays there.
    """

    size: Count = 2
    every: Count = 25
    strategy: Literal["progressive", "decay", "exp_decay", "random"] = "progressive"
    stride: Count = 1
    decay: Positive = 0.1
    within: Fraction = 0.5
    roll_back: bool = True

    @staticmethod
    def of(values: Mapping[str, Any]) -> NoiseWindow:
        """Return the window of a mapping. Raises ValueError for an unknown key or a bad value."""
        known = [entry.name for entry in fields(NoiseWindow)]
        for key in values:
            if key not in known:
                raise ValueError(
                    f"grpo: window has no key {key!r}{registry.suggestion(str(key), known)}."
                )
        return NoiseWindow(**values)

    def check(self, session: Session) -> None:
        """Raise ValueError for a sampler without steps to choose, and for a run too short."""
        spec = registry.spec_of(session.method)
        if not isinstance(spec, dict) or "noisy" not in spec:
            raise ValueError(
                f"grpo: {session.method.name!r} cannot draw noise in a window of steps; use "
                "cps, flow_sde or dance_sde, or set window = None."
            )
        if spec["noisy"] is not None:
            raise ValueError(
                f"grpo: both window and the sampler's noisy = {list(spec['noisy'])} choose the "
                "steps with noise; set one of them to None."
            )
        idle = {"random": ("every", "stride", "decay", "roll_back"), "exp_decay": ()}
        for key in idle.get(self.strategy, ("decay",)):
            if getattr(self, key) != getattr(NoiseWindow(), key):
                raise ValueError(
                    f"grpo: window.{key} = {getattr(self, key)!r} has no effect with strategy = "
                    f"{self.strategy!r}; leave it out."
                )
        if self.size > (total := self._total(session)):
            raise ValueError(
                f"grpo: window.size = {self.size} is longer than the {total} steps with noise in "
                f"the first {self.within:g} of {session.steps} steps; use a smaller window, a "
                "larger window.within or more steps."
            )

    def applied(self, session: Session, update: int) -> Session:
        """Return a session whose sampler draws noise in the window of an update."""
        from sampler.objectives import sde_window

        total = self._total(session)
        first, count = sde_window(
            update,
            self.size,
            total,
            self.every,
            self.strategy,
            self.stride,
            self.roll_back,
            self.decay,
        )
        if count == 0:  # past the end
            first, count = total - self.size, self.size
        spec = {**registry.spec_of(session.method), "noisy": (first, first + count)}
        return replace(session, method=registry.build("sampler", spec))

    def _total(self, session: Session) -> int:
        """Return the number of steps in which the window may lie."""
        end = math.ceil(self.within * session.steps)
        return sum(step < end for step in noisy_steps(session))
