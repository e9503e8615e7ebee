"""Calls as CUDA graphs: captured on one device, and replayed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from sampler_kernels import map_tree
from torch import Tensor

Captured = tuple[Callable[[], Any], Any]  # (replay, the outputs that a replay fills)
Capture = Callable[[Callable[[], Any]], Captured]


class CudaCapture:
    """Captures calls as CUDA graphs on one device, in one memory pool.

    The pool holds only intermediate values: outputs are copied, inside the graph, to tensors
    allocated before the capture. So the graphs may share memory and be replayed in any order.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool: Any = None

    def __call__(self, fn: Callable[[], Any]) -> Captured:
        """The replay of a call, and the tree of the outputs that it fills.

        Raises the error of the call where it cannot be captured, the stream restored: mostly before
        the capture begins, since a second warm-up raises for whatever synchronizes with the host.
        """
        with torch.cuda.device(self.device):
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
                gc.collect()  # a collected tensor or graph must not be freed during a capture
            main, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                fn()  # compiles kernels, fills caches
                example = _without_synchronization(fn)
            main.wait_stream(side)
            outputs = map_tree(_empty_like, example)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(side):
                self._record(graph, lambda: map_tree(refill, outputs, fn()))
        return lambda: self._replay(graph), outputs

    def _record(self, graph: Any, fn: Callable[[], Any]) -> None:
        """Capture fn on the current stream; not by `torch.cuda.graph`, which neither restores the
        stream nor reports the cause where the capture fails."""
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        try:
            fn()
        except BaseException:
            with suppress(RuntimeError):  # that the capture is invalid is known
                graph.capture_end()
            raise
        graph.capture_end()

    def _replay(self, graph: Any) -> None:
        with torch.cuda.device(self.device):
            graph.replay()


def _without_synchronization(fn: Callable[[], Any]) -> Any:
    """Call fn; raises RuntimeError where it synchronizes the device with the host."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return fn()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def clone(value: Any) -> Any:
    """A copy of a tensor; other values unchanged."""
    return value.clone() if isinstance(value, Tensor) else value


def refill(own: Any, given: Any) -> Any:
    """Copy the values of `given` into the tensor `own`; returns `own`."""
    return own.copy_(given) if isinstance(own, Tensor) and own is not given else own


def _empty_like(value: Any) -> Any:
    return torch.empty_like(value) if isinstance(value, Tensor) else value
