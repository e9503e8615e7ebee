"""Network calls of a stock pipeline, guided by a rule; see `hook.py`.

A call of the pipeline's network becomes one step of the rule: plan, evaluate the planned rows,
combine. The state of a run is reset when the next run starts.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from sampler_kernels import settle
from torch import Tensor

from sampler.core.errors import ModelError
from sampler.core.schedule import Schedule
from sampler.guidance.spaces import in_space
from sampler.pipelines.base import processes
from sampler.stock.interception import Call, intercept
from sampler.stock.stock_calls import (
    GUIDANCE_OFF_HINT,
    call_on_rows,
    filled,
    index_of,
    inputs,
    position_of,
    refuse,
    tensor_of,
    wrapped,
)
from sampler.types import Branch, Cond, Guidance, Level, Prediction, Span

_NO_ROWS = Branch(rows=torch.zeros(0, dtype=torch.bool))
Order = Literal["uncond first", "cond first", "sequential"]


@dataclass(frozen=True)
class Layout:
    """Calls that a pipeline class makes to its network.

    unit: factor on its timesteps. backwards: the network's time runs from 0 (noise) to 1, and its
    output is the negative velocity. second: a network for the second part of the run. switch: the
    arguments that turn the pipeline's guidance on.
    """

    network: str
    order: Order
    unit: float = 1.0
    backwards: bool = False
    second: str | None = None
    switch: str = "guidance_scale > 1"


_active: ContextVar[GuidedCalls | None] = ContextVar("guided_pipeline", default=None)


class GuidedCalls:
    """Position in a run and state of the rule; subclasses guide the two call layouts.

    Networks are guided only while their pipeline is being called, so that others may share them.
    """

    def __init__(self, pipe: Any, layout: Layout, rule: Guidance) -> None:
        self.pipe, self.layout, self.rule = pipe, layout, rule
        self.read_schedule()
        self.networks = [
            network
            for name in (layout.network, layout.second)
            if name is not None and (network := getattr(pipe, name)) is not None
        ]
        if not self.networks:
            raise ModelError(f"This {type(pipe).__name__} has no {layout.network} to guide.")
        scale = self.networks[0].config.get("timestep_scale") or 1.0
        self.unit, self.sign = layout.unit * scale, -1.0 if layout.backwards else 1.0
        self.nfe: list[int] = []
        self._variances: Tensor | None = None
        self._times: Any = None
        self._state: Any = None
        self._index = 0
        self._unused = False  # an evaluation that no scheduler step has consumed yet
        self._calling = threading.Lock()

    def read_schedule(self) -> None:
        """Read the scheduler's levels. Raises ModelError for those that are not supported."""
        scheduler = self.pipe.scheduler
        self.schedule = Schedule.from_config(scheduler.config, type(scheduler).__name__)
        if self.schedule.process == "edm":
            raise ModelError("sampler.guide does not serve EDM schedulers; use sampler.load.")
        trained = processes(type(self.pipe).__name__.replace("Img2Img", ""))
        if self.schedule.process not in trained:  # a velocity read as noise gives no error
            raise ModelError(
                f"{type(self.pipe).__name__} is trained with {' or '.join(trained)} levels, and "
                f"its scheduler, {type(scheduler).__name__}, has {self.schedule.process} ones."
            )

    def pipeline_call(self, call: Call, args: Any, kwargs: Any) -> Any:
        """Call the pipeline with its networks guided.

        Raises ValueError for a second call before this one ends, for a scheduler step on an output
        that was not guided, and for an evaluation that the pipeline does not use.
        """
        if not self._calling.acquire(blocking=False):
            raise ValueError(
                "This guided pipeline is already being called, by another thread or from its own "
                "callback; use one pipeline per thread."
            )
        token = _active.set(self)
        try:
            self.read_schedule()
            with intercept(self.pipe.scheduler, self._scheduler_step, "step"):
                result = call(*args, **kwargs)
            self.finish()
            return result
        finally:
            self.reset()
            _active.reset(token)
            self._calling.release()

    def network_call(self, call: Call, args: Any, kwargs: Any) -> Any:
        """Guide a call of one of the networks; calls from elsewhere are left alone."""
        if _active.get() is not self:
            return call(*args, **kwargs)
        result = self.guided(call, args, kwargs)
        self._unused = True
        return result

    def _scheduler_step(self, call: Call, args: Any, kwargs: Any) -> Any:
        if not self._unused:
            raise ValueError(
                f"{type(self.pipe).__name__} took a step without a guided call of its "
                f"{self.layout.network}; sampler.guide cannot serve it as it is set up."
            )
        self.finish()
        self._unused = False
        return call(*args, **kwargs)

    def guided(self, call: Call, args: Any, kwargs: Any) -> Any:
        """Evaluate the planned rows and return the guided output as the pipeline expects it."""
        raise NotImplementedError

    def finish(self) -> None:
        """Raise ValueError for a call whose counterpart is missing."""

    def reset(self) -> None:
        """Forget an unfinished step."""
        self._unused = False

    def span(self, x: Tensor, timestep: Any) -> Span:
        """Locate this evaluation in the run; the first one of a run resets the rule's state.

        A run is recognised by its timesteps: `set_timesteps` creates a new tensor.
        """
        times = self.pipe.scheduler.timesteps
        t = float(torch.as_tensor(timestep).flatten()[0]) / self.unit
        t = self.schedule.train_steps - t if self.layout.backwards else t
        if times is not self._times or len(self.nfe) != x.shape[0]:
            self._times, self._state, self._index = times, self.rule.start(Cond()), 0
            self.nfe, self._variances = [0] * x.shape[0], None
            self._position = position_of(times, t)  # later than 0 for image-to-image
        position = min(self._position + self._index, len(times) - 1)
        now, after = self._level(position), self._level(position + 1)
        return Span(self._index, now, after, len(times) - self._position)

    def _level(self, position: int) -> Level:
        """Level of a step of the scheduler; by position, since rounded timesteps may repeat."""
        times, sigmas = self.pipe.scheduler.timesteps, getattr(self.pipe.scheduler, "sigmas", ())
        t = float(times[position]) if position < len(times) else 0
        sigma = float(sigmas[position]) if len(sigmas) == len(times) + 1 else math.nan
        if not math.isnan(sigma):
            return self.schedule.level_of(t, sigma)
        return self.schedule.level(t) if position < len(times) else Level(0, 1.0, 0.0)

    def plan(self, x: Tensor, span: Span) -> Mapping[str, Branch]:
        return self.rule.plan(x, span, Cond("cond", "uncond"), self._state)

    def combine(self, x: Tensor, span: Span, outs: Mapping[str, Tensor]) -> Tensor:
        """Guided output in the network's own parametrisation; advances the rule's state."""
        kind = self.schedule.prediction
        x = x.float()
        preds = {k: Prediction.of(kind, x, self.sign * out, span.now) for k, out in outs.items()}
        pred, state = self.rule.combine(x, preds, span, self._state)
        guided, self._state = settle((in_space(pred, kind), state))
        self._index += 1
        return self.sign * guided

    def count(self, rows: Tensor) -> None:
        for row in rows.tolist():
            self.nfe[row] += 1


