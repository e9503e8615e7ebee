"""EasyCache's criterion and forecast: a residual held while a relative change stays small.

    k = ‖Δout‖₁/‖Δx‖₁ of the last two evaluations;   sum += k·‖x − x_·‖₁/‖out‖₁ at every step
    the step is left out while sum < threshold:  out = x + (out_− − x_−), x_− of the last evaluation

in the network's own output, per sample. The authors' x_· is the x of the step before, so that the
sum is a path length; ComfyUI's is that of the last evaluation, so that a run of m steps counts its
first one m times, and nothing is recorded during the warm-up.

Reference: EasyCache (2025), as in H-EmbodVis/EasyCache and ComfyUI's node of that name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from sampler.guidance.spaces import choose
from sampler.types import Level, Lin, Prediction


class ChangeState(NamedTuple):
    """residual, x: out − x and x of the last evaluation, [B, ...]; before: x of the last step,
    None in ComfyUI's form; norm: mean |out|, rate: k, total: the sum, float64 [B]; kind: of out."""

    residual: Any = None
    x: Any = None
    before: Any = None
    norm: Any = None
    rate: Any = None
    total: Any = None
    kind: str = ""


@dataclass(frozen=True)
class ChangeCriterion:
    """See the module. warmup: steps that are evaluated, and not recorded in ComfyUI's form."""

    threshold: float
    form: Literal["authors", "comfyui"]
    warmup: int

    def due(self, x: Any, state: ChangeState) -> Any:
        """True for all samples, or bool [B] on the CPU. NaN never leaves a step out."""
        if state.rate is None:
            return True
        return ~(self._total(x, state) < self.threshold).cpu()

    def forecast(self, x: Any, level: Level, state: ChangeState) -> Prediction:
        return Prediction.of(state.kind, x, Lin.of(x) + Lin.of(state.residual), level)

    def after(
        self,
        x: Any,
        state: ChangeState,
        due: Any,
        fresh: Any,
        pred: Prediction | None,
        index: int,
    ) -> ChangeState:
        """The next state; pred: the output where one was evaluated.

        fresh: samples whose last output is not to be compared with this one.
        """
        authors = self.form == "authors"
        if not authors and index < self.warmup:
            return state
        if pred is None:
            return state._replace(before=x if authors else None, total=self._total(x, state))
        import torch

        out, here = pred.out.tensor(), x
        residual = out - here
        norm = _mean(out)
        rate: Any = None
        held: Any = state.residual
        if held is not None and fresh is not True:
            rate = _mean(out - (held + state.x)) / _mean(here - state.x)
        if rate is not None and not isinstance(fresh, bool):
            rate = rate.masked_fill(fresh.to(rate.device), torch.nan)
        total = torch.zeros_like(norm)
        if due is not True and rate is not None and held is not None:
            flags = due.to(norm.device)
            norm, rate = torch.where(flags, norm, state.norm), torch.where(flags, rate, state.rate)
            total = torch.where(flags, total, self._total(x, state))
            residual = choose(due, Lin.of(residual), Lin.of(held))
            here = choose(due, Lin.of(here), Lin.of(state.x))
        before = x if authors else None
        return ChangeState(residual, here, before, norm, rate, total, pred.kind)

    def _total(self, x: Any, state: ChangeState) -> Any:
        near = state.x if state.before is None else state.before
        return state.total + state.rate * _mean(x - near) / state.norm


def _mean(value: Any) -> Any:
    """mean |value| per sample, float64 [B]."""
    return value.detach().double().abs().flatten(1).mean(1)
