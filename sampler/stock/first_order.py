"""The rule `cfg_pp` in stock pipelines, as classifier-free guidance with a scale per step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sampler.types import Branch, Cond, Guidance, GuidanceBase, Prediction, Span

# Schedulers whose step is x' = alpha'·x0 + sigma'·eps, of one output.
SCHEDULERS = ("DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler")


@dataclass(frozen=True)
class AsCFG(GuidanceBase):
    """CFG++ of a first-order step: g = u + w·(c − u) with the scale w of `CFGPP.scale_of_cfg`."""

    rule: Any

    name: ClassVar[str] = "cfg_pp"

    @property
    def needs(self) -> frozenset[str]:
        return self.rule.needs

    def plan(self, x: Any, span: Span, cond: Cond, state: Any) -> Mapping[str, Branch]:
        return self.rule.plan(x, span, cond, state)

    def combine(
        self, x: Any, preds: Mapping[str, Prediction], span: Span, state: Any
    ) -> tuple[Prediction, Any]:
        uncond, cond = preds["uncond"], preds.get("cond")
        if cond is None:
            return uncond, state
        scale = self.rule.scale_of_cfg(span)
        return uncond.like(uncond.out + scale * (cond.out - uncond.out)), state


def served(rule: Guidance, scheduler: Any) -> Guidance:
    """The rule as a stock pipeline takes it: `cfg_pp` as CFG, others unchanged.

    Raises ValueError for a rule that keeps a direction apart from its target elsewhere: a stock
    scheduler reads one output.
    """
    if not rule.sets_direction:
        return rule
    name = type(scheduler).__name__
    if type(rule).name == "cfg_pp" and name in SCHEDULERS:
        return AsCFG(rule)
    raise ValueError(
        f"Guidance {rule.name!r} keeps a direction apart from its target, and {name} reads one "
        f"output; use cfg_pp itself with {', '.join(SCHEDULERS)}, or "
        "sampler.load(pipe).generate(...)."
    )
