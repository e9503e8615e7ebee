"""The network calls of a stock pipeline, guided by a rule; see `hook.py`.

A call of the pipeline's network becomes one step of the rule: plan, the rows that it asks for,
combine. What a run carries along lives here, and is thrown away when a run starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from diffusers.hooks.hooks import ModelHook
from sampler_kernels import map_tree, settle
from torch import Tensor

from sampler.core.schedule import Schedule
from sampler.errors import ModelError
from sampler.guidance.spaces import in_space
from sampler.stock.stock_calls import (
    OFF,
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
    """How a pipeline class calls its network.

    unit: what its timesteps are multiplied with. backwards: the network's clock runs from 0 (noise)
    to 1, and its output is the negative velocity. second: a network that takes over in mid-run.
    switch: what turns the pipeline's guidance on.
    """

    network: str
    order: Order
    unit: float = 1.0
    backwards: bool = False
    second: str | None = None
    switch: str = "guidance_scale > 1"


class GuidedCalls(ModelHook):
    """What both layouts share: where in a run a call is, and the rule's state."""

    def __init__(self, pipe: Any, layout: Layout, rule: Guidance) -> None:
        super().__init__()
        self.pipe, self.layout, self.rule = pipe, layout, rule
        self.schedule = Schedule.from_config(pipe.scheduler.config, type(pipe.scheduler).__name__)
        if self.schedule.process == "edm":
            raise ModelError("sampler.guide does not serve EDM schedulers; use sampler.load.")
        scale = getattr(pipe, layout.network).config.get("timestep_scale") or 1.0
        self.unit, self.sign = layout.unit * scale, -1.0 if layout.backwards else 1.0
        self.nfe: list[int] = []
        self._variances: Tensor | None = None
        self._times: Any = None
        self._state: Any = None
        self._index = 0

    def finish(self) -> None:
        """Called when the context ends without an error."""

    def span(self, x: Tensor, timestep: Any) -> Span:
        """Where this evaluation is; a new run of the pipeline starts the rule anew.

        Every run calls `set_timesteps`, which makes a new tensor of them.
        """
        times = self.pipe.scheduler.timesteps
        told = float(torch.as_tensor(timestep).flatten()[0]) / self.unit
        told = self.schedule.train_steps - told if self.layout.backwards else told
        if times is not self._times or len(self.nfe) != x.shape[0]:
            self._times, self._state, self._index = times, self.rule.start(Cond()), 0
            self.nfe, self._variances = [0] * x.shape[0], None
            self._position = position_of(times, told)  # later than 0 for image-to-image
        position = min(self._position + self._index, len(times) - 1)
        after = times[position + 1] if position + 1 < len(times) else None
        now = self._level(times[position])
        following = Level(0, 1.0, 0.0) if after is None else self._level(after)
        return Span(self._index, now, following, len(times) - self._position)

    def _level(self, t: Any) -> Level:
        return self.schedule.level(float(t))

    def plan(self, x: Tensor, span: Span) -> Mapping[str, Branch]:
        return self.rule.plan(x, span, Cond("cond", "uncond"), self._state)

    def combine(self, x: Tensor, span: Span, outs: Mapping[str, Tensor]) -> Tensor:
        """g in the network's own parametrisation; advances the rule's state."""
        kind = self.schedule.prediction
        x = x.float()
        preds = {k: Prediction.of(kind, x, self.sign * out, span.now) for k, out in outs.items()}
        pred, state = self.rule.combine(x, preds, span, self._state)
        guided, self._state = settle((in_space(pred, kind), state))
        self._index += 1
        return self.sign * guided

    def count(self, rows: Tensor | None) -> None:
        for row in range(len(self.nfe)) if rows is None else rows.tolist():
            self.nfe[row] += 1

    def call(self, rows: Tensor | None, batch: int, args: Any, kwargs: Any) -> Any:
        """The network on some rows of its batch (None: all of them, the call as it came)."""
        forward: Any = self.fn_ref.original_forward
        if rows is None:
            return forward(*args, **kwargs)

        def cut(leaf: Any) -> Any:
            whole = isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch
            return leaf[rows.to(leaf.device)] if whole else leaf

        def part(value: Any) -> Any:
            if isinstance(value, list) and len(value) == batch:  # a list of samples
                return [value[row] for row in rows.tolist()]
            return map_tree(cut, value)

        return forward(*map(part, args), **{name: part(value) for name, value in kwargs.items()})


