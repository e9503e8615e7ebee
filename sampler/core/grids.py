"""Betas, timesteps and sigma ramps of the forward processes, for `schedule.py` only.

Where a stock diffusers scheduler computes the same, its operations are repeated in their order
and precision, so that levels are equal bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch


def alphas_cumprod(config: Mapping[str, Any]) -> torch.Tensor:
    """Cumulative alphas acp [N], float32, from the betas of a diffusers scheduler's config.

    Zero terminal SNR: Lin et al. (2023), arXiv:2305.08891, algorithm 1. Raises ValueError for an
    unknown beta_schedule.
    """
    start, end = config["beta_start"], config["beta_end"]
    snr_shift = float(config.get("snr_shift_scale", 1.0))  # CogVideoX
    count = int(config.get("num_train_timesteps", 1000))
    kind = config.get("beta_schedule", "linear")
    if kind == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float32)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    elif kind == "squaredcos_cap_v2":
        bar = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        capped = [min(1 - b / a, 0.999) for a, b in pairwise(bar)]
        betas = torch.tensor(capped, dtype=torch.float32)
    else:
        raise ValueError(
            f"beta_schedule = {kind!r} is not supported; use 'linear', 'scaled_linear' or "
            "'squaredcos_cap_v2'."
        )
    zero_snr = bool(config.get("rescale_betas_zero_snr"))
    if snr_shift != 1:
        acp = torch.cumprod(1.0 - betas.double(), 0)
        acp = acp / (snr_shift + (1 - snr_shift) * acp)
        return (_zero_snr(acp) if zero_snr else acp).float()
    if zero_snr:
        bar = _zero_snr(torch.cumprod(1 - betas, 0))
        betas = 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])
    return torch.cumprod(1.0 - betas, 0)


def _zero_snr(acp: torch.Tensor) -> torch.Tensor:
    """Shift and scale sqrt(acp) [N] to end at 0 with its first value kept."""
    root = acp.sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * (first / (first - last))
    return root**2


def floats(values: torch.Tensor) -> list[float]:
    """Convert a tensor [N] to Python numbers."""
    return values.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def timesteps(
    steps: int, count: int, spacing: str, offset: int, open_end: bool, fractional: bool
) -> Sequence[float]:
    """Choose `steps` of `count` training timesteps, noisy first (arXiv:2305.08891, table 2).

    open_end: spread steps + 1 points and drop the last. fractional: "linspace" is not rounded to
    integers.
    """
    if spacing == "trailing":
        points = np.arange(count, 0, -count / steps)[:steps]
        return [int(t) - 1 for t in np.round(points)]
    points = steps + 1 if open_end else steps
    if spacing == "leading":
        ratio = count // points
        times = [i * ratio + offset for i in range(points)]
    elif fractional:
        times = np.linspace(0, count - 1, points, dtype=np.float32).tolist()
    else:
        times = [round(t) for t in np.linspace(0, count - 1, points).tolist()]
    return [min(t, count - 1) for t in times[points - steps :]][::-1]


def consistency_timesteps(steps: int, count: int, origin: int, share: float = 1.0) -> list[int]:
    """Choose `steps` of the `origin` timesteps of a consistency distillation, noisy first.

    share: of those timesteps, from the clean end.
    """
    known = [(i + 1) * (count // origin) - 1 for i in range(int(origin * share))][::-1]
    return [known[math.floor(i)] for i in np.linspace(0, len(known), steps, endpoint=False)]


@dataclass(frozen=True)
class FlowSpread:
    """Spacing of a flow-matching scheduler's times in 0..1; `count` times in training.

    shift: s' = shift·s / (1 + (shift − 1)·s), for larger images (Esser et al., 2024,
    arXiv:2403.03206, eq. 23); static: a constant of the model, otherwise it follows the image
    size. open_end: spread one point more and drop the last. from_zero: spread over 0..1 − 1/N
    instead of 1/N..1; to_zero: over 0..1 without its end. terminal: stretch the times so that
    the last one is this.
    """

    count: int
    shift: float
    static: bool
    open_end: bool = False
    from_zero: bool = False
    terminal: float | None = None
    to_zero: bool = False

    def times(
        self, steps: int, own: Sequence[float] | None = None
    ) -> tuple[list[float], list[float]]:
        """Return (sigmas, timesteps), noisy first, float32; own: the sigmas before the shift."""
        sigmas = self._even(steps) if own is None else np.array(own, dtype=np.float32)
        if self.static:
            sigmas = self._shifted(sigmas)
        else:
            sigmas = self.shift / (self.shift + (1 / sigmas - 1))
        if self.terminal is not None and sigmas[-1] < 1:
            left = 1 - sigmas
            sigmas = 1 - left / (left[-1] / (1 - self.terminal))
        sigmas = sigmas.astype(np.float32)
        return sigmas.tolist(), (sigmas * np.float32(self.count)).tolist()

    def _even(self, steps: int) -> np.ndarray:
        if self.count == 1:  # times in 0..1, where 1/N is no least one
            return np.linspace(1.0, 0.0, steps + 1)[:steps]
        if self.from_zero:
            return (1 - np.linspace(1.0, 1 / self.count, steps + 1))[:0:-1]
        if self.to_zero:
            return np.linspace(1.0, 0.0, steps + 1)[:steps]
        if self.open_end:
            return np.linspace(1.0, 1 / self.count, steps + 1)[:steps]
        least = np.array([1], dtype=np.float32) / self.count
        if self.static:  # the stock table is shifted already, and its ends once more
            least = self._shifted(least)
        return np.linspace(self.count, least.item() * self.count, steps) / self.count

    def _shifted(self, sigmas: np.ndarray) -> np.ndarray:
        return self.shift * sigmas / (1 + (self.shift - 1) * sigmas)


def dynamic_mu(tokens: int, config: Mapping[str, float], max_shift: float = 1.15) -> float:
    """Shift exponent of a flow model for an image of `tokens` latent tokens.

    Linear in tokens through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift).
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    gain = (top - base) / (high - low)
    return tokens * gain + (base - gain * low)
