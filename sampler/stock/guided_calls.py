"""Calls of a stock pipeline, guided by a rule; see `hook.py`.

What the network answers between two scheduler steps is one step of the rule. In the first step of
a run everything is evaluated and the pipeline's formula is solved; in later ones the rule's plan
says which rows are.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sampler.stock.answers import Answer, scattered, whole
from sampler.stock.first_order import AsCFG, served
from sampler.stock.forms import Form
from sampler.stock.interception import Call, intercept
from sampler.stock.negative_calls import NegativeCalls
from sampler.stock.readings import is_single
from sampler.stock.rule_steps import RuleSteps, mask, outputs
from sampler.stock.run_formula import RunFormula
from sampler.stock.run_levels import RunLevels
from sampler.stock.stock_calls import (
    call_on_rows,
    couples_rows,
    names_of,
    refuse_call,
    sample_of,
)
from sampler.types import Guidance, Snapshot

log = logging.getLogger("sampler")
_active: ContextVar[GuidedCalls | None] = ContextVar("guided_pipeline", default=None)


class GuidedCalls:
    """Network calls and scheduler steps of a pipeline, and its solved formula.

    Networks are guided only while their pipeline is being called, so that others may share them.

    networks: the denoising networks. nfe: network rows that were evaluated for each image of the
    last run. levels, steps, formula: those of the run. on_step: receives the sample after every
    step; its snapshots hold no states.
    """

    def __init__(
        self,
        pipe: Any,
        networks: Sequence[Any],
        rule: Guidance,
        negative: NegativeCalls | None = None,
    ) -> None:
        self.pipe, self.networks, self.rule = pipe, list(networks), rule
        self.negative = negative
        self.levels = RunLevels(pipe)
        self.steps = RuleSteps(rule, self.levels)
        self.formula = RunFormula(pipe, rule, against=negative is not None)
        self.nfe: list[int] = []
        self.on_step: Callable[[Snapshot], None] | None = None
        self._times: Any = None
        self._calling = threading.Lock()
        self._forget()

    @property
    def form(self) -> Form | None:
        """The formula of the last step, None before the first."""
        return self.formula.form

    def _forget(self) -> None:
        """Forget the calls of an unfinished step."""
        self._answers: list[Answer] = []
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
                served(self.rule.rule, self.pipe.scheduler)
                if kwargs.get("eta"):
                    raise ValueError("cfg_pp: inside sampler.guide the step has no noise; eta = 0.")
            self.levels.read_schedule()
            self._begin(None)
            with intercept(self.pipe.scheduler, self._scheduler_step, "step"):
                result = call(*args, **kwargs)
            if self._answers:
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
        self._times, self.formula.form = times, None
        self.steps.begin()
        self._expected: list[Answer] = []
        self._next: Tensor | None = None
        self._coupled = [couples_rows(network) for network in self.networks]
        self._step_names = [*inspect.signature(type(self.pipe.scheduler).step).parameters][1:]
        self._forget()

    def network_call(self, number: int, call: Call, args: Any, kwargs: Any) -> Any:
        """Evaluate the planned rows of a call; calls from elsewhere are left alone."""
        if _active.get() is not self:
            return call(*args, **kwargs)
        if self.pipe.scheduler.timesteps is not self._times:
            self._begin(self.pipe.scheduler.timesteps)
        given = sample_of(args, kwargs)
        if not self.steps.index and not self._answers:
            self._check_run(given)
        count = len(given) if isinstance(given, (Tensor, list, tuple)) else 0
        for answer in self._answers:
            if answer.is_handed_to(args, kwargs, count):
                answer.readers.append(len(self._answers))
        call, cost = self._against(number, call, given)
        due, last = self._due(number, count)
        if due is None or last is None:
            due, (raw, value) = None, whole(call, args, kwargs, count)
        elif due.any():
            read_only = not last.value.numel()
            raw, value, due = self._partial(number, call, args, kwargs, due, read_only)
        else:
            raw, value = last.raw, last.value
        self._answers.append(Answer(number, count, raw, value, due, cost))
        return raw

    def _check_run(self, given: Any) -> None:
        """Raise for what this run would fail on, before its first network call."""
        self.formula.check_run()
        x = torch.stack(list(given)) if isinstance(given, (list, tuple)) else given
        if isinstance(x, Tensor):
            self.steps.try_plan(x)

    def _due(self, number: int, count: int) -> tuple[Tensor | None, Answer | None]:
        """Rows [count] that this call has to evaluate, None for all, and the last such answer.

        A call whose answer only goes into other calls of the step, as that of a ControlNet does, is
        due in the rows in which those are.
        """
        form, position = self.form, len(self._answers)
        if form is None or not form.settled or position >= len(self._expected):
            return None, None
        last = self._expected[position]
        known = all(a.key == e.key for a, e in zip(self._answers, self._expected, strict=False))
        if last.key != (number, count) or not known or self._next is None:
            return None, None
        if not {"extra", "idle"}.isdisjoint(form.roles):
            return None, None
        readers = [position] if form.used[position] else last.readers
        networks = [number, *(self._expected[at].network for at in readers)]
        single = all(is_single(self._expected[at].raw) and form.used[at] for at in readers)
        if not readers or not single or any(self._coupled[network] for network in networks):
            return None, None
        planned = [self._planned_rows(form, at) for at in readers]
        if any(rows is None for rows in planned):
            return None, last
        found = torch.stack([rows for rows in planned if rows is not None]).any(0)
        return (None if found.all() else found), last

    def _planned_rows(self, form: Form, position: int) -> Tensor | None:
        """Rows of a call that the rule asks for in this step, bool [count], None for all."""
        assert self._next is not None
        branches = self.steps.plan(form.frame.rows(self._next))
        used, count = form.used[position], self._expected[position].count
        first = sum(form.used[:position])
        roles = form.roles[first : first + used]
        if all(role in branches and branches[role].rows is None for role in roles):
            return None
        return torch.cat([mask(branches.get(role), count // used) for role in roles])

    def _against(self, number: int, call: Call, given: Any) -> tuple[Call, int]:
        """The call with the rule's negative prompt in its attention, and its rows per sample."""
        if self.negative is None:
            return call, 1
        branches = self.steps.first
        if self.steps.index:
            x = given if self._next is None else self._next
            branches = self.steps.plan(self.form.frame.rows(x) if self.form else x)
        branch, network = branches.get("cond"), self.networks[number]
        if branch is None or branch.mixing is None:
            return call, 1
        mixing = partial(self.negative.call, network, branch.mixing, call)
        return lambda *a, **k: mixing(a, k), self.negative.rows(network)

    def _partial(
        self, number: int, call: Call, args: Any, kwargs: Any, due: Tensor, all_of_it: bool
    ) -> tuple[Any, Tensor, Tensor | None]:
        """Evaluate the rows `due`; a network that cannot be called on fewer rows is evaluated in
        full until the run ends.
        """
        name = type(self.networks[number]).__name__
        try:
            raw = call_on_rows(call, due.nonzero()[:, 0], len(due), args, kwargs)
        except (RuntimeError, ValueError, IndexError) as error:
            if type(error).__name__ == "OutOfMemoryError":
                raise
            log.info("%s is evaluated in full: %s", name, error)
            self._coupled[number] = True
            return *whole(call, args, kwargs, len(due)), None
        return *scattered(raw, due, name, all_of_it), due

    def _scheduler_step(self, call: Call, args: Any, kwargs: Any) -> Any:
        """Give the guided prediction to the scheduler instead of the pipeline's own."""
        if _active.get() is not self:
            return call(*args, **kwargs)
        given = {**dict(zip(self._step_names, args, strict=False)), **kwargs}
        output, x = given["model_output"], given["sample"]
        if not self._answers:
            raise ValueError(
                f"{type(self.pipe).__name__} took a step without a guided call of its "
                f"{names_of(self.pipe, self.networks)}; sampler.guide cannot serve it as it is set "
                "up."
            )
        guided = self._guided(output, given["timestep"], x)
        if "model_output" in kwargs:
            result = call(*args, **{**kwargs, "model_output": guided})
        else:
            result = call(guided, *args[1:], **kwargs)
        after = result[0] if isinstance(result, tuple) else result.prev_sample
        self._next = after if after.shape == x.shape else None
        self.steps.index += 1
        if self.on_step is not None and self.form is not None:
            rows = self.form.frame.rows(after)
            self.on_step(Snapshot(self.steps.index, rows, (), (), (), tuple(self.nfe)))
        self._expected = self._answers
        self._forget()
        return result

    def _guided(self, output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        """`model_output` with the rule's result in the place of the pipeline's guidance."""
        values = [answer.value for answer in self._answers]
        same = [a.key for a in self._answers] == [a.key for a in self._expected]
        form = self.formula.at(self.steps.index, output, sample, values, same)
        blocks = form.blocks(values, output)
        x = form.frame.rows(sample)
        if self.steps.index == 0:
            self.nfe = [0] * len(x)
            self.steps.start()
        branches, x_planned = self.steps.branches(x, timestep, type(self.pipe).__name__)
        self._count(form)
        guided = self.steps.combine(x, x_planned, outputs(form, blocks, branches))
        for weight, block in zip(form.extra, blocks, strict=False):
            guided = guided + form.sign * weight * block.float()
        return form.frame.back(guided, output).to(output.dtype)

    def _count(self, form: Form) -> None:
        """Add the evaluated rows of this step to `nfe`."""
        for answer, count in zip(self._answers, form.used, strict=True):
            rows = answer.evaluated
            per_row = [count] * len(self.nfe)
            if rows is not None and count:
                per_row = rows.view(count, -1).sum(0).tolist()
            self.nfe = [n + k * answer.cost for n, k in zip(self.nfe, per_row, strict=True)]
