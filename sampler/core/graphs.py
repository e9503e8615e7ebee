"""Runs as CUDA graphs: the steps of a first batch captured, then replayed batch after batch.

Neither Python nor launches cost time between the kernels of a step then (`graph_steps.py`). `plan`
stays on the host and says which branches a step evaluates: a rule that decides there, as adaptive
guidance does, so switches between two graphs of a step, with the pair and without it.

What cannot be a graph is run as usual, or refused where graphs were asked for: samplers that draw
noise, branches that leave rows out (their shapes change), and rules that look at numbers on the
host while they combine.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from sampler_kernels import map_tree, settle
from torch import Tensor

from sampler.core.graph_steps import Capture, StepGraphs, capture, copied, described, refilled
from sampler.core.loop import Loop
from sampler.core.trajectory import Run
from sampler.errors import UsageError
from sampler.types import Cond, Snapshot, spans

# Batches from which "auto" captures: the capture itself costs three runs.
WORTHWHILE = 5


def graphed(engine: Loop, graph: bool | Literal["auto"], batches: int) -> GraphedRuns | None:
    """What runs the batches of one `generate` call; None for running them as usual.

    Raises ValueError for another value, and SamplerError (2) for True without a CUDA device.
    """
    if graph not in (True, False, "auto"):
        raise ValueError(f"graph = {graph!r:.40} must be True, False or 'auto'.")
    if graph is False or (graph == "auto" and batches < WORTHWHILE):
        return None
    if engine.pipeline.device.type != "cuda":
        if graph == "auto":
            return None
        raise UsageError(
            f"graph = True needs a CUDA device, and the model is on {engine.pipeline.device}; "
            "use graph = 'auto'.",
        )
    return GraphedRuns(engine, graph is True, capture)


class GraphedRuns:
    """Runs batches; those that are like the first one replay the graphs of its steps.

    required: whether a run that cannot be captured is an error. capture(fn) calls fn and gives a
    replay and fn's outputs.
    """

    def __init__(self, engine: Loop, required: bool, capture: Capture) -> None:
        self.engine, self.required, self.capture = engine, required, capture
        self.first: Any = None  # what the first batch was
        self.conds: Any = None
        self.graphs: StepGraphs | None = None

    def __call__(self, run: Run) -> tuple[Tensor, Snapshot]:
        """Take a run to its end; return the result [B, ...] and the last snapshot.

        Raises SamplerError (2) where graphs are required and a step cannot be captured.
        """
        snap, levels, cond, method, rule = run
        if method.stochastic:
            self._refuse(f"the sampler {method.name!r} draws noise at every step", None)
            return self.engine.run_to_end(*run)
        conds = [cond.cond, cond.uncond, dict(cond.extra)]
        batch = (levels, map_tree(described, [snap.x, conds]))
        if self.graphs is None:
            self.first, self.conds = (batch, method, rule), map_tree(copied, conds)
            own = (self.conds, self.capture, self._refuse)
            self.graphs = StepGraphs(self.engine, method, rule, *own)
        if self.first[0] != batch or not _same(self.first[1:], (method, rule)):
            return self.engine.run_to_end(*run)
        # The graphs read these tensors, so that one copy serves all steps of a batch.
        map_tree(refilled, self.conds, conds)
        with torch.no_grad():
            held = Cond(*self.conds)
            snap = snap._replace(guidance=rule.start(held))
            for span in spans(levels):
                branches = rule.plan(snap.x, span, held, snap.guidance)
                snap = self.graphs.step(snap, span, branches)
            # What graphs have filled is filled again by the next batch.
            x, snap = map_tree(copied, [settle(method.finish(snap.x, snap.sampler)), snap])
        return x, snap

    def _refuse(self, reason: str, error: Exception | None) -> None:
        if self.required:
            raise UsageError(
                f"graph = True: this run cannot be CUDA graphs ({reason}); use 'auto'."
            ) from error


def _same(ours: Any, theirs: Any) -> bool:
    """Whether strategies are equal; those that hold tensors are where they are the same objects."""
    try:
        return bool(ours == theirs)
    except RuntimeError:
        return False
