"""Batched evaluation of the branches that a rule plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from operator import is_
from typing import Any, Literal

import torch
from sampler_kernels import leaves
from torch import Tensor

from sampler.core.stacking import cat, cat_level, evaluated_rows, stack, take_rows
from sampler.types import Branch, Level, Prediction, Span, Watch

HALF_DTYPES = (torch.float16, torch.bfloat16)


class BatchedDenoiser:
    """Stack the samples of all branches of a model, evaluate once, and split the output.

    A subclass defines `forward` (and `predict` where its outputs need preconditioning).
    """

    models: tuple[str, ...] = ("main",)
    # Cache of `_stacked`: the last conditions, the versions of their tensors, and the result.
    _memo: tuple[list[Any], list[int], Any] = ([], [], None)

    def forward(self, x: Tensor, level: Level, cond: Any, model: str) -> Tensor:
        """Raw output [R, ...] of the network for x [R, ...] and their conditions."""
        raise NotImplementedError

    def apart(self, model: str) -> bool:
        """Return True for a model that is called once for each branch, within `context`."""
        return False

    def context(self, level: Level, model: str, branch: str) -> AbstractContextManager[None]:
        """Context of the call of one branch."""
        return nullcontext()

    def mixed_rows(self, model: str) -> int:
        """Rows of the network per sample of a branch with a negative prompt.

        Raises ValueError for a network whose attention cannot be reached.
        """
        raise ValueError(
            "nag: this denoiser is a function, whose attention cannot be reached; use it in "
            "sampler.load(pipe).generate(...)."
        )

    def forward_mixed(
        self, x: Tensor, level: Level, cond: Any, negative: Any, mixing: Any, model: str
    ) -> Tensor:
        """Raw output [R, ...] with `mixing` between the attention to `cond` and to `negative`."""
        raise NotImplementedError

    def recording(
        self,
        blocks: Sequence[str] = (),
        attention: bool | Literal["grad"] = False,
        model: str = "main",
    ) -> AbstractContextManager[Any]:
        """Record what a network does; ValueError for a denoiser that is a function."""
        raise ValueError(
            "recording: this denoiser is a function, whose attention cannot be reached; use "
            "sampler.load(pipe)."
        )

    def predict(self, x: Tensor, out: Tensor, level: Level, model: str) -> Prediction:
        """Interpret the raw output as a Prediction."""
        raise NotImplementedError

    def __call__(
        self, x: Tensor, span: Span, branches: Mapping[str, Branch], nfe: list[int]
    ) -> dict[str, Prediction]:
        """A Prediction [B, ...] for every branch with rows; one `forward` per model.

        Adds to nfe[b] each row that is evaluated for row b. Rows that "cond" leaves out are 0;
        rows that another branch leaves out are those of "cond", or 0 where "cond" is not there.
        A branch whose mask is empty is the same as no branch. Raises ValueError for an unknown
        model.
        """
        level, count = span.now, x.shape[0]
        calls: dict[tuple[str, Any, str], list[str]] = {}
        for name, branch in branches.items():
            own = name if self.apart(branch.model) else ""
            calls.setdefault((branch.model, branch.mixing, own), []).append(name)
        outs: dict[str, tuple[Tensor, Tensor | None]] = {}
        answers: dict[str, Any] = {}
        for (model, mixing, own), names in calls.items():
            if model not in self.models:
                known = ", ".join(self.models)
                raise ValueError(f"Unknown model {model!r}; this denoiser has {known}.")
            cost = 1 if mixing is None else self.mixed_rows(model)
            rows = {
                name: evaluated_rows(branches[name], count, nfe, x.device, cost) for name in names
            }
            rows = {name: at for name, at in rows.items() if at is None or at.shape[0]}
            if rows:
                with self.context(level, model, own) if own else nullcontext():
                    found, seen = self._evaluate(x, level, branches, rows, model)
                outs |= {name: (found[name], at) for name, at in rows.items()}
                answers |= seen
        preds = self._filled(x, branches, outs, level)
        return preds | {name: replace(preds[name], seen=seen) for name, seen in answers.items()}

    def _evaluate(
        self,
        x: Tensor,
        level: Level,
        branches: Mapping[str, Branch],
        rows: Mapping[str, Tensor | None],
        model: str,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Call a network once for the rows of some branches.

        Returns the raw output of each branch, and the attention maps of those with a `Watch`.
        """
        parts = {name: x if at is None else x[at] for name, at in rows.items()}
        chosen, first = list(rows.values()), branches[next(iter(rows))]
        cond = self._stacked([branches[name].cond for name in rows], chosen)
        inputs = (cat(list(parts.values())), cat_level(level, chosen), cond)
        call = partial(self.forward, *inputs, model)
        if first.mixing is not None:
            negative = stack([take_rows(branches[name].negative, at) for name, at in rows.items()])
            call = partial(self.forward_mixed, *inputs, negative, first.mixing, model)
        watched = [name for name in rows if branches[name].watch is not None]
        seen: dict[str, Any] = {}
        if watched:
            out, maps = self._watched(call, parts, branches[watched[0]].watch, level, model)
            seen = {name: maps[name] for name in watched}
        else:
            out = call()
        if out.dtype not in HALF_DTYPES or x.dtype is torch.float64:
            out = out.to(x.dtype)  # half precision is converted where it is first used
        cut = out.split_with_sizes([part.shape[0] for part in parts.values()])
        return dict(zip(rows, cut, strict=True)), seen

    def _watched(
        self,
        call: Callable[[], Tensor],
        parts: Mapping[str, Tensor],
        watch: Watch | None,
        level: Level,
        model: str,
    ) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
        """Output of a call, and the maps {branch: {layer: [R, N, T]}} of a recording of it.

        parts: x of the branches, in the order in which they are stacked.
        """
        score = None if watch is None else watch.score
        sizes = [part.shape[0] for part in parts.values()]
        with self.recording((), True if score is None else "grad", model) as recording:
            if score is None:
                out = call()
                maps = {name: found[-1] for name, found in recording.attention.items()}
            else:
                with torch.enable_grad():
                    out = call()
                    outs = zip(parts.items(), out.split_with_sizes(sizes), strict=True)
                    preds = {
                        name: self.predict(x, part.to(x.dtype), level, model)
                        for (name, x), part in outs
                    }
                    maps = recording.weighted(score(preds))
                out = out.detach()
        # A call on [positive; negative] rows begins with the positive ones.
        cut = {layer: found[: sum(sizes)].split_with_sizes(sizes) for layer, found in maps.items()}
        return out, {
            name: {layer: rows[k] for layer, rows in cut.items()} for k, name in enumerate(parts)
        }

    def _stacked(self, conds: list[Any], rows: list[Tensor | None]) -> Any:
        """Concatenate the conditions of the evaluated rows, one branch after the other.

        A run evaluates the same branches at every step, so the last result is cached, keyed by the
        identity and the versions of the tensors it was made from. The cache is bypassed where
        gradients flow (a graph serves one backward pass) and where rows are left out.
        """
        if len(conds) == 1 and rows[0] is None:
            return conds[0]
        if torch.is_grad_enabled() or any(r is not None for r in rows):
            return stack([take_rows(c, r) for c, r in zip(conds, rows, strict=True)])
        parts = [*conds, *leaves(conds)]
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if any(t.is_inference() for t in tensors):  # these do not count how often they change
            return stack(conds)
        versions = [t._version for t in tensors]
        known, before, stacked = self._memo
        same = len(known) == len(parts) and all(map(is_, known, parts))
        if not same or versions != before:
            stacked = stack(conds)
            self._memo = (parts, versions, stacked)
        return stacked

    def _filled(
        self,
        x: Tensor,
        branches: Mapping[str, Branch],
        outs: Mapping[str, tuple[Tensor, Tensor | None]],
        level: Level,
    ) -> dict[str, Prediction]:
        """The evaluated branches as Predictions [B, ...], with the rows that they leave out."""
        found: dict[str, Prediction] = {}
        cond: Tensor | None = None
        # "cond" first: it is what others leave out
        for name in sorted(outs, key=lambda name: name != "cond"):
            out, rows = outs[name]
            if rows is not None:
                base = out.new_zeros((x.shape[0], *out.shape[1:])) if cond is None else cond
                out = base.index_copy(0, rows, out)
            if name == "cond":
                cond = out
            found[name] = self.predict(x, out, level, branches[name].model)
        return found