class BatchedCalls(GuidedCalls):
    """One call per step on both halves.

    A network with learned variances has more output channels than x. They are passed through; on a
    step without a call, those of the last call are repeated.
    """

    def guided(self, call: Call, args: Any, kwargs: Any) -> Any:
        given, timestep = inputs(args, kwargs)
        both: Tensor = torch.stack(given) if isinstance(given, list) else given
        refuse(self.pipe, kwargs, both)
        batch = both.shape[0] // 2
        x = both[:batch]
        span = self.span(x, timestep)
        outs, raw = self._evaluated(x, span, call, args, kwargs)
        guided = self.combine(x, span, {k: v[:, : x.shape[1]] for k, v in outs.items()})
        like = next(iter(outs.values()), x)
        if outs:
            self._variances = like[:, x.shape[1] :]
        rest = () if self._variances is None else (self._variances,)
        guided = torch.cat([guided.to(like.dtype), *rest], 1)
        twice = torch.cat([guided, guided])
        return (list(twice),) if isinstance(given, list) else wrapped(twice, raw)

    def _evaluated(
        self, x: Tensor, span: Span, call: Call, args: Any, kwargs: Any
    ) -> tuple[dict[str, Tensor], Any]:
        """Return the planned outputs {branch: [B, ...]} and the raw output of the network."""
        batch = x.shape[0]
        planned = self.plan(x, span)
        index = {k: index_of(branch.rows, batch) for k, branch in planned.items()}
        if not any(len(rows) for rows in index.values()):
            return {}, None
        first = {"uncond": 0, "cond": batch}
        if self.layout.order == "cond first":
            first = {"cond": 0, "uncond": batch}
        names = sorted((k for k in index if len(index[k])), key=lambda name: first[name])
        for name in names:
            self.count(index[name])
        rows = torch.cat([index[k] + first[k] for k in names])
        raw = call_on_rows(call, rows, 2 * batch, args, kwargs)
        parts = tensor_of(raw).split([len(index[k]) for k in names])
        outs = dict(zip(names, parts, strict=True))
        for name in sorted(names):  # "cond" first: it fills the rows that others leave out
            base = None if name == "cond" else outs.get("cond")
            outs[name] = filled(outs[name], index[name], batch, base)
        return outs, raw


