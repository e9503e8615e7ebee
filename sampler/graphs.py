"""Runs as CUDA graphs: network, guidance and sampler captured once, then replayed per batch.

A replay launches a whole trajectory at once, so that neither Python nor launches cost time between
its kernels. Levels are launch constants, as a graph belongs to one grid; what changes from batch to
batch (noise, conditions) is copied into the tensors that the graph reads.

Only static runs can be captured: a deterministic sampler, and a rule that decides nothing on the
host. Others run as usual, or are refused where the graph was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from sampler_kernels import map_tree
from torch import Tensor

from sampler.loop import Loop
from sampler.types import Cond, Guidance, Level, Sampler, SamplerError, Snapshot

Captured = tuple[Callable[[], Any], Any]  # (replay, the outputs that a replay fills)


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
        raise SamplerError(
            f"graph = True needs a CUDA device, and the model is on {engine.pipeline.device}; "
            "use graph = 'auto'.",
            2,
        )
    return GraphedRuns(engine, graph is True, capture)


class GraphedRuns:
    """Runs batches; those of the shapes of the first one replay its graph.

    required: whether a run that cannot be captured is an error. capture(fn) calls fn and gives a
    replay and fn's outputs.
    """

    def __init__(
        self, engine: Loop, required: bool, capture: Callable[[Callable[[], Any]], Captured]
    ) -> None:
        self.engine, self.required, self.capture = engine, required, capture
        self.key: Any = None
        self.inputs: Any = None
        self.captured: Captured | None = None

    def __call__(
        self,
        x: Tensor,
        grid: Sequence[Level],
        cond: Cond,
        method: Sampler,
        rule: Guidance,
        seeds: Sequence[int],
    ) -> tuple[Tensor, Snapshot]:
        """The last x [B, ...] and snapshot of a run from x at grid[0].

        Raises SamplerError (2) where a graph is required and the run cannot be captured.
        """
        inputs = (x, cond.cond, cond.uncond, dict(cond.extra))

        def run(x: Tensor, *conds: Any) -> tuple[Tensor, Snapshot]:
            # Copied inside the graph: the denoiser keeps what it makes of conditions that it has
            # seen before, and a replay must not find what was made of another batch's.
            given = Cond(*map_tree(_copied, list(conds)))
            return self.engine._finished(x, grid, given, method, rule, seeds)

        key = (id(method), id(rule), tuple(grid), map_tree(_described, list(inputs)))
        if self.key is None:
            self.key = key
            self._begin(run, inputs, method)
        if self.captured is None or key != self.key:
            return run(*inputs)
        map_tree(_refilled, self.inputs, list(inputs))
        replay, outputs = self.captured
        replay()
        x, snapshot = map_tree(_copied, list(outputs))
        return x, snapshot._replace(seeds=tuple(seeds))

    def _begin(self, run: Callable[..., Any], inputs: Any, method: Sampler) -> None:
        """Captures a first run where that is possible."""
        self.inputs = map_tree(_copied, list(inputs))
        try:
            if method.stochastic:
                raise RuntimeError(f"the sampler {method.name!r} draws noise at every step")
            self.captured = self.capture(lambda: run(*self.inputs))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self.required:
                reason = str(error).splitlines()[0]
                raise SamplerError(
                    f"graph = True: this run cannot be a CUDA graph ({reason}); use 'auto'.", 2
                ) from error


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


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _refilled(own: Any, given: Any) -> Any:
    return own.copy_(given) if isinstance(own, Tensor) else own


def _described(value: Any) -> Any:
    """What a captured input has to agree in: a tensor's form, or the very value."""
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else value
