"""The rule's result in the place of a pipeline's guidance, for one scheduler step.

A step moves the whole sample, one frame of it after another (`frame_steps.py`), or the tokens
beside given ones (`given_tokens.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sampler.pipelines.call_arguments import scheduler_of
from sampler.stock.forms import TOLERANCE, Form, Given
from sampler.stock.frame_steps import DIM, FrameSteps, frame_steps
from sampler.stock.given_tokens import GivenTokens, given_tokens
from sampler.stock.network_calls import NetworkCalls
from sampler.stock.rule_steps import RuleSteps, outputs
from sampler.stock.run_formula import RunFormula
from sampler.stock.scheduler import SamplerScheduler
from sampler.stock.stock_calls import names_of


class GuidedSteps:
    """Guided outputs of a run. nfe: network rows that were evaluated for each image so far."""

    def __init__(
        self, pipe: Any, steps: RuleSteps, formula: RunFormula, calls: NetworkCalls
    ) -> None:
        self.pipe, self.steps, self.formula, self.calls = pipe, steps, formula, calls
        self.name = type(pipe).__name__
        self.begin()

    def begin(self) -> None:
        """Begin a run."""
        self.nfe: list[int] = []
        self._frames: FrameSteps | None = None
        self._tokens: GivenTokens | None = None

    def output(self, given: Mapping[str, Any], sample: Any, kwargs: Mapping[str, Any]) -> Tensor:
        """`model_output` with the rule's result in the place of the pipeline's guidance.

        given: arguments of the scheduler's step; sample, kwargs: of the last network call. Raises
        ValueError for frames in another order and for what `RunFormula.at` refuses.
        """
        time, levels = given["timestep"], self.steps.levels
        span = self.steps.span(time)
        step = Given(
            given["model_output"],
            given["sample"],
            [answer.value for answer in self.calls.answers],
            "x0" if given.get("pred_original_sample") is not None else levels.kind,
            levels.sigma(span.now),
            levels.exploding,
            levels.schedule.sigma_data,
        )
        last, same = span.index + 1 == span.total, self.calls.as_before
        frames = self._frames or frame_steps(step, time, sample, kwargs)
        self._tokens = given_tokens(step, time, kwargs, self.name, self._tokens is not None)
        if self._tokens is not None:
            return self._of_tokens(self._tokens, time, same, last)
        if frames is not None:
            return self._of_frame(frames, step, time, same or self._frames is not None, last)
        form, branches = self.formula.at(self.steps.index, step, same, last)
        guided = self._combined(form, branches, step, time)
        return form.back(guided, step.output).to(step.output.dtype)

    def ended(self, x: Tensor, after: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Return the sample after a step and what the next one is planned on, if that is known.

        x, after: of the scheduler. None where the step goes on with other frames.
        """
        if self._frames is not None:
            self._frames.taken.append(after)
            return None
        if self._tokens is not None:
            if self._adds_noise:
                self._tokens.keep(after)
            return after, None
        return after, after if after.shape == x.shape else None

    def end_frames(self) -> Tensor | None:
        """End a step of frames one by one, and return the sample; None for other steps.

        Raises ValueError where some frames were left out.
        """
        frames, self._frames = self._frames, None
        if frames is None:
            return None
        if frames.next < len(frames.places):
            raise ValueError(self._unordered())
        return torch.stack(frames.taken, DIM)

    def _of_frame(
        self, frames: FrameSteps, step: Given, time: Any, same: bool, last: bool
    ) -> Tensor:
        """`model_output` of the frame that is due; the rule sees all frames at the first."""
        if not frames.is_due(step.x):
            raise ValueError(self._unordered())
        form, _ = self.formula.at(self.steps.index, frames.one(step), same, last)
        if frames.guided is None:
            whole = frames.whole
            frames.guided = self._combined(form, form.branches(whole), whole, time)
        self._frames = frames
        guided = frames.guided.select(DIM, frames.next)
        return form.back(guided, step.output).to(step.output.dtype)

    def _of_tokens(self, tokens: GivenTokens, time: Any, same: bool, last: bool) -> Tensor:
        """`model_output` with the rule's result for tokens beside given ones."""
        form, _ = self.formula.at(self.steps.index, tokens.free, same, last)
        tokens.check(form, self._adds_noise, self.name)
        self.formula.check_rest(tokens.held(form), tokens.whole, TOLERANCE, last)
        moving = tokens.moving
        return tokens.put(self._combined(form, form.branches(moving), moving, time), form)

    def _unordered(self) -> str:
        return (
            f"{self.name} steps frames at several noise levels after one call of its "
            f"{names_of(self.pipe, self.calls.networks)}; sampler.guide serves frames of one level "
            "only (ar_step=0)."
        )

    @property
    def _adds_noise(self) -> bool:
        """Return whether the steps are those of a drop-in with a stochastic sampler."""
        scheduler = scheduler_of(self.pipe)
        return isinstance(scheduler, SamplerScheduler) and scheduler.method.stochastic

    def _combined(self, form: Form, branches: Sequence[Tensor], step: Given, time: Any) -> Tensor:
        """The rule's result for the guided rows of a step."""
        blocks, x = form.guided(branches), form.rows(step.x)
        if self.steps.index == 0:
            self.nfe = [0] * len(x)
            self.steps.start()
        planned, x_planned = self.steps.branches(x, time, self.name)
        self.nfe = self.calls.counted(form, self.nfe)
        guided = self.steps.combine(x, x_planned, outputs(form, blocks, planned), step.kind)
        for weight, block in zip(form.extra, blocks, strict=False):
            guided = guided + weight * block.float()
        return guided
