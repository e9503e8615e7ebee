"""Batched evaluation of the branches that a rule plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import compress
from operator import is_
from typing import Any, Literal

import torch
from sampler_kernels import leaves
from torch import Tensor

from sampler.core.stacking import cat, cat_level, evaluated_rows, stack, take_rows
from sampler.types import Branch, Level, Prediction, Span

NO_CONTEXT = nullcontext()
HALF_DTYPES = (torch.float16, torch.bfloat16)
Part = tuple[Tensor, Tensor | None]  # raw output of a branch, and the rows that it is of


class BatchedDenoiser:
    """Stack the samples of all branches of a model, evaluate once, and split the output.

    A subclass defines `forward` (and `predict` where its outputs need preconditioning).
    """

    models: tuple[str, ...] = ("main",)
    # Cache of `_stacked`: the last conditions, their tensors with versions, and the result.
    _memo: tuple[list[Any], list[Tensor], list[int], Any] = ([], [], [], None)

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
        level, outs, answers = span.now, dict[str, Part](), dict[str, Any]()
        for (model, _, own), asked in self._calls(branches).items():
            with self.context(level, model, own) if own else NO_CONTEXT:
                found, seen = self._evaluate(x, level, asked, nfe)
            outs |= found
            answers |= seen
        preds = self._filled(x, branches, outs, level)
        for name, seen in answers.items():
            preds[name] = replace(preds[name], seen=seen)
        return preds

    def _calls(self, branches: Mapping[str, Branch]) -> dict[Any, dict[str, Branch]]:
        """The branches that share a call of a network, by (model, mixing, context of their own)."""
        calls: dict[Any, dict[str, Branch]] = {}
        apart: dict[str, bool] = {}
        for name, branch in branches.items():
            model = branch.model
            if model not in apart:
                if model not in self.models:
                    known = ", ".join(self.models)
                    raise ValueError(f"Unknown model {model!r}; this denoiser has {known}.")
                apart[model] = self.apart(model)
            key = (model, branch.mixing, name if apart[model] else "")
            calls.setdefault(key, {})[name] = branch
        return calls

    def _evaluate(
        self, x: Tensor, level: Level, asked: Mapping[str, Branch], nfe: list[int]
    ) -> tuple[dict[str, Part], dict[str, Any]]:
        """Call a network once for the rows of some branches.

        Returns the raw output of each branch, and the attention maps of those with a `Watch`.
        """
        first, count = next(iter(asked.values())), x.shape[0]
        model, mixing = first.model, first.mixing
        cost = 1 if mixing is None else self.mixed_rows(model)
        rows: list[Tensor | None] = []
        whole, watched = True, False
        for branch in asked.values():
            at = evaluated_rows(branch, count, nfe, x.device, cost)
            rows.append(at)
            whole, watched = whole and at is None, watched or branch.watch is not None
        if not whole:
            kept = [at is None or bool(at.shape[0]) for at in rows]
            asked, rows = dict(compress(asked.items(), kept)), [*compress(rows, kept)]
            if not asked:
                return {}, {}
            watched = any(branch.watch is not None for branch in asked.values())
        parts = [x if at is None else x[at] for at in rows]
        cond = self._stacked([branch.cond for branch in asked.values()], None if whole else rows)
        call = partial(self.forward, cat(parts), cat_level(level, rows), cond, model)
        if mixing is not None:
            negatives = zip((branch.negative for branch in asked.values()), rows, strict=True)
            negative = stack([take_rows(value, at) for value, at in negatives])
            call = partial(self.forward_mixed, *call.args[:3], negative, mixing, model)
        out, seen = self._watched(call, parts, asked, level, model) if watched else (call(), {})
        if out.dtype is not x.dtype and (out.dtype not in HALF_DTYPES or x.dtype is torch.float64):
            out = out.to(x.dtype)  # half precision is converted where it is first used
        if len(parts) == 1:
            return {name: (out, rows[0]) for name in asked}, seen
        cut = out.split_with_sizes([part.shape[0] for part in parts])
        return dict(zip(asked, zip(cut, rows, strict=True), strict=True)), seen

    def _watched(
        self,
        call: Callable[[], Tensor],
        parts: Sequence[Tensor],
        asked: Mapping[str, Branch],
        level: Level,
        model: str,
    ) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
        """Output of a call, and the maps {branch: {layer: [R, N, T]}} of branches with a `Watch`.

        parts: x of the branches, in the order in which they are stacked.
        """
        watch = next(branch.watch for branch in asked.values() if branch.watch is not None)
        score, sizes = watch.score, [part.shape[0] for part in parts]
        with self.recording((), True if score is None else "grad", model) as recording:
            if score is None:
                out = call()
                maps = {name: found[-1] for name, found in recording.attention.items()}
            else:
                with torch.enable_grad():
                    out = call()
                    outs = zip(asked, parts, out.split_with_sizes(sizes), strict=True)
                    preds = {
                        name: self.predict(x, cut.to(x.dtype), level, model)
                        for name, x, cut in outs
                    }
                    maps = recording.weighted(score(preds))
                out = out.detach()
        # A call on [positive; negative] rows begins with the positive ones.
        cut = {layer: found[: sum(sizes)].split_with_sizes(sizes) for layer, found in maps.items()}
        return out, {
            name: {layer: rows[k] for layer, rows in cut.items()}
            for k, (name, branch) in enumerate(asked.items())
            if branch.watch is not None
        }

    def _stacked(self, conds: list[Any], rows: list[Tensor | None] | None) -> Any:
        """Concatenate the conditions of the evaluated rows, None for all, branch after branch.

        A run evaluates the same branches at every step, so the last result is cached, keyed by the
        identity and the versions of the tensors it was made from. The cache is bypassed where
        gradients flow (a graph serves one backward pass) and where rows are left out.
        """
        if rows is not None:
            return stack([take_rows(c, at) for c, at in zip(conds, rows, strict=True)])
        if len(conds) == 1 or torch.is_grad_enabled():
            return stack(conds)
        known, tensors, versions, stacked = self._memo
        parts = [*conds, *leaves(conds)]
        same = len(known) == len(parts) and all(map(is_, known, parts))
        if not same or versions != [t._version for t in tensors]:
            stacked = stack(conds)
            tensors = [part for part in parts if isinstance(part, Tensor)]
            if not any(t.is_inference() for t in tensors):  # these do not count their changes
                self._memo = (parts, tensors, [t._version for t in tensors], stacked)
        return stacked

    def _filled(
        self, x: Tensor, branches: Mapping[str, Branch], outs: Mapping[str, Part], level: Level
    ) -> dict[str, Prediction]:
        """The evaluated branches as Predictions [B, ...], with the rows that they leave out."""
        found: dict[str, Prediction] = {}
        cond: Tensor | None = None
        # "cond" first: it is what others leave out
        for name in ("cond", *outs) if "cond" in outs else outs:
            if name in found:
                continue
            out, rows = outs[name]
            if rows is not None:
                base = out.new_zeros((x.shape[0], *out.shape[1:])) if cond is None else cond
                out = base.index_copy(0, rows, out)
            if name == "cond":
                cond = out
            found[name] = self.predict(x, out, level, branches[name].model)
        return found
