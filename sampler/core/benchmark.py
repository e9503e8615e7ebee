"""Cost of a step's arithmetic without its network: launches, memory traffic, time.

A step here is combine + sampler step + settle on predictions that are already there, in a state
that a few steps before it have filled. Predictions are bfloat16, latents and states float32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sampler_kernels import leaves, settle, use_backend
from sampler_kernels.counting import count_launches, dry_run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sampler import registry
from sampler.types import KINDS, Cond, Level, Prediction, Span

# The latents of well-known models at batch 1, without the batch dimension.
SIZES = {
    "SD 1.5, 512²": (4, 64, 64),
    "SDXL, 1024²": (4, 128, 128),
    "SD3 and Flux, 1024²": (16, 128, 128),
    "LTX, 768×512, 121 frames": (128, 16, 16, 24),
    "Wan 720p, 81 frames": (16, 21, 90, 160),
}


@dataclass(frozen=True)
class Case:
    """A rule with a sampler on predictions of a kind.

    least: bytes per element if every pass reads each tensor once.
    """

    name: str
    rule: Any
    method: Any = "ddim"
    kind: str = "v"
    least: int | None = None


# With momentum, whose running average is one more tensor to read and write.
APG = {"name": "apg", "momentum": -0.5}
CASES = (
    Case("CFG + DDIM", "cfg", least=12),
    Case("CFG + Euler on a flow", "cfg", kind="velocity", least=12),
    Case("CFG + DPM-Solver++(2M)", "cfg", "dpmpp_2m", least=20),
    Case("CFG + Adams-Bashforth 2", "cfg", {"name": "ab", "order": 2}, least=20),
    Case("CFG + GHVB", "cfg", "ghvb"),
    Case("CFG rescaled + DDIM", {"name": "cfg", "rescale": 0.7}, least=16),
    Case("CFG-Zero* + Euler on a flow", "cfg_zero", kind="velocity", least=16),
    Case("Adaptive CFG + DDIM", "adaptive", least=12),
    Case("APG + DDIM", APG, least=30),
    Case("APG + DPM-Solver++(2M)", APG, "dpmpp_2m", least=38),
    Case("APG + GHVB", APG, "ghvb"),
)


class BenchmarkStep:
    """One step of a case on random data of a shape [B, ...], ready to be called again and again.

    Raises ValueError for an unknown case.kind.
    """

    def __init__(
        self, case: Case, shape: Sequence[int], device: str = "cpu", dtype: Any = torch.bfloat16
    ) -> None:
        if case.kind not in KINDS:
            raise ValueError(f"Unknown prediction type {case.kind!r}; one of {', '.join(KINDS)}.")
        self.case = case
        self.rule = registry.build("guidance", case.rule)
        self.method = registry.build("sampler", case.method)
        draw = torch.Generator(device).manual_seed(0)
        self.x, c, u = (torch.randn(tuple(shape), generator=draw, device=device) for _ in range(3))
        self.c, self.u = c.to(dtype), u.to(dtype)
        levels = _levels(case.kind)
        spans = [Span(i, levels[i], levels[i + 1]) for i in range(1, 7)]
        self.states: tuple[Any, Any] = (self.rule.start(Cond()), self.method.start(c, levels[1])[1])
        with torch.no_grad(), use_backend("reference"):
            for span in spans[:-1]:
                self.states = self._walk(self.x, self.c, self.u, self.states, span)[1]
        self.span = spans[-1]

    def __call__(self) -> tuple[Tensor, Any]:
        return self._walk(self.x, self.c, self.u, self.states, self.span)

    def function(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The step as a function of tensors, with its arguments; for torch.compile and graphs."""

        def step(x: Tensor, c: Tensor, u: Tensor, states: Any) -> Any:
            return self._walk(x, c, u, states, self.span)

        return step, (self.x, self.c, self.u, self.states)

    def _walk(self, x: Tensor, c: Tensor, u: Tensor, states: Any, span: Span) -> tuple[Tensor, Any]:
        preds = {k: Prediction.of(self.case.kind, x, v, span.now) for k, v in
                 (("cond", c), ("uncond", u))}  # fmt: skip
        pred, guidance = self.rule.combine(x, preds, span, states[0])
        move = self.method.step(x, pred, span, states[1])
        mean, state, guidance = settle((move.mean, move.state, guidance))
        return mean, (guidance, state)


@dataclass(frozen=True)
class Count:
    """Launches of one step: our kernels, other torch operations; bytes per latent element."""

    kernels: int
    others: int
    bytes: float


def count(case: Case, backend: str, rows: int = 2, length: int = 4096) -> Count:
    """The launches of one step on this backend, counted on any machine: Triton's are not run.

    Views, allocations and operations on single numbers are no launches. On the reference every
    torch operation is one, as it would be on a GPU, and reads and writes its operands.
    """
    step = BenchmarkStep(case, (rows, length))
    elements = rows * length
    with torch.no_grad(), use_backend(backend), dry_run(), count_launches() as ours, _Ops() as ops:
        step()
    moved = sum(k.read + k.written for k in ours) + ops.bytes
    return Count(len(ours), ops.launches, moved / elements)


def operations(fn: Callable[[], Any]) -> tuple[int, int]:
    """(launches, bytes) of the torch operations in a call, as `count` counts them."""
    with _Ops() as ops:
        fn()
    return ops.launches, ops.bytes


def seconds(fn: Callable[[], Any], repeats: int = 40, warm: int = 3) -> float:
    """The fastest of several calls after a warm-up, since other programs only add time."""
    for _ in range(warm):
        fn()
    times: list[float] = []
    for _ in range(repeats):
        begin = time.perf_counter()
        fn()
        times.append(time.perf_counter() - begin)
    return min(times)


def cost(fn: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """Return the result of a call and its cost: the faster of two in seconds, FLOPs, peak memory.

    Memory is the device's on a GPU; on a CPU the largest that this process has ever been.
    """
    from torch.utils.flop_counter import FlopCounterMode

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    with FlopCounterMode(display=False) as flops:
        result = fn()

    def timed() -> None:
        fn()
        if gpu:
            torch.cuda.synchronize()

    times = seconds(timed, repeats=2, warm=0)
    if gpu:
        peak = torch.cuda.max_memory_allocated()
    else:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    numbers = {"seconds": round(times, 3), "GFLOP": round(flops.get_total_flops() / 1e9, 2)}
    return result, {**numbers, "peak MiB": round(peak / 2**20)}


class _Ops(TorchDispatchMode):
    """Counts torch operations that a GPU would have to be launched for, and their traffic."""

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.launches = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        outs = [leaf for leaf in leaves([out]) if isinstance(leaf, Tensor)]
        ins = [leaf for leaf in leaves(list(args)) if isinstance(leaf, Tensor)]
        allocates = name.startswith(("empty", "zeros", "new_"))
        if func.is_view or allocates or all(t.numel() <= 1 for t in outs):
            return out
        self.launches += 1
        self.bytes += sum(math.prod(t.shape) * t.element_size() for t in (*ins, *outs))
        return out


def _levels(kind: str) -> list[Level]:
    if kind == "velocity":
        return [Level(1000.0 * s, 1 - s, s) for s in (0.95 - 0.1 * i for i in range(9))]
    angles = [1.4 - 0.15 * i for i in range(9)]
    return [Level(int(600 * a), math.cos(a), math.sin(a)) for a in angles]
