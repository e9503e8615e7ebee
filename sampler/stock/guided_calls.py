"""Calls of a stock pipeline, guided by a rule; see `hook.py`.

What the network answers between two scheduler steps is one step of the rule. In the first step of
a run everything is evaluated and the pipeline's formula is solved; in later ones the rule's plan
says which rows are.
"""

from __future__ import annotations

import inspect
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sampler_kernels import Lin, settle
from torch import Tensor

from sampler.core.errors import ModelError
from sampler.core.schedule import Schedule
from sampler.guidance.spaces import in_space
from sampler.pipelines.base import processes
from sampler.stock.first_order import AsCFG, served
from sampler.stock.forms import Form, Unsolved, solve, tolerance
from sampler.stock.interception import Call, intercept
from sampler.stock.negative_calls import GUIDANCE_ON, NegativeCalls
from sampler.stock.readings import is_single, replaced, tensor_of
from sampler.stock.stock_calls import (
    call_on_rows,
    couples_rows,
    guidance_is_off,
    position_of,
    refuse_call,
    refuse_settings,
    sample_of,
)
from sampler.types import Branch, Cond, Guidance, Level, Prediction, Snapshot, Span

log = logging.getLogger("sampler")
_NOTHING = torch.empty(0)  # the value of an answer of another kind
_active: ContextVar[GuidedCalls | None] = ContextVar("guided_pipeline", default=None)


@dataclass(frozen=True)
class Answer:
    """One network call of a step: what it was given and what the pipeline received.

    network: its number; count: rows of the call; raw: the answer as the pipeline received it;
    value: its tensor, empty for an answer of another kind; evaluated: bool [count]; cost: rows of
    the network for each of these.
    """

    network: int
    count: int
    raw: Any
    value: Tensor
    evaluated: Tensor
    cost: int = 1

    @property
    def key(self) -> tuple[int, int]:
        return self.network, self.count