class BatchedCalls(GuidedCalls):
    """One call per step on both halves.

    A network with learned variances answers with more channels than x has. They are returned as
    they are; on a step without a call, those of the last call are.
    """

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        given, timestep = inputs(args, kwargs)
        both: Tensor = torch.stack(given) if isinstance(given, list) else given
        refuse(self.pipe, kwargs, both)
        batch = both.shape[0] // 2
        x = both[:batch]
        span = self.span(x, timestep)
        outs, raw = self._evaluated(x, span, args, kwargs)
        guided = self.combine(x, span, {k: v[:, : x.shape[1]] for k, v in outs.items()})
        like = next(iter(outs.values()), x)
        if outs:
            self._variances = like[:, x.shape[1] :]
        rest = () if self._variances is None else (self._variances,)
        guided = torch.cat([guided.to(like.dtype), *rest], 1)
        twice = torch.cat([guided, guided])
        return (list(twice),) if isinstance(given, list) else wrapped(twice, raw)

    def _evaluated(
        self, x: Tensor, span: Span, args: Any, kwargs: Any
    ) -> tuple[dict[str, Tensor], Any]:
        """The outputs that the rule asks for, [B, ...], and the network's answer as it came."""
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
        whole = len(names) == 2 and all(len(index[name]) == batch for name in names)
        rows = None if whole else torch.cat([index[k] + first[k] for k in names])
        raw = self.call(rows, 2 * batch, args, kwargs)
        parts = tensor_of(raw).split([len(index[k]) for k in names])
        outs = dict(zip(names, parts, strict=True))
        for name in sorted(names):  # "cond" first: it is what others leave out
            base = None if name == "cond" else outs.get("cond")
            outs[name] = filled(outs[name], index[name], batch, base)
        return outs, raw


class _Pending(NamedTuple):
    """A cond call whose uncond call is to come."""

    told: float
    span: Span
    branches: Mapping[str, Branch]
    cond: Tensor


class SequentialCalls(GuidedCalls):
    """A call for cond, then a call for uncond at every step, as with true_cfg_scale > 1."""

    _pending: _Pending | None = None

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            raise ValueError("sampler.guide writes in place here; call the pipeline as usual.")
        x, timestep = inputs(args, kwargs)
        told = float(torch.as_tensor(timestep).flatten()[0])
        if self._pending is None:
            return self._first(x, told, args, kwargs)
        if self._pending.told != told or self._times is not self.pipe.scheduler.timesteps:
            self.finish()
        pending, self._pending = self._pending, None
        return self._second(pending, x, args, kwargs)

    def finish(self) -> None:
        if self._pending is not None:
            self._pending = None
            raise ValueError(f"{OFF} {self.layout.switch}.")

    def _first(self, x: Tensor, told: float, args: Any, kwargs: Any) -> Any:
        span = self.span(x, told)
        branches = self.plan(x, span)
        rows = index_of(branches.get("cond", _NO_ROWS).rows, x.shape[0])
        if len(rows):
            raw = self._counted(rows, x.shape[0], args, kwargs)
            cond = filled(tensor_of(raw), rows, x.shape[0], None)
        else:
            branches = {name: branch for name, branch in branches.items() if name != "cond"}
            cond, raw = torch.zeros_like(x), None
        self._pending = _Pending(told, span, branches, cond)
        return wrapped(cond, raw)

    def _second(self, pending: _Pending, x: Tensor, args: Any, kwargs: Any) -> Any:
        _, span, branches, cond = pending
        outs = {"cond": cond} if "cond" in branches else {}
        raw: Any = None
        rows = index_of(branches.get("uncond", _NO_ROWS).rows, x.shape[0])
        if len(rows):
            raw = self._counted(rows, x.shape[0], args, kwargs)
            outs["uncond"] = filled(tensor_of(raw), rows, x.shape[0], outs.get("cond"))
        guided = self.combine(x, span, outs).to(cond.dtype)
        cond.copy_(guided)
        return wrapped(guided, raw)

    def _counted(self, rows: Tensor, batch: int, args: Any, kwargs: Any) -> Any:
        self.count(rows)
        return self.call(None if len(rows) == batch else rows, batch, args, kwargs)


class AlsoCalls(ModelHook):
    """The calls of a pipeline's second network, which are steps of the same run."""

    def __init__(self, main: GuidedCalls) -> None:
        super().__init__()
        self.main: Any = main

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        own = self.main.fn_ref
        self.main.fn_ref = self.fn_ref
        try:
            return self.main.new_forward(module, *args, **kwargs)
        finally:
            self.main.fn_ref = own
