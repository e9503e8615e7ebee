"""From the branches that a rule asks for to one batched network evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from sampler_kernels import leaves, map_tree
from torch import Tensor

from sampler.types import KINDS, Branch, Level, Prediction, Span

HALVES = (torch.float16, torch.bfloat16)


class BatchedDenoiser:
    """Stacks the rows of all branches of one model, evaluates once, and cuts the answer up.

    A subclass answers `forward` (and `predict` where its outputs need preconditioning).
    """

    models: tuple[str, ...] = ("main",)
    # The last conditions, the versions of their tensors, and what they became; see `_stacked`.
    _memo: tuple[list[Any], list[int], Any] = ([], [], None)

    def forward(self, x: Tensor, level: Level, cond: Any, model: str) -> Tensor:
        """The network's raw output [R, ...] for rows x [R, ...] and their conditions."""
        raise NotImplementedError

    def predict(self, x: Tensor, out: Tensor, level: Level, model: str) -> Prediction:
        """The raw output as a Prediction."""
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
        names_of: dict[str, list[str]] = {}
        for name, branch in branches.items():
            names_of.setdefault(branch.model, []).append(name)
        outs: dict[str, tuple[Tensor, Tensor | None]] = {}
        for model, names in names_of.items():
            if model not in self.models:
                raise ValueError(f"No model {model!r} here; there are {', '.join(self.models)}.")
            asked = [(name, _rows(branches[name], count, nfe, x.device)) for name in names]
            asked = [(name, rows) for name, rows in asked if rows is None or rows.shape[0]]
            if not asked:
                continue
            parts = [x if rows is None else x[rows] for _, rows in asked]
            rows = [rows for _, rows in asked]
            cond = self._stacked([branches[name].cond for name, _ in asked], rows)
            out = self.forward(_cat(parts), _cat_level(level, rows), cond, model)
            if out.dtype is not x.dtype and (out.dtype not in HALVES or x.dtype is torch.float64):
                out = out.to(x.dtype)  # halves are taken up where they are first used
            cut = out.split_with_sizes([part.shape[0] for part in parts])
            for (name, which), part in zip(asked, cut, strict=True):
                outs[name] = (part, which)
        return self._filled(x, branches, outs, level)

    def _stacked(self, conds: list[Any], rows: list[Tensor | None]) -> Any:
        """The conditions of the evaluated rows, one branch after the other.

        A run asks for the same branches at every step, so the last answer is kept, together with
        the very objects it is a copy of: it depends on nothing else, and so is no state of a run.
        It is not used where gradients flow (a graph serves one backward pass), where rows are left
        out, and after one of the tensors was written to.
        """
        if len(conds) == 1 and rows[0] is None:
            return conds[0]
        if torch.is_grad_enabled() or any(r is not None for r in rows):
            return _stack([_take(c, r) for c, r in zip(conds, rows, strict=True)])
        parts = [*conds, *leaves(conds)]
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if any(t.is_inference() for t in tensors):  # these do not count how often they change
            return _stack(conds)
        versions = [t._version for t in tensors]
        known, before, stacked = self._memo
        same = len(known) == len(parts) and all(map(is_, known, parts))
        if not same or versions != before:
            stacked = _stack(conds)
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
    """Plain functions fn(x, level, cond) -> tensor as the denoiser; see `denoiser`."""

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
    """A denoiser from `fn(x, level, cond) -> tensor`, for research without a pipeline.

    x [R, ...] holds the rows of all branches of a step, cond their concatenated conditions
    (tensors along dim 0; None where every branch has None). `prediction`: what fn returns, one of
    "eps", "v", "x0", "velocity". `models`: further networks by name, such as {"weak": fn}.

    Raises ValueError for an unknown prediction type.
    """
    if prediction not in KINDS:
        raise ValueError(f"Unknown prediction type {prediction!r}; one of {', '.join(KINDS)}.")
    return FunctionDenoiser({"main": fn, **(models or {})}, prediction)


def _rows(branch: Branch, count: int, nfe: list[int], device: torch.device) -> Tensor | None:
    """The indices of the rows to evaluate, on the device of x, None for all; counts them."""
    if branch.rows is None or bool(branch.rows.all()):
        for b in range(count):
            nfe[b] += 1
        return None
    index = branch.rows.nonzero()[:, 0]
    for b in index.tolist():
        nfe[b] += 1
    # From pinned memory, so that the copy does not wait for what the device has still to do.
    return index if device.type == "cpu" else index.pin_memory().to(device, non_blocking=True)


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _take(cond: Any, rows: Tensor | None) -> Any:
    if rows is None:
        return cond
    return map_tree(
        lambda leaf: leaf[rows.to(leaf.device)] if hasattr(leaf, "ndim") else leaf, cond
    )


def _stack(conds: list[Any]) -> Any:
    """One condition tree from several: tensors are concatenated, equal other values kept."""
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
    """Rows one below the other; texts [R, L, ...] of other lengths L are filled up with zeros.

    Families whose texts differ in length have a mask beside them, filled up with zeros likewise.
    """
    length = max(part.shape[1] if part.ndim > 1 else 0 for part in parts)
    if all(part.ndim < 2 or part.shape[1] == length for part in parts):
        return torch.cat(list(parts))
    short = [(part, (0,) * (2 * part.ndim - 3) + (length - part.shape[1],)) for part in parts]
    return torch.cat([torch.nn.functional.pad(part, by) for part, by in short])


def _cat_level(level: Level, rows: list[Tensor | None]) -> Level:
    """Per-row levels follow their rows; a common level stays as it is."""
    if not isinstance(level.sigma, Tensor):
        return level
    return Level(*(_cat([v if r is None else v[r] for r in rows]) for v in level))
