"""Sampling loop: denoiser, guidance rule and sampler, step by step over a grid of levels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from sampler_kernels import settle
from torch import Tensor

from sampler import registry
from sampler.core.adapter import PipelineAdapter
from sampler.core.binding import check_rule, model_name
from sampler.core.calibrated_grid import grid_of
from sampler.core.errors import UsageError
from sampler.core.noise import with_noise
from sampler.core.rows import has_levels_of_rows, moves_of_rows, step_rows
from sampler.core.step import apply_move, as_cond, evaluate, seeded
from sampler.registry.constraints import as_int
from sampler.types import (
    Denoiser,
    Guidance,
    Level,
    Prediction,
    Sampler,
    SamplerBase,
    Snapshot,
    Span,
    spans,
)

L = TypeVar("L", bound="Loop")


class Loop:
    """Denoiser, sampler and guidance rule, applied over a grid of levels.

    No state of a run is stored here. `pipeline`: the adapter that knows prompts, schedule and
    decoding, which `run` does not need; reading it from an engine without one raises UsageError.

    hosted: True where a stock pipeline's own call runs (`sampler.engine.hosted`); host: makes the
    hosted engine of the same pipeline.
    """

    hosted = False
    host: Callable[[], Loop] | None = None

    def __init__(
        self,
        denoiser: Denoiser,
        pipeline: PipelineAdapter | None = None,
        sampler: Any = "ddim",
        guidance: Any = "none",
    ) -> None:
        self.denoiser = denoiser
        self._pipeline = pipeline
        self.sampler = registry.build("sampler", sampler)
        self.guidance = registry.build("guidance", guidance)

    @property
    def pipeline(self) -> PipelineAdapter:
        if self._pipeline is None:
            raise UsageError("This engine has no pipeline: use run(), or sampler.load(...).")
        return self._pipeline

    def with_denoiser(self: L, denoiser: Denoiser) -> L:
        """Return the same engine over another denoiser."""
        return type(self)(denoiser, self._pipeline, self.sampler, self.guidance)

    def with_pipeline(self: L, pipeline: PipelineAdapter) -> L:
        """Return the same engine with another adapter of its pipeline; the denoiser stays."""
        twin = copy.copy(self)
        twin._pipeline = pipeline
        return twin

    def as_hosted(self) -> Loop:
        """Return the engine that calls the stock pipeline itself; UsageError without a pipeline."""
        if self.hosted:
            return self
        if self.host is None:
            raise UsageError(
                "inputs are arguments of a stock pipeline's call, which this engine does not use; "
                "load a pipeline without a student, other than bundled-flow."
            )
        if getattr(self._pipeline, "lora_until", None) is not None:
            raise UsageError(
                "inputs are arguments of a stock pipeline's call, which uses LoRAs in all steps; "
                "load them without a share of steps."
            )
        return self.host()

    def check_stock(self, settings: Any, jobs: Iterable[Any]) -> None:
        """Raise ValueError for what every stock call with these settings would fail on."""
        raise NotImplementedError

    def call_stock(
        self,
        jobs: Sequence[Any],
        settings: Any,
        rule: Guidance,
        on_step: Callable[[Snapshot], None],
    ) -> tuple[list[Any], list[int]]:
        """Call the stock pipeline; return what a run folder holds of each job, and their NFE.

        That is pixels of uint8, [H, W, 3] or [F, H, W, 3], a `Sound`, or None for another output.
        """
        raise NotImplementedError

    def with_grid(self: L, spacing: Any) -> L:
        """Return the same engine with another grid of levels; None keeps its own.

        Raises ValueError for an unknown grid, UsageError without a pipeline.
        """
        if spacing is None:
            return self
        return self.with_pipeline(self.pipeline.with_grid(spacing))

    def with_grid_for(self: L, spacing: Any, sampler: Any, guidance: Any, steps: int) -> L:
        """`with_grid` for a run with these settings, which a calibrated grid is looked up for.

        Raises UsageError where the file has none for them.
        """
        if spacing is not None:
            name = model_name(self.pipeline)
            spacing = grid_of(spacing, name, sampler, steps, guidance)
        return self.with_grid(spacing)

    def build_sampler(self, spec: Any) -> Sampler:
        """Build a sampler; None is the engine's own."""
        return self.sampler if spec is None else registry.build("sampler", spec)

    def build_guidance(self, spec: Any) -> Guidance:
        """Build a rule; None is the engine's own."""
        return self.guidance if spec is None else registry.build("guidance", spec)

    def steps(
        self,
        snapshot: Snapshot,
        levels: Sequence[Level],
        cond: Any = None,
        sampler: Any = None,
        guidance: Any = None,
    ) -> Iterator[Snapshot]:
        """Yield a new snapshot after every step, from `snapshot` to the end of `levels`.

        A run is a pure function of its first snapshot: continuing from any later one is bit-equal.
        `levels` is the grid as the sampler walks it (`sampler.levels(grid)`). Levels are floats, or
        tensors [B] where each sample has its own (`sampler.core.rows`).
        """
        rule, method = self.build_guidance(guidance), self.build_sampler(sampler)
        cond, levels = seeded(cond, snapshot), tuple(levels)
        own, draws = has_levels_of_rows(levels), bool(method.draws)
        totals = moves_of_rows(levels, snapshot.x.shape[0]) if own else ()
        for span in spans(levels)[snapshot.index :]:
            pred, state, nfe = self.predict(snapshot, span, cond, rule)
            if draws:
                span = with_noise(span, method, snapshot.seeds)
            if own:
                move = step_rows(method, snapshot.x, pred, span, snapshot.sampler, totals)
            else:
                move = method.step(snapshot.x, pred, span, snapshot.sampler)
            snapshot = apply_move(snapshot, move, state, nfe)
            yield snapshot

    def predict(
        self, snapshot: Snapshot, span: Span, cond: Any = None, guidance: Any = None
    ) -> tuple[Prediction, Any, tuple[int, ...]]:
        """First half of a step: (guided prediction, the rule's next state, NFE per sample)."""
        rule, cond = self.build_guidance(guidance), seeded(cond, snapshot)
        branches = rule.plan(snapshot.x, span, cond, snapshot.guidance)
        return evaluate(self.denoiser, snapshot, span, branches, rule)

    def start(
        self,
        x: Tensor,
        levels: Sequence[Level],
        cond: Any = None,
        sampler: Any = None,
        guidance: Any = None,
        seeds: Sequence[int] | None = None,
    ) -> tuple[Snapshot, tuple[Level, ...]]:
        """Return the first snapshot of a run from x [B, ...] at levels[0], and the grid it walks.

        float64 stays float64, everything else becomes float32. `seeds`: one int per sample, used
        by stochastic samplers (default 0, 1, ...). Raises ValueError for bad levels or seeds, and
        for a missing condition or model.
        """
        rule, method = self.build_guidance(guidance), self.build_sampler(sampler)
        x = x if x.dtype == torch.float64 else x.float()
        seeds = (
            tuple(range(x.shape[0])) if seeds is None else tuple(as_int(s, "seeds") for s in seeds)
        )
        if len(seeds) != x.shape[0]:
            raise ValueError(f"{len(seeds)} seeds for {x.shape[0]} samples; give one per sample.")
        if len(levels) < 2:
            raise ValueError("A run needs at least two levels, its start and its end.")
        cond = as_cond(cond)
        check_rule(rule, method, cond, getattr(self.denoiser, "models", ("main",)))
        if has_levels_of_rows(levels) and type(method).finish is not SamplerBase.finish:
            raise ValueError(
                f"{method.name}: all samples of a run need the same levels; give them as floats."
            )
        if begin_run := getattr(self.denoiser, "begin_run", None):
            begin_run()
        grid = method.levels(tuple(Level(*level) for level in levels))
        x, state = settle(method.start(x, grid[0]))
        zeros = (0,) * len(seeds)
        return Snapshot(0, x, state, rule.start(cond), seeds, zeros), grid

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
        """Integrate x [B, ...] from levels[0] to levels[-1]; float64 stays float64.

        `cond`: passed to `fn`, or Cond(cond=, uncond=) for rules that need more than one branch.
        grad=True keeps the graph. Raises ValueError for a missing condition, before any evaluation.
        """
        with nullcontext() if grad else torch.no_grad():
            first, grid = self.start(x, levels, cond, sampler, guidance, seeds)
            return self.run_to_end(first, grid, cond, sampler, guidance)[0]

    def run_to_end(
        self,
        snapshot: Snapshot,
        levels: Sequence[Level],
        cond: Any = None,
        sampler: Any = None,
        guidance: Any = None,
        on_step: Callable[[Snapshot], None] | None = None,
    ) -> tuple[Tensor, Snapshot]:
        """Take the steps that are left; return the result [B, ...] and the last snapshot."""
        method, last = self.build_sampler(sampler), snapshot
        for last in self.steps(snapshot, levels, cond, method, guidance):
            if on_step is not None:
                on_step(last)
        return settle(method.finish(last.x, last.sampler)), last
