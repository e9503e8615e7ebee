"""The steps of one run as CUDA graphs: captured when they are first met, replayed afterwards.

A graph is one step with certain branches: network, guidance and sampler, with levels as launch
constants. It reads tensors of its own, into which the snapshot of the moment is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from sampler_kernels import leaves, map_tree
from torch import Tensor

from sampler.core.loop import Loop, apply_move
from sampler.errors import first_line
from sampler.types import Branch, Guidance, Sampler, Snapshot, Span

Captured = tuple[Callable[[], Any], Any]  # (replay, the outputs that a replay fills)
Capture = Callable[[Callable[[], Any]], Captured]


class Graph(NamedTuple):
    """A captured step: it reads `inputs` and fills `outputs`; `nfe` are the rows it evaluates."""

    inputs: Any
    replay: Callable[[], Any]
    outputs: Any
    nfe: tuple[int, ...]


class StepGraphs:
    """What takes the steps of runs that differ in nothing but the values of tensors.

    conds: the tree of conditions that branches refer to; it is not copied, whoever owns it refills
    it. capture(fn) calls fn and gives a replay and fn's outputs; refused(reason, error) hears of
    steps that cannot be graphs.
    """

    def __init__(
        self,
        engine: Loop,
        method: Sampler,
        rule: Guidance,
        conds: Any,
        capture: Capture,
        refused: Callable[[str, Exception | None], None],
    ) -> None:
        self.engine, self.method, self.rule = engine, method, rule
        self.own = {id(leaf) for leaf in leaves(conds)}
        self.capture, self.refused = capture, refused
        self.graphs: dict[Any, Graph | None] = {}

    def step(self, snap: Snapshot, span: Span, branches: Mapping[str, Branch]) -> Snapshot:
        """The snapshot after a step in which these branches are evaluated.

        Its tensors may be filled again by the next run.
        """
        if any(branch.rows is not None for branch in branches.values()):
            self.refused(f"{self.rule.name!r} leaves rows out; give it compact = 'batch'", None)
            return self._taken(snap, span, branches)
        given = _given(snap, branches)
        models = [(name, branch.model) for name, branch in branches.items()]
        key = repr((span.index, models, map_tree(described, given)))
        if key not in self.graphs:
            self.graphs[key] = self._captured(snap, span, branches)
        graph = self.graphs[key]
        if graph is None:
            return self._taken(snap, span, branches)
        map_tree(refilled, graph.inputs, given)
        graph.replay()
        x, state, guidance = _results(graph, given)
        nfe = tuple(a + b for a, b in zip(snap.nfe, graph.nfe, strict=True))
        return Snapshot(span.index + 1, x, state, guidance, snap.seeds, nfe)

    def _taken(self, snap: Snapshot, span: Span, branches: Mapping[str, Branch]) -> Snapshot:
        nfe = list(snap.nfe)
        preds = self.engine.denoiser(snap.x, span, branches, nfe) if branches else {}
        pred, guidance = self.rule.combine(snap.x, preds, span, snap.guidance)
        move = self.method.step(snap.x, pred, span, snap.sampler)
        return apply_move(snap, move, guidance, tuple(nfe))

    def _captured(self, snap: Snapshot, span: Span, branches: Mapping[str, Branch]) -> Graph | None:
        inputs = map_tree(lambda v: v if id(v) in self.own else copied(v), _given(snap, branches))
        x, state, guidance, conds = inputs
        begin = snap._replace(x=x, sampler=state, guidance=guidance)

        def step() -> Snapshot:
            # Copied inside the graph: the denoiser keeps what it makes of conditions that it has
            # seen before, and a replay must not find what was made of another batch's.
            asked = {
                name: Branch(map_tree(copied, conds[name]), branch.model)
                for name, branch in branches.items()
            }
            return self._taken(begin, span, asked)

        try:
            replay, after = self.capture(step)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.refused(first_line(error), error)
            return None
        nfe = tuple(b - a for a, b in zip(snap.nfe, after.nfe, strict=True))
        return Graph(inputs, replay, [after.x, after.sampler, after.guidance], nfe)


def capture(fn: Callable[[], Any]) -> Captured:
    """A CUDA graph of a call, after two calls on a side stream that warm up what is lazy."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = fn()
    return graph.replay, outputs


def copied(value: Any) -> Any:
    """A tensor's copy; anything else itself."""
    return value.clone() if isinstance(value, Tensor) else value


def refilled(own: Any, given: Any) -> Any:
    """`own`, filled with the values of `given`."""
    return own.copy_(given) if isinstance(own, Tensor) and own is not given else own


def described(value: Any) -> Any:
    """What a captured input has to agree in: a tensor's form, or the very value."""
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else value


def _given(snap: Snapshot, branches: Mapping[str, Branch]) -> list[Any]:
    conds = {name: branch.cond for name, branch in branches.items()}
    return [snap.x, snap.sampler, snap.guidance, conds]


def _results(graph: Graph, given: Any) -> Any:
    """The outputs of a replay. What a step passes on is what it was given; others are new tensors
    over the graph's memory, since the copy of an earlier batch's flags may hang on a tensor."""
    passed = {id(own): new for own, new in zip(leaves(graph.inputs), leaves(given), strict=True)}

    def result(out: Any) -> Any:
        if not isinstance(out, Tensor):
            return out
        return passed[id(out)] if id(out) in passed else out.detach()

    return map_tree(result, graph.outputs)
