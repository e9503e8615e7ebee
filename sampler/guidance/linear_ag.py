"""LinearAG: unconditional predictions replaced by linear regressions on the run's own past."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from os.path import expanduser
from typing import Any, ClassVar, Literal, NamedTuple

from sampler.core.binding import GuidanceContext
from sampler.guidance.gates import Scale, is_one
from sampler.guidance.linear_ag_coefficients import Coefficients, agree
from sampler.registry import register
from sampler.registry.constraints import FloatOrTensor
from sampler.types import Branch, Cond, GuidanceBase, Lin, Prediction, Span


class LinearAGState(NamedTuple):
    """The network's outputs so far, one entry per step: c_i, and u_i real or predicted."""

    cond: tuple[Any, ...] = ()
    uncond: tuple[Any, ...] = ()


@register("guidance", "linear_ag")
@dataclass(frozen=True)
class LinearAG(GuidanceBase):
    """LinearAG: CFG whose unconditional pass is, at some steps, a regression on past outputs.

        û_t = Σ_{i<=t} a[t][i]·c_i + Σ_{i<t} b[t][i]·u_i,    g = û + w·(c − û)

    Two rows at the steps where the policy has 1, one at the others. The coefficients are valid for
    one model, sampler, grid, scale, policy and unconditional prompt, which their file names:
    anything else is refused. In the network's own output (the paper: eps of eps-models).

    coefficients: "bundled" (for the bundled model), the path of a file made by `sampler calibrate
        linear-ag`, or a `Coefficients` value.
    policy: one number per step, 1 evaluates the unconditional pass and 0 predicts it; None is the
        one that the coefficients were fitted for (`default_policy` by default).
    scale: w >= 0; None is the scale of the calibration.

    With `adaptive(rule=linear_ag)` the policy decides first, and a latched row takes g = c.

    Deviation: the coefficients of step t are fitted with the predicted û_i in the place of u_i
    where the policy predicts; fitted on real u_i only, errors grow from step to step.
    """

    coefficients: Any = "bundled"
    policy: tuple[Literal[0, 1], ...] | None = None
    scale: Scale | None = None

    reference: ClassVar[str] = (
        "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models "
        "(Castillo et al., 2023), arXiv:2312.12487, LinearAG"
    )

    def __post_init__(self) -> None:
        known, policy = self._known, self._policy()
        if len(policy) != known.steps:
            raise ValueError(
                f"linear_ag: policy = {self.policy} must have a 0 or a 1 for each of the "
                f"{known.steps} steps of the calibration."
            )
        if policy[0] == 0:
            warnings.warn(
                "linear_ag: the policy starts with 0, where there is no history to predict from.",
                stacklevel=3,
            )
        known.refuse(policy=list(policy))
        if self.scale is not None and not is_one(self.scale):
            known.refuse(scale=float(self.scale))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"cond"} if is_one(self._scale()) else {"cond", "uncond"})

    def bind(self, context: GuidanceContext, cond: Cond) -> tuple[LinearAG, Cond]:
        """Checks the coefficients' keys against a run of `generate`; see `sampler.core.binding`."""
        if not is_one(self._scale()):
            self._known.refuse(
                sampler=context.sampler,
                levels=rounded_levels(context.levels),
                model=context.fingerprint(),
            )
            for negative in context.negative:
                self._known.refuse(negative=negative)
        return self, cond

    def start(self, cond: Cond) -> LinearAGState:
        return LinearAGState()

    def plan(self, x: Any, span: Span, cond: Cond, state: LinearAGState) -> Mapping[str, Branch]:
        if is_one(self._scale()):
            return {"cond": Branch(cond.cond)}
        self._check_level(span)
        if self._policy()[span.index]:
            return {"uncond": Branch(cond.uncond), "cond": Branch(cond.cond)}
        return {"cond": Branch(cond.cond)}

    def combine(
        self, x: Any, preds: Mapping[str, Prediction], span: Span, state: LinearAGState
    ) -> tuple[Prediction, LinearAGState]:
        cond, scale = preds["cond"], self._scale()
        if is_one(scale):
            return cond, state
        self._known.refuse(prediction=cond.kind)
        past = (*state.cond, cond.out)
        uncond = preds["uncond"].out if "uncond" in preds else self.predicted(past, state.uncond)
        guided = cond.like(uncond + scale * (cond.out - uncond))
        return guided, LinearAGState(past, (*state.uncond, uncond))

    def predicted(self, cond: tuple[Any, ...], uncond: tuple[Any, ...]) -> Lin:
        """û of step t from c_0..c_t and u_0..u_{t−1}, each [B, ...]."""
        t = len(uncond)
        weights = (*self._known.cond[t], *self._known.uncond[t])
        total = Lin.zero(cond[-1])
        for weight, value in zip(weights, (*cond, *uncond), strict=True):
            total = total + weight * Lin.of(value)
        return total

    @property
    def _known(self) -> Coefficients:
        given = self.coefficients
        return given if isinstance(given, Coefficients) else _loaded(str(given))

    def _scale(self) -> FloatOrTensor:
        return self._known.keys.get("scale", 7.5) if self.scale is None else self.scale

    def _policy(self) -> tuple[int, ...]:
        if self.policy is not None:
            return self.policy
        known = self._known
        return tuple(known.keys.get("policy") or default_policy(known.steps))

    def _check_level(self, span: Span) -> None:
        levels = self._known.keys.get("levels")
        if span.index >= self._known.steps:
            raise ValueError(
                f"linear_ag: step {span.index} lies beyond the {self._known.steps} steps of the "
                "calibration; run with as many steps."
            )
        if levels is None:
            return
        found, fitted = rounded_levels([span.now])[0], list(levels[span.index])
        if not agree(fitted, found):
            raise ValueError(
                f"linear_ag: step {span.index} is at alpha, sigma = {found}, the calibration was "
                f"at {fitted}; use the same schedule and steps."
            )


@cache
def _loaded(path: str) -> Coefficients:
    return Coefficients.load(expanduser(path))


def default_policy(steps: int) -> tuple[int, ...]:
    """Real in the first fifth of the run and at 25, 40, 55 and 75 % of it: 28 rows for 20 steps.

    The directions turn most at the noisy end. The paper alternates in the first half, and predicts
    or drops in the second.
    """
    real = {*range(-(-steps // 5)), *(int(share * steps) for share in (0.25, 0.4, 0.55, 0.75))}
    return tuple(int(t in real) for t in range(steps))


def rounded_levels(levels: Any) -> list[list[float]]:
    """[alpha, sigma] of the levels that are evaluated, to 6 digits, as the file has them."""
    return [[round(float(v), 6) for v in (level.alpha, level.sigma)] for level in levels]
