"""Proximal matching: losses whose minimiser is the proximal operator of −log p, and their order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sampler.objectives.samples import per_sample

if TYPE_CHECKING:
    from torch import Tensor


def proximal_matching_loss(out: Tensor, x0: Tensor, gamma: float | None) -> Tensor:
    """Return the loss of each sample [B] of an estimate `out` of x0 [B, ...].

        1 − exp(−‖out − x0‖²/gamma²);   gamma None: mean |out − x0|

    Its minimiser tends to the mode of p(x0 | x), the proximal operator of −sigma²·log p at the
    noised x, as gamma tends to 0; that of the absolute error is the median of each element. Far
    from x0, in units of gamma, the first has no gradient, so the second comes before it.

    Source: proximal matching (Fang et al., 2024), arXiv:2310.14344, eq. 3.2, and its code.
    """
    gap = out - x0
    if gamma is None:
        return per_sample(gap.abs())
    return 1 - (-gap.square().flatten(1).sum(1) / gamma**2).exp()


def proximal_gamma(
    update: int, pretraining: int, stage: int, stages: int, smallest: float
) -> float | None:
    """Return gamma of an update: None in `pretraining` updates, then halved after every `stage`.

        gamma = smallest·2^(stages − 1 − k),   k = min((update − pretraining) // stage, stages − 1)

    Source: the published code of proximal matching (Fang et al., 2024), arXiv:2310.14344.
    """
    if update < pretraining:
        return None
    k = min((update - pretraining) // stage, stages - 1)
    return smallest * 2 ** (stages - 1 - k)
