"""Clocks of the GPU benchmark: everything that only a GPU has is in `Cuda`.

With `Dry` the same benchmark runs on a CPU, on tiny sizes, for a test: its times mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class Cuda:
    """Events, graphs and the compiler of a CUDA device."""

    device = "cuda"

    def microseconds(self, fn: Callable[[], Any]) -> float:
        """Time between two events around a call."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        fn()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    def host_microseconds(self, fn: Callable[[], Any]) -> float:
        """Time until a call has queued its work, on an idle device."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        fn()
        taken = time.perf_counter() - begin
        torch.cuda.synchronize()
        return taken * 1e6

    def captured(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        """A replay of a call as a CUDA graph."""
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            fn()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fn()
        return graph.replay

    def compiled(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """A function compiled by inductor."""
        torch.compiler.reset()
        return torch.compile(fn, fullgraph=True)

    def released(self) -> None:
        """Give unused memory back between rows."""
        torch.cuda.empty_cache()


class Dry:
    """The same on a CPU, where nothing is captured or compiled."""

    device = "cpu"

    def microseconds(self, fn: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        fn()
        return (time.perf_counter() - begin) * 1e6

    host_microseconds = microseconds

    def captured(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        return fn

    def compiled(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return fn

    def released(self) -> None:
        pass


Meter = Cuda | Dry
