"""VBLE: variational restoration in the latents of an autoencoder, without a network.

    q(z) = z̄ + a·(u − 1/2), u uniform; or N(z̄, a²); or a point at z̄
    minimise E_q ‖y − A(dec z)‖²/(2·s²) + lam·KL(q ‖ N(0, prior_std²))

Variational Bayes image restoration with compressive autoencoders (Biquard et al., 2023),
arXiv:2311.17744, and its published code; the prior there is the autoencoder's entropy model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sampler.core.adapter import PipelineAdapter
from sampler.core.noise import Noise
from sampler.registry.constraints import Count, Fraction, Nonnegative, Positive, checked
from sampler.samplers.measurement import Measurement

Family = Literal["uniform", "gaussian", "point"]

_SMALLEST, _LARGEST = 1.5e-5, 20.0  # of a, as published
_START = {"uniform": 1.0, "gaussian": math.exp(-3), "point": _SMALLEST}  # of a, as published


class Posterior(NamedTuple):
    """q(z) of latents [B, ...]: mean z̄, a, the family; losses: mean of each iteration, over B."""

    mean: Tensor
    scale: Tensor
    family: Family
    losses: tuple[float, ...] = ()

    @property
    def std(self) -> Tensor:
        """Standard deviation of every latent [B, ...]: a/√12 of a uniform, a of a Gaussian."""
        return {"uniform": 12**-0.5, "gaussian": 1.0, "point": 0.0}[self.family] * self.scale

    def draw(self, seeds: Sequence[int], index: int) -> Tensor:
        """Draw number `index` [B, ...], a function of the rows' seeds."""
        return _draw(self.mean, self.scale, self.family, Noise(tuple(seeds)), index)


class Restoration(NamedTuple):
    """Moments of the decoded draws: mean, std [B, 3, H, W] in [0, 1]; images: some of the draws.

    images [B, k, 3, H, W]; posterior: of the latents.
    """

    mean: Tensor
    std: Tensor
    images: Tensor
    posterior: Posterior


@checked("vble")
@dataclass(frozen=True)
class VBLE:
    """VBLE: variational Bayes in the latents of the pipeline's own autoencoder, no network.

    noise: s above 0, of y in units of [-1, 1]. family: of q, "uniform" (default), "gaussian" or
    "point" (the mode alone). lam: weight of KL(q ‖ p); 1 is the evidence bound, published are 0.6
    for deblurring, 2.3 for super-resolution, 4.5 for inpainting. prior_std: of the latents, 1
    for those that pipelines scale to unit variance.
    iterations: of Adam, with one draw each; 300 to 500 as published. lr: of Adam; lr_end: its
    fraction after the last iteration, reached linearly; 1 as published, 0 (default) averages the
    noise of the draws. samples: draws of the posterior for mean and std. batch: of decoded draws.

    A factorised q understates marginal deviations, since it ignores how latents depend on each
    other: use the sampler `daps` where the uncertainty itself counts.
    """

    noise: Positive
    family: Family = "uniform"
    lam: Nonnegative = 1.0
    prior_std: Positive = 1.0
    iterations: Count = 300
    lr: Positive = 0.1
    lr_end: Fraction = 0.0
    samples: Count = 100
    batch: Count = 8

    def fit(self, measured: Measurement, like: Tensor, seeds: Sequence[int]) -> Posterior:
        """Fit q for the rows of `like` [B, ...], from the measurement's start.

        Raises ValueError for a start or y of another shape. Rows do not depend on their batch.
        """
        mean = measured.start(like).detach().clone().requires_grad_()
        log_scale = torch.full_like(mean, math.log(_START[self.family])).requires_grad_()
        y, draws = measured.rows(like), Noise(tuple(seeds))
        variance = (self.noise * measured.gain) ** 2
        trained = [mean] if self.family == "point" else [mean, log_scale]
        adam: Any = torch.optim.Adam(trained, lr=self.lr)
        losses: list[float] = []
        with torch.enable_grad():
            for k in range(self.iterations):
                decay = 1 + (self.lr_end - 1) * k / max(self.iterations - 1, 1)
                adam.param_groups[0]["lr"] = self.lr * decay
                z = _draw(mean, log_scale.exp(), self.family, draws, k)
                gap = measured.forward(z) - y
                if k == 0:
                    measured.check(gap, z)
                data = gap.square().flatten(1).sum(1) / (2 * variance)
                loss = data + self.lam * self._divergence(mean, log_scale)
                for tensor, slope in zip(
                    trained, torch.autograd.grad(loss.sum(), trained), strict=True
                ):
                    tensor.grad = slope
                adam.step()
                with torch.no_grad():
                    log_scale.clamp_(math.log(_SMALLEST), math.log(_LARGEST))
                losses.append(float(loss.detach().mean()))
        return Posterior(mean.detach(), log_scale.detach().exp(), self.family, tuple(losses))

    def restore(
        self,
        adapter: PipelineAdapter,
        measured: Measurement,
        size: tuple[int, int],
        seeds: Sequence[int],
        keep: int = 1,
    ) -> Restoration:
        """Restore a measurement of images of (height, width), one row per seed.

        keep: number of draws to return as images, at most `samples`. Raises ValueError for
        another size, for videos, and for a measurement without a start.
        """
        through = measured.through(adapter.unclamped(), size)
        shape = adapter.latent_shape(*size)
        like = torch.zeros(len(seeds), *shape, device=adapter.device)
        posterior = self.fit(through, like, seeds)
        total = square = torch.zeros(len(seeds), 3, *size, dtype=torch.float64)
        kept: list[Tensor] = []
        with torch.no_grad():
            for first in range(0, self.samples, self.batch):
                numbers = range(first, min(first + self.batch, self.samples))
                draws = [posterior.draw(seeds, self.iterations + k) for k in numbers]
                decoded = adapter.decode(torch.cat(draws)).cpu()
                images = decoded.reshape(len(draws), len(seeds), *decoded.shape[1:])
                kept += list(images[: max(keep - first, 0)].unbind())
                total = total + images.double().sum(0)
                square = square + images.double().square().sum(0)
        mean = total / self.samples
        spread = (square - self.samples * mean * mean) / max(self.samples - 1, 1)
        std = spread.clamp(min=0).sqrt()
        return Restoration(mean.float(), std.float(), torch.stack(kept, 1), posterior)

    def _divergence(self, mean: Tensor, log_scale: Tensor) -> Tensor:
        """KL(q ‖ p) per row [B]; −log p(z̄) of a point, without its constant."""
        if self.family == "point":
            return (mean / self.prior_std).square().flatten(1).sum(1) / 2
        gaussian = self.family == "gaussian"
        second = mean.square() + (log_scale * 2).exp() / (1 if gaussian else 12)  # E z²
        entropy = log_scale + (0.5 * math.log(2 * math.pi * math.e) if gaussian else 0)
        each = second / (2 * self.prior_std**2) - entropy
        return (each + math.log(self.prior_std * math.sqrt(2 * math.pi))).flatten(1).sum(1)


def _draw(mean: Tensor, scale: Tensor, family: Family, noise: Noise, index: int) -> Tensor:
    if family == "point":
        return mean
    n = noise.draw(index, mean, "vble")
    if family == "uniform":
        n = torch.erf(n / math.sqrt(2)) / 2  # uniform in −1/2..1/2
    return mean + scale * n


__all__ = ["VBLE", "Posterior", "Restoration"]
