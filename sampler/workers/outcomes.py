"""Outcome of one image: its pixels, or the reason of a failure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sampler.runs.media import Sound


@dataclass(frozen=True)
class GeneratedImage:
    """Pixels [H, W, C] of uint8, network evaluations, milliseconds, and size of the micro-batch.

    pixels: [F, H, W, C] of a video; a sound. C is 4 with alpha, else 3.
    """

    pixels: np.ndarray | Sound
    nfe: int
    ms: int
    micro: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """Reason for a missing image. code: oom, nonfinite, exception or flagged."""

    code: str
    where: str
    message: str


Outcome = GeneratedImage | Failure


def failure_of(error: BaseException, memory: bool) -> Failure:
    text = " ".join(str(error).split())[:500] or type(error).__name__
    if memory:
        return Failure("oom", "device", "out of memory")
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = trace.tb_frame.f_globals.get("__name__", "?") if trace is not None else "?"
    return Failure("exception", str(where), f"{type(error).__name__}: {text}")
