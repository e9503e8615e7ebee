"""The loop: a denoiser, a guidance rule and a sampler, step after step over a grid of levels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from sampler_kernels import Lin, settle
from torch import Tensor

from sampler import registry
from sampler.core.noise import Noise
from sampler.types import (
    Cond,
    Denoiser,
    Guidance,
    Level,
    Move,
    Prediction,
    Sampler,
    Snapshot,
    Span,
    spans,
)

L = TypeVar("L", bound="Loop")


class Loop:
    """A denoiser, a sampler, a guidance rule, and the loop.

    `pipeline`: an adapter (`sampler.pipelines`) that knows prompts, schedule and decoding; `run`
    does without. No state of a run is held here.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        pipeline: Any = None,
        sampler: Any = "ddim",
        guidance: Any = "none",
    ) -> None:
        self.denoiser = denoiser
        self.pipeline = pipeline
        self.sampler = registry.build("sampler", sampler)
        self.guidance = registry.build("guidance", guidance)

    def steps(
        self,
        snapshot: Snapshot,
        levels: Sequence[Level],
        cond: Any = None,
        sampler: Any = None,
        guidance: Any = None,
    ) -> Iterator[Snapshot]:
        """The loop: from a snapshot to the end of `levels`, a new snapshot after every step.

        A run is a pure function of its first snapshot: going on from any later one is bit-equal.
        `levels` is the grid as the sampler walks it (`sampler.levels(grid)`).
        """
        rule, method, cond = self._rule(guidance), self._method(sampler), _as_cond(cond)
        for span in spans(tuple(levels))[snapshot.index :]:
            pred, state, nfe = self.predict(snapshot, span, cond, rule)
            move = method.step(snapshot.x, pred, span, snapshot.sampler)
            snapshot = landed(snapshot, move, state, nfe)
            yield snapshot

    def predict(
        self, snapshot: Snapshot, span: Span, cond: Any = None, guidance: Any = None
    ) -> tuple[Prediction, Any, tuple[int, ...]]:
        """The first half of a step: (guided prediction, the rule's next state, rows evaluated)."""
        rule, nfe = self._rule(guidance), list(snapshot.nfe)
        branches = rule.plan(snapshot.x, span, _as_cond(cond), snapshot.guidance)
        preds = self.denoiser(snapshot.x, span, branches, nfe) if branches else {}
        return *rule.combine(snapshot.x, preds, span, snapshot.guidance), tuple(nfe)

    def with_denoiser(self: L, denoiser: Denoiser) -> L:
        """The same over another denoiser."""
        return type(self)(denoiser, self.pipeline, self.sampler, self.guidance)

    def start(
        self,
        x: Tensor,
        levels: Sequence[Level],
        cond: Any = None,
        sampler: Any = None,
        guidance: Any = None,
        seeds: Sequence[int] | None = None,
    ) -> tuple[Snapshot, tuple[Level, ...]]:
        """The first snapshot of a run from x [B, ...] at levels[0], and the grid it will walk.

        float64 stays float64, everything else becomes float32. `seeds`: one int per row, needed
        for stochastic samplers only (default 0, 1, ...). Raises ValueError for bad levels/seeds.
        """
        rule, method = self._rule(guidance), self._method(sampler)
        x = x if x.dtype == torch.float64 else x.float()
        seeds = tuple(range(x.shape[0])) if seeds is None else tuple(int(s) for s in seeds)
        if len(seeds) != x.shape[0]:
            raise ValueError(f"{len(seeds)} seeds for {x.shape[0]} rows; give one per row.")
        if len(levels) < 2:
            raise ValueError("A run needs at least two levels: where it starts and where it ends.")
        grid = method.levels(tuple(Level(*level) for level in levels))
        x, state = method.start(x, grid[0])
        x, state = settle((x, state))
        zeros = (0,) * len(seeds)
        return Snapshot(0, x, state, rule.start(_as_cond(cond)), seeds, zeros), grid

    def run(
        self,
        x: Tensor,
        levels: Sequence[Level],
        cond: Any = None,
        sampler: Any = None,
        guidance: Any = None,
        seeds: Sequence[int] | None = None,
        grad: bool = False,
    ) -> Tensor:
        """x [B, ...] at levels[0], carried to levels[-1]; float64 stays float64.

        `cond`: what `fn` gets, or Cond(cond=, uncond=) for rules that need more than one branch.
        grad=True keeps the graph. Raises ValueError for a missing condition, before any evaluation.
        """
        final = self._finished(x, levels, cond, sampler, guidance, seeds, grad)
        return final[0]

    def _finished(
        self,
        x: Tensor,
        levels: Sequence[Level],
        cond: Any,
        sampler: Any,
        guidance: Any,
        seeds: Sequence[int] | None,
        grad: bool = False,
        on_step: Any = None,
    ) -> tuple[Tensor, Snapshot]:
        rule, method, cond = self._rule(guidance), self._method(sampler), _as_cond(cond)
        if "uncond" in rule.needs and cond.uncond is None:
            raise ValueError(
                f"Guidance {rule.name!r} needs an unconditional branch: "
                "pass cond=sampler.Cond(cond=..., uncond=...)."
            )
        models = getattr(self.denoiser, "models", ("main",))
        if missing := rule.needs - {"cond", "uncond", *models}:
            raise ValueError(
                f"Guidance {rule.name!r} needs the model {min(missing)!r}, and this denoiser has "
                f"{', '.join(models)}; give one: sampler.load(weak=...) or denoiser(models=...)."
            )
        with nullcontext() if grad else torch.no_grad():
            snap, grid = self.start(x, levels, cond, method, rule, seeds)
            walk = self.steps(snap, grid, cond, method, rule)
            for snap in walk:
                if on_step is not None:
                    on_step(snap)
            return settle(method.finish(snap.x, snap.sampler)), snap

    def _rule(self, guidance: Any) -> Guidance:
        return self.guidance if guidance is None else registry.build("guidance", guidance)

    def _method(self, sampler: Any) -> Sampler:
        return self.sampler if sampler is None else registry.build("sampler", sampler)


def landed(snapshot: Snapshot, move: Move, guidance: Any, nfe: tuple[int, ...]) -> Snapshot:
    """The second half of a step: where a move ends, with its noise drawn and all computed."""
    x = Lin.of(move.mean)
    if _stochastic(move.std):
        x = x + move.std * Lin.of(Noise(snapshot.seeds).draw(snapshot.index, x.like))
    x, state, guidance = settle((x, move.state, guidance))
    return Snapshot(snapshot.index + 1, x, state, guidance, snapshot.seeds, nfe)


def _as_cond(cond: Any) -> Cond:
    return cond if isinstance(cond, Cond) else Cond(cond=cond)


def _stochastic(std: Any) -> bool:
    return std != 0 if isinstance(std, (int, float)) else True
