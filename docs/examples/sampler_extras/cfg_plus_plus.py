from dataclasses import dataclass
from typing import Any

from sampler import Branch, Cond, GuidanceBase, Prediction, Span


@dataclass(frozen=True)
class CFGPlusPlus(GuidanceBase):
    """CFG++: the target is guided, x0(g) with g = u + lam·(c − u); the direction is u.

    With DDIM:  x' = alpha'·x0(g) + sigma'·eps(u).   lam: 0 (unconditional) to 1; 0.6 is usual.
    """

    lam: float = 0.6
    reference = "Chung et al. (2024), arXiv:2406.08070, algorithm 2"
    needs = property(lambda self: frozenset({"cond", "uncond"}))

    def plan(self, x: Any, span: Span, cond: Cond, state: Any) -> dict[str, Branch]:
        return {"uncond": Branch(cond.uncond), "cond": Branch(cond.cond)}

    def combine(self, x: Any, preds: Any, span: Span, state: Any) -> tuple[Prediction, Any]:
        u, c = preds["uncond"], preds["cond"]
        guided = u.like(u.out + self.lam * (c.out - u.out))
        return Prediction.from_x0(x, guided.x0, span.now, eps=u.eps), state
