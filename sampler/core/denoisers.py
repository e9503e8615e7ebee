"""Batched evaluation of the branches that a rule plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from operator import is_
from typing import Any, Literal

import torch
from sampler_kernels import leaves, map_tree
from torch import Tensor

from sampler.types import KINDS, Branch, Level, Prediction, Span, Watch

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
        names_of: dict[tuple[str, Any, str], list[str]] = {}
        for name, branch in branches.items():
            own = name if self.apart(branch.model) else ""
            names_of.setdefault((branch.model, branch.mixing, own), []).append(name)
        outs: dict[str, tuple[Tensor, Tensor | None]] = {}
        answers: dict[str, Any] = {}
        for (model, mixing, own), names in names_of.items():
            if model not in self.models:
                known = ", ".join(self.models)
                raise ValueError(f"Unknown model {model!r}; this denoiser has {known}.")
            cost = 1 if mixing is None else self.mixed_rows(model)
            evaluated = [(n, _rows(branches[n], count, nfe, x.device, cost)) for n in names]
            evaluated = [(name, rows) for name, rows in evaluated if rows is None or rows.shape[0]]
            if not evaluated:
                continue
            parts = [x if rows is None else x[rows] for _, rows in evaluated]
            rows = [rows for _, rows in evaluated]
            cond = self._stacked([branches[name].cond for name, _ in evaluated], rows)
            given = (_cat(parts), _cat_level(level, rows), cond)
            with self.context(level, model, own) if own else nullcontext():
                call = partial(self.forward, *given, model)
                if mixing is not None:
                    negative = [_take(branches[name].negative, part) for name, part in evaluated]
                    call = partial(self.forward_mixed, *given, stack(negative), mixing, model)
                watched = [n for n in names if branches[n].watch is not None]
                if watched:
                    split = dict(zip([name for name, _ in evaluated], parts, strict=True))
                    out, seen = self._watched(call, split, branches[watched[0]].watch, level, model)
                    answers |= {name: seen[name] for name in watched if name in seen}
                else:
                    out = call()
            half = out.dtype in HALF_DTYPES and x.dtype is not torch.float64
            if not half:  # half precision is converted where it is first used
                out = out.to(x.dtype)
            cut = out.split_with_sizes([part.shape[0] for part in parts])
            for (name, which), part in zip(evaluated, cut, strict=True):
                outs[name] = (part, which)
        found = self._filled(x, branches, outs, level)
        return found | {name: replace(found[name], seen=seen) for name, seen in answers.items()}

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
            return stack([_take(c, r) for c, r in zip(conds, rows, strict=True)])
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


class FunctionDenoiser(BatchedDenoiser):
    """Denoiser over plain functions fn(x, level, cond) -> tensor; see `denoiser`."""

    def __init__(self, fns: dict[str, Callable[..., Tensor]], prediction: str) -> None:
        self.fns = fns
        self.prediction = prediction
        self.models = tuple(fns)

    def forward(self, x: Tensor, level: Level, cond: Any, model: str) -> Tensor:
        return self.fns[model](x, level, cond)

    def predict(self, x: Tensor, out: Tensor, level: Level, model: str) -> Prediction:
        return Prediction.of(self.prediction, x, out, level)


def denoiser(
    fn: Callable[..., Tensor],
    prediction: str = "eps",
    models: Mapping[str, Callable[..., Tensor]] | None = None,
) -> FunctionDenoiser:
    """Build a denoiser from `fn(x, level, cond) -> tensor`, for research without a pipeline.

    x [R, ...] holds the rows of all branches of a step, cond their concatenated conditions
    (tensors along dim 0; None where every branch has None). `prediction`: what fn returns, one of
    "eps", "v", "x0", "velocity". `models`: further networks by name, such as {"weak": fn}.

    Raises ValueError for an unknown prediction type.
    """
    if prediction not in KINDS:
        raise ValueError(f"Unknown prediction type {prediction!r}; one of {', '.join(KINDS)}.")
    return FunctionDenoiser({"main": fn, **(models or {})}, prediction)


def _rows(
    branch: Branch, count: int, nfe: list[int], device: torch.device, cost: int
) -> Tensor | None:
    """The indices of the rows to evaluate, on the device of x, None for all.

    Counts them, as `cost` rows of the network each.
    """
    if branch.rows is None or bool(branch.rows.all()):
        for b in range(count):
            nfe[b] += cost
        return None
    index = branch.rows.nonzero()[:, 0]
    for b in index.tolist():
        nfe[b] += cost
    # From pinned memory, so that the copy does not wait for what the device has still to do.
    return index if device.type == "cpu" else index.pin_memory().to(device, non_blocking=True)


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _take(cond: Any, rows: Tensor | None) -> Any:
    if rows is None:
        return cond

    def take(leaf: Any) -> Any:
        return leaf[rows.to(leaf.device)] if isinstance(leaf, Tensor) else leaf

    return map_tree(take, cond)


def stack(conds: list[Any]) -> Any:
    """Join condition trees: tensors are concatenated, other values must be equal."""
    if len(conds) == 1:
        return conds[0]
    if any(c is None for c in conds):
        if all(c is None for c in conds):
            return None
        raise ValueError("A rule needs a condition for every branch: give Cond(cond=, uncond=).")

    def join(*parts: Any) -> Any:
        if isinstance(parts[0], Tensor):
            return cat_rows(parts)
        if any(part != parts[0] for part in parts):
            raise ValueError(f"Branches disagree on {parts[0]!r:.40}; only tensors may differ.")
        return parts[0]

    return map_tree(join, *conds)


def cat_rows(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along dim 0; texts [R, L, ...] of different lengths L are zero-padded.

    Families whose texts differ in length pass a mask as well, which is zero-padded likewise.
    """
    length = max(part.shape[1] if part.ndim > 1 else 0 for part in parts)
    if all(part.ndim < 2 or part.shape[1] == length for part in parts):
        return torch.cat(list(parts))
    short = [(part, (0,) * (2 * part.ndim - 3) + (length - part.shape[1],)) for part in parts]
    return torch.cat([torch.nn.functional.pad(part, by) for part, by in short])


def _cat_level(level: Level, rows: list[Tensor | None]) -> Level:
    """Select per-row levels with their rows; a common level applies to all."""
    if not isinstance(level.sigma, Tensor):
        return level
    return Level(*(_cat([v if r is None else v[r] for r in rows]) for v in level))
