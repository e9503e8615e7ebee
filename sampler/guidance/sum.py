"""Several guidance directions at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from sampler.core.binding import GuidanceContext
from sampler.guidance.spaces import in_space
from sampler.registry import register
from sampler.types import Branch, Cond, Guidance, GuidanceBase, Prediction, Span


@register("guidance", "sum")
@dataclass(frozen=True)
class Sum(GuidanceBase):
    """The sum of what several rules add to the conditional prediction.

        g = c + Σ_i (g_i − c)

    With `cfg` and `autoguidance` it is the three-way rule
    c + (w_c − 1)(c − u) + (w_a − 1)(c − weak); with `gfcg` and `cfg` the directions of the two add
    up. Each rule keeps its own state and its own interval; a branch that several rules need is
    evaluated once. Space: the network's own output (every term is a difference, so any gives the
    same).

    rules: two or more, each with a direction of its own (against the unconditional prediction,
        the weak network, the reference class, the classifier's gradient).
    """

    rules: Any = field(
        default=({"name": "cfg"}, {"name": "autoguidance"}), metadata={"kind": "guidance"}
    )

    reference: ClassVar[str] = (
        "Guiding a Diffusion Model with a Bad Version of Itself (Karras et al., 2024), "
        "arXiv:2406.02507, and Classifier-Free Diffusion Guidance (Ho & Salimans, 2022), "
        "arXiv:2207.12598, added up"
    )

    def __post_init__(self) -> None:
        rules: tuple[Guidance, ...] = self.rules
        if type(rules) is not tuple or len(rules) < 2:
            raise ValueError("sum: rules must be a list of at least two guidance rules.")
        taken: dict[str, str] = {}
        for rule in rules:
            name = rule.name
            if name in ("none", "sum", "student", "cfg_pp"):
                raise ValueError(f"sum: {name!r} has no direction of its own; leave it out.")
            if name == "forecast":
                raise ValueError("sum: put forecast outside: forecast(rule=sum(...)).")
            if getattr(rule, "zero_init_steps", 0):
                raise ValueError("sum: cfg_zero's zero start stops the run; zero_init_steps = 0.")
            direction = _direction(rule)
            if direction in taken:
                raise ValueError(
                    f"sum: {taken[direction]!r} and {name!r} both rewrite the direction away from "
                    f"{direction!r}; keep one of them."
                )
            taken[direction] = name

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"cond"}).union(*(rule.needs for rule in self.rules))

    def bind(self, context: GuidanceContext, cond: Cond) -> tuple[Sum, Cond]:
        """Every rule bound to the run; see `sampler.core.binding`."""
        rules: list[Any] = []
        for rule in self.rules:
            rule, cond = rule.bind(context, cond)
            rules.append(rule)
        return replace(self, rules=tuple(rules)), cond

    def start(self, cond: Cond) -> Any:
        return tuple(rule.start(cond) for rule in self.rules)

    def plan(self, x: Any, span: Span, cond: Cond, state: Any) -> Mapping[str, Branch]:
        branches: dict[str, Branch] = {}
        for rule, inner in zip(self.rules, state, strict=True):
            branches |= rule.plan(x, span, cond, inner)
        branches["cond"] = Branch(cond.cond)
        return branches

    def combine(
        self, x: Any, preds: Mapping[str, Prediction], span: Span, state: Any
    ) -> tuple[Prediction, Any]:
        cond = preds["cond"]
        total, states = cond.out, list[Any]()
        for rule, inner in zip(self.rules, state, strict=True):
            pred, after = rule.combine(x, preds, span, inner)
            if pred is not cond:
                total = total + (in_space(pred, cond.kind) - cond.out)
            states.append(after)
        return cond.like(total), tuple(states)


def _direction(rule: Guidance) -> str:
    """Return what a rule pushes away from: a branch other than "cond", or its own term."""
    return min(rule.needs - {"cond"}, default=rule.name)
