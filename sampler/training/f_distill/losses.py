"""Weights and losses of f-distill.

Notation: x [B, ...] student samples, t [B] their noise levels as fractions of the schedule, l
[B, K] logits of K heads, positive on real samples, so that exp(l) estimates r = teacher/student.

    r = exp(clamp(mean_k l)),  clamped
    bins[i] ← rho·bins[i] + (1 − rho)·mean of r in bin i of t  (non-empty bins)
    r ← r / bins[i],  h = h(r),  h ← h / mean h

E_q[p/q] = 1 at every level, so that dividing by the mean of a bin removes the calibration error of
the discriminator. In float32 (float64 where given), over all samples of all processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from sampler.guidance.f_divergence import f_weight

LOGIT_CLAMP = 10.0  # of the mean logit; FastGen's
EPS = 1e-6  # added to every divisor; FastGen's

Gather = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Weighting:
    """The map from logits to weights h.

    divergence: as `f_weight`; low, high: clamp of the ratio; times: the range of t, divided into
    equal bins; rho: EMA decay of a bin's mean, 0 for none; normalise: divide ratios by the mean of
    their bin.
    """

    divergence: str
    low: float = 0.1
    high: float = 20.0
    times: tuple[float, float] = (0.001, 0.999)
    rho: float = 0.0
    normalise: bool = True

    def __call__(
        self, logits: Tensor, t: Tensor, bins: list[float], gather: Gather = lambda v: v
    ) -> tuple[Tensor, Tensor, list[float]]:
        """Return (h [B] of mean 1 over all processes, estimated r [B], next bins).

        For reverse KL h = 1 exactly, and the bins do not change.
        """
        level = logits.detach().flatten(1)
        level = level if level.dtype == torch.float64 else level.float()
        r = level.mean(1).clamp(-LOGIT_CLAMP, LOGIT_CLAMP).exp().clamp(self.low, self.high)
        if self.divergence == "rkl":
            return torch.ones_like(r), r, bins
        if self.normalise:
            index = self._bin(t.to(r), len(bins))
            bins = self._updated(gather(r), gather(index), bins)
            h = f_weight(self.divergence, r / (r.new_tensor(bins)[index] + EPS))
        else:
            h = f_weight(self.divergence, r)
        return h / (gather(h).mean() + EPS), r, bins

    def _bin(self, t: Tensor, count: int) -> Tensor:
        first, last = self.times
        return ((t - first) / (last - first) * count).long().clamp(0, count - 1)

    def _updated(self, r: Tensor, index: Tensor, bins: list[float]) -> list[float]:
        after = list(bins)
        for i in index.unique().tolist():
            inside = r[index == i]
            mean = float(inside.sum() / (len(inside) + EPS))
            after[i] = self.rho * bins[i] + (1 - self.rho) * mean
        return after


def matching_loss(x: Tensor, teacher_x0: Tensor, fake_x0: Tensor, h: Tensor) -> Tensor:
    """Return the student's distribution-matching loss per sample [B].

        g = (fake_x0 − teacher_x0)·w·h,   w = 1/(mean |x − teacher_x0| + eps) per sample
        loss = mean ||x − sg(x − g)||²/2,   so that d loss/dx = g/numel

    With h = 1 it is distribution matching (VSD, DMD). Only x gets a gradient.
    """
    with torch.no_grad():
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        teacher, fake, now = (v.detach().to(wide) for v in (teacher_x0, fake_x0, x))
        shape = (-1, *(1,) * (x.ndim - 1))
        w = 1 / ((now - teacher).abs().flatten(1).mean(1) + EPS)
        g = (fake - teacher) * (w * h.to(wide)).view(shape)
        target = now - g
    return 0.5 * (x.to(wide) - target).square().flatten(1).mean(1)


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Return the student's adversarial loss per sample [B]: mean over heads of softplus(−l)."""
    return softplus(-fake_logits.float()).flatten(1).mean(1)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return the logistic loss per sample [B]: softplus(l_fake) + softplus(−l_real)."""
    fake = softplus(fake_logits.float()).flatten(1).mean(1)
    return fake + softplus(-real_logits.float()).flatten(1).mean(1)