class GuidedCalls:
    """Position in a run, the pipeline's solved formula and the state of the rule.

    Networks are guided only while their pipeline is being called, so that others may share them.

    networks: the denoising networks. nfe: network rows that were evaluated for each image of the
    last run. form: the formula of the last step, None before the first. on_step: receives the
    sample after every step; its snapshots hold no states.
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
        self._first: Mapping[str, Branch] = {}
        self.read_schedule()
        self.nfe: list[int] = []
        self.form: Form | None = None
        self.on_step: Callable[[Snapshot], None] | None = None
        self._times: Any = None
        self._state: Any = None
        self._index = self._position = 0
        self._calling = threading.Lock()
        self._warned = False
        self._forget()

    def _forget(self) -> None:
        """Forget the calls of an unfinished step."""
        self._answers: list[Answer] = []
        self._planned: tuple[Tensor, Span, Mapping[str, Branch]] | None = None

    def read_schedule(self) -> None:
        """Read the scheduler's levels. Raises ModelError for those that are not supported."""
        scheduler = self.pipe.scheduler
        self.schedule = Schedule.from_config(scheduler.config, type(scheduler).__name__)
        trained = processes(type(self.pipe).__name__.replace("Img2Img", ""))
        if self.schedule.process not in trained:  # a velocity read as noise gives no error
            raise ModelError(
                f"{type(self.pipe).__name__} is trained with {' or '.join(trained)} levels, and "
                f"its scheduler, {type(scheduler).__name__}, has {self.schedule.process} ones."
            )

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
            self.read_schedule()
            self._begin(None)
            with intercept(self.pipe.scheduler, self._scheduler_step, "step"):
                result = call(*args, **kwargs)
            if self._answers and self.form is None:
                raise ValueError(
                    f"{type(self.pipe).__name__} gave the answers of its network to another "
                    "scheduler than its own; sampler.guide cannot serve it."
                )
            return result
        finally:
            self._forget()
            _active.reset(token)
            self._calling.release()

    def _begin(self, times: Any) -> None:
        """Begin a run; `set_timesteps` makes a new tensor for each."""
        self._times, self.form, self._index, self._state = times, None, 0, None
        self._read: tuple[Any, list[float], list[float]] | None = None
        self._expected: list[Answer] = []
        self._next: Tensor | None = None
        self._coupled = [couples_rows(network) for network in self.networks]
        self._step_signature = inspect.signature(type(self.pipe.scheduler).step)
        self._forget()

    def network_call(self, number: int, call: Call, args: Any, kwargs: Any) -> Any:
        """Evaluate the planned rows of a call; calls from elsewhere are left alone."""
        if _active.get() is not self:
            return call(*args, **kwargs)
        if self.pipe.scheduler.timesteps is not self._times:
            self._begin(self.pipe.scheduler.timesteps)
        if not self._index and not self._answers:
            refuse_settings(self.pipe)
            if guidance_is_off(self.pipe) and self._wants_uncond():
                raise ValueError(self._off())
            if self.negative and getattr(self.pipe, "do_classifier_free_guidance", False):
                raise ValueError(GUIDANCE_ON)
            self._try_plan(args, kwargs)
        given = sample_of(args, kwargs)
        count = len(given) if isinstance(given, (Tensor, list, tuple)) else 0
        call, cost = self._against(number, call, args, kwargs)
        due, last = self._due(number, count)
        if due is None or last is None:
            raw, value = self._whole(call, args, kwargs, count)
            due = torch.ones(count, dtype=torch.bool)
        elif due.any():
            raw, value, due = self._partial(number, call, args, kwargs, due)
        else:
            raw, value = last.raw, last.value
        self._answers.append(Answer(number, count, raw, value, due, cost))
        return raw

    def _due(self, number: int, count: int) -> tuple[Tensor | None, Answer | None]:
        """Rows [count] that this call has to evaluate, None for all, and the last such answer."""
        form, position = self.form, len(self._answers)
        if form is None or not form.settled or position >= len(self._expected):
            return None, None
        last = self._expected[position]
        known = all(a.key == e.key for a, e in zip(self._answers, self._expected, strict=False))
        if last.key != (number, count) or not known or not form.used[position]:
            return None, None
        if form.extra or self._next is None or not is_single(last.raw) or self._coupled[number]:
            return None, None
        branches = self._plan(form.frame.rows(self._next))
        batch, first = count // form.used[position], sum(form.used[:position])
        roles = form.roles[first : first + form.used[position]]
        found = torch.cat([_mask(branches.get(role), batch) for role in roles])
        return (None if found.all() else found), last

    def _try_plan(self, args: Any, kwargs: Any) -> None:
        """Raise what the rule has against the levels of this run, before the network is called."""
        times = self.pipe.scheduler.timesteps
        self._position = int(getattr(self.pipe.scheduler, "begin_index", None) or 0)
        now, after = self._level(self._position), self._level(self._position + 1)
        span = Span(0, now, after, len(times) - self._position)
        x = sample_of(args, kwargs)
        x = torch.stack(list(x)) if isinstance(x, (list, tuple)) else x
        if isinstance(x, Tensor):
            state = self.rule.start(Cond())
            self._first = self.rule.plan(x, span, Cond("cond", "uncond"), state)

    def _against(self, number: int, call: Call, args: Any, kwargs: Any) -> tuple[Call, int]:
        """The call with the rule's negative prompt in its attention, and its rows per sample."""
        if self.negative is None:
            return call, 1
        branches = self._first
        if self._index:
            x = sample_of(args, kwargs) if self._next is None else self._next
            branches = self._plan(self.form.frame.rows(x) if self.form else x)
        branch, network = branches.get("cond"), self.networks[number]
        if branch is None or branch.mixing is None:
            return call, 1
        mixing = partial(self.negative.call, network, branch.mixing, call)
        return lambda *a, **k: mixing(a, k), self.negative.rows(network)

    def _whole(self, call: Call, args: Any, kwargs: Any, count: int) -> tuple[Any, Tensor]:
        raw = call(*args, **kwargs)
        value = tensor_of(raw)
        return raw, _NOTHING if value is None or len(value) != count else value

    def _partial(
        self, number: int, call: Call, args: Any, kwargs: Any, due: Tensor
    ) -> tuple[Any, Tensor, Tensor]:
        """Evaluate some rows; the others repeat an evaluated row, so that they are finite.

        A network that cannot be called on fewer rows is evaluated in full until the run ends.
        """
        try:
            raw = call_on_rows(call, due.nonzero()[:, 0], len(due), args, kwargs)
        except (RuntimeError, ValueError, IndexError) as error:
            if type(error).__name__ == "OutOfMemoryError":
                raise
            log.info("%s is evaluated in full: %s", type(self.networks[number]).__name__, error)
            self._coupled[number] = True
            return *self._whole(call, args, kwargs, len(due)), torch.ones_like(due)
        part = tensor_of(raw)
        if part is None or len(part) != int(due.sum()):
            raise ValueError(
                f"{type(self.networks[number]).__name__} answers {int(due.sum())} rows with "
                "another number of rows; sampler.guide cannot leave any out."
            )
        source = (due.cumsum(0) - 1).clamp_min(0)
        value = part.index_select(0, source.to(part.device))
        return replaced(raw, value), value, due

    def _scheduler_step(self, call: Call, args: Any, kwargs: Any) -> Any:
        """Give the guided prediction to the scheduler instead of the pipeline's own."""
        if _active.get() is not self:
            return call(*args, **kwargs)
        given = self._step_signature.bind(self.pipe.scheduler, *args, **kwargs).arguments
        output, x = given["model_output"], given["sample"]
        if not self._answers:
            raise ValueError(
                f"{type(self.pipe).__name__} took a step without a guided call of its "
                f"{self._network_names()}; sampler.guide cannot serve it as it is set up."
            )
        guided = self._guided(output, given["timestep"], x)
        if "model_output" in kwargs:
            result = call(*args, **{**kwargs, "model_output": guided})
        else:
            result = call(guided, *args[1:], **kwargs)
        after = result[0] if isinstance(result, tuple) else result.prev_sample
        self._next = after if after.shape == x.shape else None
        self._index += 1
        if self.on_step is not None and self.form is not None:
            rows = self.form.frame.rows(after)
            self.on_step(Snapshot(self._index, rows, (), (), (), tuple(self.nfe)))
        self._expected = self._answers
        self._forget()
        return result

    def _guided(self, output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        """`model_output` with the rule's result in the place of the pipeline's guidance."""
        values = [answer.value for answer in self._answers]
        form = self.form = self._formula(output, sample, values)
        blocks = form.blocks(values, output)
        x = form.frame.rows(sample)
        if self._index == 0:
            self.nfe, self._state = [0] * len(x), self.rule.start(Cond())
        branches, x_planned = self._branches(x, timestep)
        self._count(form)
        guided = self._combine(x, x_planned, self._outputs(form, blocks, branches))
        for weight, block in zip(form.extra, blocks, strict=False):
            guided = guided + form.sign * weight * block.float()
        return form.frame.back(guided, output).to(output.dtype)

    def _formula(self, output: Tensor, x: Tensor, values: list[Tensor]) -> Form:
        """The formula of the last step where it still holds, else the solved one.

        The check holds for rows that were not evaluated too: the pipeline computes with what it was
        handed. Raises ValueError for a formula that cannot be replaced.
        """
        form = self.form
        same = [a.key for a in self._answers] == [a.key for a in self._expected]
        if form is not None and same and form.settled:
            error = form.residual(form.blocks(values, output), output)
            if error <= tolerance(output, *values):
                return form
        try:
            found = solve(output, x, values, type(self.pipe).__name__)
        except Unsolved as error:
            raise ValueError(
                f"sampler.guide cannot replace the guidance of {type(self.pipe).__name__}: {error}."
            ) from None
        known = form is not None and same and form.settled and found.settled
        if form is not None and known and found.roles != form.roles:
            raise ValueError(
                f"{type(self.pipe).__name__} guides by another formula in step {self._index} than "
                "before, with the same calls; sampler.guide cannot serve it."
            )
        self._look_at(found)
        return found

    def _look_at(self, form: Form) -> None:
        if self.negative and "uncond" in form.roles:
            raise ValueError(GUIDANCE_ON)
        if "uncond" not in form.roles and self._index == 0 and self._wants_uncond():
            raise ValueError(self._off())
        if form.token is not None and not getattr(self.rule, "match_norm", None):
            if not self._warned:
                log.warning(
                    "%s sets the norm of every token after guiding; the rule's result replaces "
                    "that, unless it has match_norm = [-1].",
                    type(self.pipe).__name__,
                )
            self._warned = True

    def _wants_uncond(self) -> bool:
        return bool(self.rule.needs - {"cond"})

    def _off(self) -> str:
        parameters = inspect.signature(type(self.pipe).__call__).parameters
        switch = "guidance_scale > 1"
        if "true_cfg_scale" in parameters:
            switch = "a negative prompt and true_cfg_scale > 1"
        return (
            f"This call of {type(self.pipe).__name__} evaluates one branch, and guidance "
            f"{self.rule.name!r} needs an unconditional one: inside sampler.guide the pipeline's "
            f"own guidance must be on, with any value: call it with {switch}; use 'none' where it "
            "has no unconditional branch."
        )

    def _network_names(self) -> str:
        names = [n for n, part in self.pipe.components.items() if isinstance(part, torch.nn.Module)]
        own = [n for n in names if any(getattr(self.pipe, n) is one for one in self.networks)]
        return " or ".join(own or [n for n in names if n.startswith(("unet", "transformer"))])

    def _branches(self, x: Tensor, timestep: Any) -> tuple[Mapping[str, Branch], Tensor]:
        """The plan of this step, and the x that it holds for.

        A plan that was made before the network was called saw the result of the last step, which
        the pipeline may have changed since (inpainting). Raises ValueError for a step that is not
        the next one of the run.
        """
        branches = self._plan(x, timestep)
        assert self._planned is not None
        seen, span, _ = self._planned
        if abs(_number(timestep) - span.now.t) > 1e-3 * max(1.0, abs(span.now.t)):
            raise ValueError(
                f"{type(self.pipe).__name__} took a step at timestep {_number(timestep):g}, and "
                f"the next one of its scheduler is {span.now.t:g}; sampler.guide cannot serve it."
            )
        if seen is x or torch.equal(seen, x):
            return branches, x
        again = self.rule.plan(x, span, Cond("cond", "uncond"), self._state)
        pairs = [(branches.get(k), again.get(k)) for k in {*branches, *again}]
        same = all(torch.equal(_mask(a, len(x)), _mask(b, len(x))) for a, b in pairs)
        return branches, x if same else seen

    def _plan(self, x: Tensor, timestep: Any = None) -> Mapping[str, Branch]:
        """Plan this step once."""
        if self._planned is None:
            span = self.span(x, self._time_ahead() if timestep is None else timestep)
            branches = self.rule.plan(x, span, Cond("cond", "uncond"), self._state)
            self._planned = x, span, branches
        return self._planned[2]

    def _time_ahead(self) -> float:
        times, _ = self._numbers()
        return times[min(self._position + self._index, len(times) - 1)]

    def _numbers(self) -> tuple[list[float], list[float]]:
        """Timesteps and sigmas of the run, copied to the host once; no sigmas where it has none."""
        scheduler = self.pipe.scheduler
        if self._read is None or self._read[0] is not scheduler.timesteps:
            times, sigmas = scheduler.timesteps.tolist(), getattr(scheduler, "sigmas", ())
            known = len(sigmas) == len(times) + 1
            self._read = (
                scheduler.timesteps,
                times,
                torch.as_tensor(sigmas).tolist() if known else [],
            )
        return self._read[1], self._read[2]

    def span(self, x: Tensor, timestep: Any) -> Span:
        """Locate this step in the run: by position, since rounded timesteps may repeat."""
        times, _ = self._numbers()
        if self._index == 0:  # later than 0 for image-to-image
            self._position = position_of(self.pipe.scheduler.timesteps, _number(timestep))
        position = min(self._position + self._index, len(times) - 1)
        now, after = self._level(position), self._level(position + 1)
        return Span(self._index, now, after, len(times) - self._position)

    def _level(self, position: int) -> Level:
        times, sigmas = self._numbers()
        t = float(times[position]) if position < len(times) else 0
        sigma = sigmas[position] if sigmas else math.nan
        if self.schedule.process == "edm":
            return Level(t, 1.0, sigma)
        if not math.isnan(sigma):
            return self.schedule.level_of(t, sigma)
        return self.schedule.level(t) if position < len(times) else Level(0, 1.0, 0.0)

    def _count(self, form: Form) -> None:
        """Add the evaluated rows of this step to `nfe`."""
        for answer, count in zip(self._answers, form.used, strict=True):
            per_row = answer.evaluated.view(count, -1).sum(0).tolist() if count else ()
            for row, rows in enumerate(per_row):
                self.nfe[row] += rows * answer.cost

    def _outputs(
        self, form: Form, blocks: Sequence[Tensor], branches: Mapping[str, Branch]
    ) -> dict[str, Tensor]:
        """Planned predictions by branch; rows as `Branch` says where a plan leaves some out."""
        by_role = {role: form.sign * b for role, b in zip(form.roles, blocks, strict=True)}
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

    def _combine(self, x: Tensor, x_planned: Tensor, outs: Mapping[str, Tensor]) -> Tensor:
        """Guided output in the network's own parametrisation; advances the rule's state."""
        assert self._planned is not None
        span, kind, edm = self._planned[1], self.schedule.prediction, self.schedule.process == "edm"
        x = x.float()
        make = self.schedule.predict if edm else partial(Prediction.of, kind)
        preds = {k: make(x, out, span.now) for k, out in outs.items()}
        pred, state = self.rule.combine(x_planned.float(), preds, span, self._state)
        value = self.schedule.output_of(x, pred, span.now) if edm else in_space(pred, kind)
        guided, self._state = settle((Lin.of(value), state))
        return guided


def _number(timestep: Any) -> float:
    return float(torch.as_tensor(timestep).flatten()[0])


def _mask(branch: Branch | None, batch: int) -> Tensor:
    """Rows [B] that a branch evaluates, on the CPU."""
    if branch is None:
        return torch.zeros(batch, dtype=torch.bool)
    return torch.ones(batch, dtype=torch.bool) if branch.rows is None else branch.rows.cpu()
