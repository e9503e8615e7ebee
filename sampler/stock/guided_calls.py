"""Calls of a stock pipeline, guided by a rule; see `hook.py`.

What the network answers between two scheduler steps is one step of the rule. In the first step of
a run everything is evaluated and the pipeline's formula is solved.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sampler.pipelines.call_arguments import scheduler_of
from sampler.stock.first_order import AsCFG, served
from sampler.stock.forms import Form
from sampler.stock.guided_steps import GuidedSteps
from sampler.stock.interception import Call, intercept, signature_of
from sampler.stock.negative_calls import NegativeCalls
from sampler.stock.network_calls import NetworkCalls
from sampler.stock.other_stages import OtherStages, tell_of_output
from sampler.stock.rule_steps import RuleSteps
from sampler.stock.run_formula import RunFormula
from sampler.stock.run_levels import RunLevels, number
from sampler.stock.stock_calls import names_of, processors_kept, refuse_call, sample_of
from sampler.types import Guidance, Snapshot

_active: ContextVar[GuidedCalls | None] = ContextVar("guided_pipeline", default=None)


class GuidedCalls:
    """Network calls and scheduler steps of a pipeline, and its solved formula.

    Networks are guided only while their pipeline is being called, so that others may share them.

    networks: the denoising networks. levels, steps, formula, calls, guided: those of the run.
    on_step: receives the sample after every step; its snapshots hold no states.
    """

    def __init__(
        self,
        pipe: Any,
        networks: Sequence[Any],
        rule: Guidance,
        negative: NegativeCalls | None = None,
    ) -> None:
        self.pipe, self.networks, self.rule = pipe, list(networks), rule
        self.levels = RunLevels(pipe)
        self.steps = RuleSteps(rule, self.levels)
        self.formula = RunFormula(pipe, rule, against=negative is not None)
        self.calls = NetworkCalls(networks, self.steps, self.formula, negative)
        self.guided = GuidedSteps(pipe, self.steps, self.formula, self.calls)
        self._stages = OtherStages(pipe)
        self.on_step: Callable[[Snapshot], None] | None = None
        self._times: Any = None
        self._calling = threading.Lock()

    @property
    def form(self) -> Form | None:
        """The formula of the last step, None before the first."""
        return self.formula.form

    @property
    def nfe(self) -> list[int]:
        """Network rows that were evaluated for each image of the last run."""
        return self.guided.nfe

    def nfe_of(self, images: int) -> list[int]:
        """NFE of each image of the last call, over all its runs and frames."""
        found = [0] * images
        for run in (*self._earlier, self.nfe):
            ends = [k * len(run) // images for k in range(images + 1)]
            found = [n + sum(run[a:b]) for n, (a, b) in zip(found, pairwise(ends), strict=True)]
        return found

    def _forget(self) -> None:
        """Forget the calls of an unfinished step."""
        self.calls.forget()
        self.steps.forget()

    def pipeline_call(self, call: Call, args: Any, kwargs: Any) -> Any:
        """Call the pipeline with its networks guided.

        Raises ValueError for a second call before this one ends, and for a call whose guidance
        cannot be replaced.
        """
        if not self._calling.acquire(blocking=False):
            raise ValueError(
                "This guided pipeline is already being called, by another thread or from its own "
                "callback; use one pipeline per thread."
            )
        token = _active.set(self)
        try:
            refuse_call(kwargs)
            if isinstance(self.rule, AsCFG):
                served(self.rule.rule, scheduler_of(self.pipe))
                if kwargs.get("eta"):
                    raise ValueError("cfg_pp: inside sampler.guide the step has no noise; eta = 0.")
            self.levels.read_schedule()
            self._earlier = list[list[int]]()
            self.guided.begin()
            scheduler = scheduler_of(self.pipe)
            self._begin(scheduler.timesteps)
            steps = intercept(scheduler, self._scheduler_step, "step", copies=True)
            with steps, processors_kept(self.networks):
                result = call(*args, **kwargs)
                self._end_frames()
            if self.calls.answers:
                raise ValueError(
                    f"{type(self.pipe).__name__} does not give the answers of its network to the "
                    "step of its own scheduler; sampler.guide cannot serve it."
                )
            return result
        finally:
            self._forget()
            _active.reset(token)
            self._calling.release()

    def _begin(self, times: Any) -> None:
        """Begin a run; `set_timesteps` makes a new tensor for each."""
        self._times, self._trial = times, False  # a step of every branch, for its x0
        self._stepped: float | None = None  # timestep of the last step
        if self.nfe:
            self._earlier.append(self.nfe)
        self._stages.begin()
        self.guided.begin()
        self.formula.begin()
        self.steps.begin()
        self.calls.begin()
        self._step_names = [*signature_of(type(scheduler_of(self.pipe)).step).parameters][1:]

    def network_call(self, number: int, call: Call, args: Any, kwargs: Any) -> Any:
        """Evaluate the planned rows of a call; calls from elsewhere are left alone."""
        if _active.get() is not self:
            return call(*args, **kwargs)
        if (times := scheduler_of(self.pipe).timesteps) is not self._times:
            self._begin(times)
        elif self._stages.is_running():
            return call(*args, **kwargs)
        given = sample_of(args, kwargs)
        self._end_frames()
        self._sample, self._kwargs = given, kwargs
        if self._trial:
            raise ValueError(
                f"{type(self.pipe).__name__} steps the branches of its network apart; "
                "sampler.guide cannot serve it."
            )
        if not self.steps.index and not self.calls.answers:
            self._check_run(given)
        return self.calls.evaluate(number, call, args, kwargs, given)

    def _check_run(self, given: Any) -> None:
        """Raise for what this run would fail on, before its first network call."""
        self.formula.check_run()
        x = given
        if isinstance(given, (list, tuple)):  # of lists of images, the last is the one that is made
            x = torch.stack([one if isinstance(one, Tensor) else one[-1] for one in given])
        if isinstance(x, Tensor):
            self.steps.try_plan(x)

    def _scheduler_step(self, call: Call, args: Any, kwargs: Any) -> Any:
        """Give the guided prediction to the scheduler instead of the pipeline's own."""
        if _active.get() is not self:
            return call(*args, **kwargs)
        given = {**dict(zip(self._step_names, args, strict=False)), **kwargs}
        output = given["model_output"]
        if not self.calls.answers and self.calls.beside(output):
            tell_of_output(type(self.pipe).__name__)
            return call(*args, **kwargs)
        if not self.calls.answers and self._is_again(given):
            return call(*args, **kwargs)
        if not self.calls.answers:
            raise ValueError(
                f"{type(self.pipe).__name__} took a step without a guided call of its "
                f"{names_of(self.pipe, self.networks)}; sampler.guide cannot serve it as it is set "
                "up."
            )
        if self.calls.are(output):
            self._trial = True
            return call(*args, **kwargs)
        self._trial, guided = False, self.guided.output(given, self._sample, self._kwargs)
        for name in ("model_output", "pred_original_sample"):
            if name in kwargs:
                kwargs = {**kwargs, name: guided}
        if "model_output" not in kwargs:
            args = guided, *args[1:]
        result = call(*args, **kwargs)
        after = result.prev_sample if hasattr(result, "prev_sample") else result[0]
        self._stepped = number(given["timestep"])
        if ended := self.guided.ended(given["sample"], after):
            self._end_step(*ended)
        return result

    def _is_again(self, given: Mapping[str, Any]) -> bool:
        """Return whether a step is that of the last guided x0, of one branch (Cosmos)."""
        x0 = given.get("pred_original_sample")
        return x0 is not None and number(given["timestep"]) == self._stepped

    def _end_step(self, after: Tensor, planned: Tensor | None) -> None:
        """End a step; after: the sample; planned: the same where the next step is planned on it."""
        self.steps.index += 1
        if self.on_step is not None and self.form is not None:
            rows = self.form.rows(after)
            self.on_step(Snapshot(self.steps.index, rows, (), (), (), tuple(self.nfe)))
        self.calls.end_step(planned)
        self.steps.forget()

    def _end_frames(self) -> None:
        """End a step of frames one by one, if one is under way."""
        after = self.guided.end_frames()
        if after is not None:
            self._end_step(after, None)