class _Pending(NamedTuple):
    """Conditional call whose unconditional counterpart has not come yet."""

    timestep: float
    span: Span
    branches: Mapping[str, Branch]
    cond: Tensor


class SequentialCalls(GuidedCalls):
    """A call for cond, then one for uncond at every step, as with true_cfg_scale > 1."""

    _pending: _Pending | None = None

    def guided(self, call: Call, args: Any, kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            raise ValueError("sampler.guide writes in place here; call the pipeline as usual.")
        x, timestep = inputs(args, kwargs)
        t = float(torch.as_tensor(timestep).flatten()[0])
        if self._pending is None:
            return self._first(x, t, call, args, kwargs)
        if self._pending.timestep != t or self._times is not self.pipe.scheduler.timesteps:
            self.finish()
        pending, self._pending = self._pending, None
        return self._second(pending, x, call, args, kwargs)

    def reset(self) -> None:
        super().reset()
        self._pending = None

    def finish(self) -> None:
        if self._pending is not None:
            raise ValueError(f"{GUIDANCE_OFF_HINT} {self.layout.switch}.")

    def _first(self, x: Tensor, t: float, call: Call, args: Any, kwargs: Any) -> Any:
        span = self.span(x, t)
        branches = self.plan(x, span)
        rows = index_of(branches.get("cond", _NO_ROWS).rows, x.shape[0])
        if len(rows):
            raw = self._counted(call, rows, x.shape[0], args, kwargs)
            cond = filled(tensor_of(raw), rows, x.shape[0], None)
        else:
            branches = {name: branch for name, branch in branches.items() if name != "cond"}
            cond, raw = torch.zeros_like(x), None
        self._pending = _Pending(t, span, branches, cond)
        return wrapped(cond, raw)

    def _second(self, pending: _Pending, x: Tensor, call: Call, args: Any, kwargs: Any) -> Any:
        _, span, branches, cond = pending
        outs = {"cond": cond} if "cond" in branches else {}
        raw: Any = None
        rows = index_of(branches.get("uncond", _NO_ROWS).rows, x.shape[0])
        if len(rows):
            raw = self._counted(call, rows, x.shape[0], args, kwargs)
            outs["uncond"] = filled(tensor_of(raw), rows, x.shape[0], outs.get("cond"))
        guided = self.combine(x, span, outs).to(cond.dtype)
        cond.copy_(guided)
        return wrapped(guided, raw)

    def _counted(self, call: Call, rows: Tensor, batch: int, args: Any, kwargs: Any) -> Any:
        self.count(rows)
        return call_on_rows(call, rows, batch, args, kwargs)
