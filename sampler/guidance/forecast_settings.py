"""Checks of `forecast`: settings, samplers and number of steps."""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import Any

from sampler.core.binding import GuidanceContext
from sampler.types import Span

# Fields that have an effect under one setting only.
_BELONGS = {
    "when": {
        "error": ("tolerance", "longest"),
        "window": ("window", "growth"),
        "change": ("threshold", "form"),
    },
    "basis": {"chebyshev": ("degree", "ridge", "horizon", "blend"), "polynomial": ("order",)},
}
_SHAPE = ("basis", "order", "degree", "ridge", "horizon", "blend", "space", "clock")


def check(rule: Any) -> None:
    """Raises ValueError for an invalid policy, and for a field given where it has no effect."""
    if rule.policy is not None and (not rule.policy or set(rule.policy) - {0, 1}):
        raise ValueError(f"forecast: policy = {rule.policy} must have a 0 or a 1 for each step.")
    if rule.policy is not None and rule.policy[0] == 0:
        raise ValueError("forecast: the first step of a policy must be 1: there is no history yet.")
    if rule.basis == "chebyshev" and rule.clock != "index":
        raise ValueError("forecast: basis = 'chebyshev' counts steps; use clock = 'index'.")
    changed = {f.name for f in fields(rule) if getattr(rule, f.name) != f.default} - {"rule"}
    for owner, settings in _BELONGS.items():
        for setting, names in settings.items():
            for name in changed.intersection(names):
                if getattr(rule, owner) != setting or (owner == "when" and rule.policy is not None):
                    raise ValueError(
                        f"forecast: {name} belongs to {owner} = {setting!r}; leave it out."
                    )
    if rule.policy is not None and (extra := changed & {"when", "warmup", "last", "compact"}):
        raise ValueError(f"forecast: a policy decides every step; leave {min(extra)} out.")
    if rule.when == "change" and (extra := changed.intersection(_SHAPE)):
        raise ValueError(
            f"forecast: when = 'change' has a forecast of its own; leave {min(extra)} out."
        )


def refuse_steps(rule: Any, steps: int) -> None:
    """Raises ValueError for a policy of another length, and for runs without a step to forecast."""
    if rule.policy is not None:
        if len(rule.policy) != steps:
            raise ValueError(
                f"forecast: the policy has {len(rule.policy)} entries and the run {steps} steps; "
                "give one entry per step."
            )
        return
    warmup, last = rule.warmup_steps, rule.last
    if steps <= warmup + last:
        raise ValueError(
            f"forecast: {steps} steps leave no step to forecast after {warmup} of warm-up and "
            f"{last} at the end; use at least {2 * (warmup + last)}."
        )


def refuse_sampler(context: GuidanceContext) -> None:
    """Raises ValueError for a sampler that evaluates twice per step, or jumps to x0.

    Warns of a sampler with much noise.
    """
    name, levels = context.sampler["name"], context.levels
    twice = any(a[1:] == b[1:] for a, b in zip(levels[:-1], levels[1:], strict=True))
    if twice:
        raise ValueError(
            f"forecast: the sampler {name!r} evaluates twice per step; use ddim, ab, dpmpp_2m, "
            "ghvb or heavy_ball."
        )
    if name == "consistency":
        raise ValueError(
            "forecast: the sampler 'consistency' jumps to x0 at each of a few steps, which leaves "
            "nothing to forecast; leave forecast out."
        )
    eta = context.sampler.get("eta", 0)
    if eta > 0.3:
        warnings.warn(
            f"forecast: under eta = {eta:g} the prediction is not a smooth function of time, and "
            "forecasts of it are poor; use eta <= 0.3.",
            stacklevel=3,
        )


def refuse_span(rule: Any, span: Span, state: Any) -> None:
    """Raises ValueError for a step that cannot be forecast, or has nothing to forecast from."""
    if span.index == 0 and span.total:
        refuse_steps(rule, span.total)
    if not isinstance(span.now.sigma, (float, int)):
        raise ValueError(
            "forecast: all samples of a run need the same levels; give them as floats."
        )
    if span.now[1:] == span.next[1:]:
        raise ValueError(
            "forecast: this sampler evaluates twice per step; use ddim, ab, dpmpp_2m, ghvb or "
            "heavy_ball."
        )
    skips = rule.policy is not None and not rule.policy[span.index]
    if skips and not state.history.values:
        raise ValueError(
            f"forecast: step {span.index} has no earlier output to forecast from, since the "
            "first level has no signal (alpha = 0); let the policy start with 1, 1."
        )
