"""Runs as CUDA graphs: the steps of a first batch captured, then replayed batch after batch.

A graph is one step with certain branches: network, guidance and sampler, with levels as launch
constants. During a replay neither Python nor launches cost time between kernels. `plan` stays on
the host and decides which branches a step evaluates: a rule that decides there, as adaptive
guidance does, switches between two graphs of a step, with the pair and without it.

What cannot be captured runs without graphs, or is refused where graphs are required: samplers that
draw noise, branches that leave rows out (their shapes change), and rules that read numbers on the
host while they combine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from sampler_kernels import leaves, map_tree, settle
from torch import Tensor

from sampler.core.cuda_capture import Capture, CudaCapture, clone, refill
from sampler.core.errors import UsageError, first_line
from sampler.core.loop import Loop
from sampler.core.step import apply_move, evaluate, seeded
from sampler.core.trajectory import Run
from sampler.types import Branch, Cond, Guidance, Sampler, Snapshot, Span, spans

AUTO_MIN_BATCHES = 5
"""Batches from which "auto" captures: a capture costs about three runs."""


def graphed(engine: Loop, graph: bool | Literal["auto"], batches: int) -> GraphedRuns | None:
    """Return a runner for the batches of one `generate` call; None for runs without graphs.

    Raises ValueError for another value, and UsageError for True without a CUDA device.
    """
    if graph not in (True, False, "auto"):
        raise ValueError(f"graph = {graph!r:.40} must be True, False or 'auto'.")
    if graph is False or (graph == "auto" and batches < AUTO_MIN_BATCHES):
        return None
    device = engine.pipeline.device
    if device.type != "cuda":
        if graph == "auto":
            return None
        raise UsageError(
            f"graph = True needs a CUDA device, and the model is on {device}; use graph = 'auto'."
        )
    return GraphedRuns(engine, graph is True, CudaCapture(device))


class GraphedRuns:
    """Runs batches; those of the same form as the first one replay the graphs of its steps.

    required: whether a run that cannot be captured is an error. capture(fn) calls fn and returns a
    replay and the outputs that it fills. After one failed capture all batches run without graphs.
    """

    def __init__(self, engine: Loop, required: bool, capture: Capture) -> None:
        self.engine, self.required, self.capture = engine, required, capture
        self.first: Any = None  # the form of the first batch, its sampler and its rule
        self.conds: Any = None
        self.graphs: StepGraphs | None = None
        self.failed = False

    def __call__(
        self, run: Run, on_step: Callable[[Snapshot], None] | None = None
    ) -> tuple[Tensor, Snapshot]:
        """Take a run to its end; return the result [B, ...] and the last snapshot.

        on_step receives every snapshot; the next batch overwrites the tensors of a replayed one.

        Raises UsageError where graphs are required and a step cannot be captured.
        """
        snap, levels, cond, method, rule = run
        if method.stochastic:
            self._refuse(f"the sampler {method.name!r} draws noise at every step", None)
        if method.stochastic or self.failed:
            return self.engine.run_to_end(*run, on_step=on_step)
        if reason := rule.graph_refusal:
            self._refuse(reason, None)
            return self.engine.run_to_end(*run, on_step=on_step)
        cond = seeded(cond, snap)
        conds = [cond.cond, cond.uncond, dict(cond.extra)]
        batch = (levels, map_tree(form, [snap.x, conds]))
        if self.graphs is None:
            self.first, self.conds = (batch, method, rule), map_tree(clone, conds)
            own = (self.conds, self.capture, self._refuse)
            self.graphs = StepGraphs(self.engine, method, rule, *own)
        if self.first[0] != batch or not _same(self.first[1:], (method, rule)):
            return self.engine.run_to_end(*run, on_step=on_step)
        # The graphs read these tensors, so that one copy serves all steps of a batch.
        map_tree(refill, self.conds, conds)
        with torch.no_grad():
            own_cond = Cond(*self.conds)
            snap = snap._replace(guidance=rule.start(own_cond))
            for span in spans(levels):
                branches = rule.plan(snap.x, span, own_cond, snap.guidance)
                snap = self.graphs.step(snap, span, branches)
                if on_step is not None:
                    on_step(snap)
            # The next batch overwrites the outputs of the graphs.
            x, snap = map_tree(clone, [settle(method.finish(snap.x, snap.sampler)), snap])
        if self.graphs.failed:
            self.failed, self.graphs, self.conds = True, None, None
        return x, snap

    def _refuse(self, reason: str, error: Exception | None) -> None:
        if self.required:
            raise UsageError(
                f"graph = True: this run cannot be CUDA graphs ({reason}); use 'auto'."
            ) from error


class Graph(NamedTuple):
    """A captured step: it reads `inputs` and fills `outputs`; `nfe` counts evaluations per row."""

    inputs: Any
    replay: Callable[[], Any]
    outputs: Any
    nfe: tuple[int, ...]


@dataclass(frozen=True)
class Passed:
    """An output that is an input, by its position among the leaves of the inputs."""

    position: int


class StepGraphs:
    """Takes the steps of runs that differ in nothing but the values of tensors.

    conds: the tree of conditions that branches refer to; it is not copied, its owner refills it.
    refuse(reason, error) is called for steps that cannot be graphs. After a failed capture
    (`failed`) no step is captured or replayed.
    """

    def __init__(
        self,
        engine: Loop,
        method: Sampler,
        rule: Guidance,
        conds: Any,
        capture: Capture,
        refuse: Callable[[str, Exception | None], None],
    ) -> None:
        self.engine, self.method, self.rule = engine, method, rule
        self.own = {id(leaf) for leaf in leaves(conds)}
        self.capture, self.refuse = capture, refuse
        self.graphs: dict[str, Graph] = {}
        self.failed = False

    def step(self, snap: Snapshot, span: Span, branches: Mapping[str, Branch]) -> Snapshot:
        """The snapshot after a step in which these branches are evaluated.

        Its tensors may be overwritten by the next run.
        """
        if any(branch.rows is not None for branch in branches.values()):
            self.refuse(f"{self.rule.name!r} leaves rows out; give it compact = 'batch'", None)
            return self._step(snap, span, branches)
        given = _inputs(snap, branches)
        models = [(name, branch.model) for name, branch in branches.items()]
        key = repr((span.index, models, map_tree(form, given)))
        if key not in self.graphs and not self.failed:
            self._capture(key, snap, span, branches)
        graph = self.graphs.get(key)
        if graph is None:
            return self._step(snap, span, branches)
        map_tree(refill, graph.inputs, given)
        graph.replay()
        x, state, guidance = _results(graph, given)
        nfe = tuple(a + b for a, b in zip(snap.nfe, graph.nfe, strict=True))
        return Snapshot(span.index + 1, x, state, guidance, snap.seeds, nfe)

    def _step(self, snap: Snapshot, span: Span, branches: Mapping[str, Branch]) -> Snapshot:
        pred, guidance, nfe = evaluate(self.engine.denoiser, snap, span, branches, self.rule)
        move = self.method.step(snap.x, pred, span, snap.sampler)
        return apply_move(snap, move, guidance, nfe)

    def _capture(
        self, key: str, snap: Snapshot, span: Span, branches: Mapping[str, Branch]
    ) -> None:
        def copied(value: Any) -> Any:
            return value if id(value) in self.own else clone(value)

        inputs = map_tree(copied, _inputs(snap, branches))
        x, state, guidance, conds = inputs
        begin = snap._replace(x=x, sampler=state, guidance=guidance)
        passed = {
            id(leaf): Passed(i) for i, leaf in enumerate(leaves(inputs)) if isinstance(leaf, Tensor)
        }

        def named(value: Any) -> Any:
            return passed.get(id(value), value)

        def step() -> tuple[Any, tuple[int, ...]]:
            # Copied inside the graph: the denoiser caches what it derives from conditions, and a
            # replay must not find the values of another batch's.
            asked = {
                name: Branch(map_tree(clone, conds[name]), branch.model)
                for name, branch in branches.items()
            }
            after = self._step(begin, span, asked)
            outputs = [after.x, after.sampler, after.guidance]
            nfe = tuple(b - a for a, b in zip(snap.nfe, after.nfe, strict=True))
            return map_tree(named, outputs), nfe

        try:
            replay, (outputs, nfe) = self.capture(step)
        except RuntimeError as error:  # out of memory is one, too: graphs need more of it
            self.refuse(first_line(error), error)
            self.failed = True
            self.graphs.clear()
            return
        self.graphs[key] = Graph(inputs, replay, outputs, nfe)


def form(value: Any) -> Any:
    """The property in which captured inputs must agree: shape, dtype, device, or the value."""
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else value


def _inputs(snap: Snapshot, branches: Mapping[str, Branch]) -> list[Any]:
    conds = {name: branch.cond for name, branch in branches.items()}
    return [snap.x, snap.sampler, snap.guidance, conds]


def _results(graph: Graph, given: Any) -> Any:
    """The outputs of a replay: given tensors where they are passed on, and new tensors over the
    graph's memory for the rest, since an old one may carry the copy of an earlier batch's flags."""
    inputs = leaves(given)

    def result(out: Any) -> Any:
        if isinstance(out, Passed):
            return inputs[out.position]
        return out.detach() if isinstance(out, Tensor) else out

    return map_tree(result, graph.outputs)


def _same(ours: Any, theirs: Any) -> bool:
    """True for equal strategies; strategies that hold tensors are equal where they are the same."""
    try:
        return bool(ours == theirs)
    except RuntimeError:
        return False
