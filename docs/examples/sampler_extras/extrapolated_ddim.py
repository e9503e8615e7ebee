from dataclasses import dataclass
from typing import Any

from sampler import Move, Prediction, SamplerBase, Span


@dataclass(frozen=True)
class ExtrapolatedDDIM(SamplerBase):
    """DDIM along an extrapolation of the last two eps, e = gamma·eps + (1 − gamma)·eps_before.

    x' = alpha'·(x − sigma·e)/alpha + sigma'·e,   written as DDIM's step and what e adds to it
    gamma: 1 is DDIM, 2 the paper's choice; 1.5 on equal steps is Adams-Bashforth of order 2.
    """

    gamma: float = 2.0
    reference = "Permenter & Yuan (2023), arXiv:2306.04848, algorithm 2"

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        now, after = span.now, span.next
        mean = after.alpha * pred.x0 + after.sigma * pred.eps
        if state:  # the first step has nothing to average with
            gain = after.sigma - after.alpha * now.sigma / now.alpha
            mean = mean + gain * (self.gamma - 1) * (pred.eps - state[0])
        return Move(mean, 0.0, (pred.eps,))
