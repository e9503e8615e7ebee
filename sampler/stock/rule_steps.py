"""A guidance rule in the steps of a stock pipeline: its plan, its state and its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from sampler_kernels import Lin, settle
from torch import Tensor

from sampler.guidance.spaces import in_space
from sampler.stock.forms import Form
from sampler.stock.run_levels import RunLevels, number
from sampler.stock.step_arguments import is_integer_part
from sampler.types import Branch, Cond, Guidance, Prediction, Span

_BOTH = Cond("cond", "uncond")


class RuleSteps:
    """State of a rule in a run, and its plan of the step that is under way.

    index: of that step. first: the branches of the first step, as planned before any call.
    """

    def __init__(self, rule: Guidance, levels: RunLevels) -> None:
        self.rule, self.levels = rule, levels
        self.first: Mapping[str, Branch] = {}
        self.begin()

    def begin(self) -> None:
        """Begin a run."""
        self.index, self.state = 0, None
        self.forget()

    def forget(self) -> None:
        """Forget the plan of a step that has ended, or that will not."""
        self._span: Span | None = None
        self._planned: tuple[Tensor, Mapping[str, Branch]] | None = None

    def start(self) -> None:
        """Give the rule the state of a first step."""
        self.state = self.rule.start(Cond())

    def try_plan(self, x: Tensor) -> None:
        """Raise what the rule has against the levels of this run, before the network is called."""
        span = self.levels.expected()
        x = self.levels.seen(x, span.now)
        self.first = self.rule.plan(x, span, _BOTH, self.rule.start(Cond()))

    def span(self, timestep: object = None) -> Span:
        """Levels of this step; timestep: by default the scheduler's."""
        if self._span is None:
            time = self.levels.time(self.index) if timestep is None else timestep
            self._span = self.levels.span(self.index, time)
        return self._span

    def plan(self, x: Tensor, timestep: object = None) -> Mapping[str, Branch]:
        """Plan this step once."""
        if self._planned is None:
            self._planned = x, self._plan_of(x, self.span(timestep))
        return self._planned[1]

    def _plan_of(self, x: Tensor, span: Span) -> Mapping[str, Branch]:
        return self.rule.plan(self.levels.seen(x, span.now), span, _BOTH, self.state)

    def branches(
        self, x: Tensor, timestep: object, name: str
    ) -> tuple[Mapping[str, Branch], Tensor]:
        """The plan of this step, and the x that it holds for.

        A plan that was made before the network was called saw the result of the last step, which
        the pipeline may have changed since (inpainting). name: of the pipeline class. Raises
        ValueError for a step that is not the next one of the run.
        """
        branches, span = self.plan(x, timestep), self.span()
        assert self._planned is not None
        seen = self._planned[0]
        apart = abs(number(timestep) - span.now.t) > 1e-3 * max(1.0, abs(span.now.t))
        if apart and not is_integer_part(timestep, span.now.t):
            raise ValueError(
                f"{name} took a step at timestep {number(timestep):g}, and "
                f"the next one of its scheduler is {span.now.t:g}; sampler.guide cannot serve it."
            )
        if seen is x or torch.equal(seen, x):
            return branches, x
        again = self._plan_of(x, span)
        pairs = [(branches.get(k), again.get(k)) for k in {*branches, *again}]
        same = all(torch.equal(mask(a, len(x)), mask(b, len(x))) for a, b in pairs)
        return branches, x if same else seen

    def combine(
        self, x: Tensor, x_planned: Tensor, outs: Mapping[str, Tensor], kind: str
    ) -> Tensor:
        """Guided output in parametrisation `kind`, "" for the network's own; advances the state."""
        schedule, span = self.levels.schedule, self.span()
        x, x_planned = (self.levels.seen(v.float(), span.now) for v in (x, x_planned))
        make = partial(Prediction.of, kind) if kind else schedule.predict
        preds = {k: make(x, out, span.now) for k, out in outs.items()}
        pred, state = self.rule.combine(x_planned, preds, span, self.state)
        value = in_space(pred, kind) if kind else schedule.output_of(x, pred, span.now)
        guided, self.state = settle((Lin.of(value), state))
        return guided


def outputs(
    form: Form, blocks: Sequence[Tensor], branches: Mapping[str, Branch]
) -> dict[str, Tensor]:
    """Planned predictions by branch; rows as `Branch` says where a plan leaves some out."""
    by_role = {role: b for role, b in zip(form.roles, blocks, strict=True)}
    outs: dict[str, Tensor] = {}
    for name in sorted(branches):  # "cond" first: it fills the rows that others leave out
        rows, value = branches[name].rows, by_role.get(name, by_role["cond"])
        if rows is not None and not rows.any():
            continue
        if rows is not None and not rows.all():
            shape = (-1, *(1,) * (value.ndim - 1))
            rest = torch.zeros_like(value) if name == "cond" else outs.get("cond")
            rest = torch.zeros_like(value) if rest is None else rest
            value = torch.where(rows.to(value.device).view(shape), value, rest)
        outs[name] = value
    return outs


def mask(branch: Branch | None, batch: int) -> Tensor:
    """Rows [B] that a branch evaluates, on the CPU."""
    if branch is None:
        return torch.zeros(batch, dtype=torch.bool)
    return torch.ones(batch, dtype=torch.bool) if branch.rows is None else branch.rows.cpu()
