"""Weight that an f-divergence gives to a density ratio: the factor of f-distill's gradient.

    D_f(p || q) = E_q[f(r)],  r = p/q (teacher over student),  f convex, f(1) = 0
    grad D_f = −E_q[h(r)·(grad log p − grad log q)·dx/dtheta],  h(r) = f''(r)·r²

Constants of h have no effect where h is divided by its mean. With 1/r in the place of r the table
is that of other divergences.

Reference: One-step Diffusion Models with f-Divergence Distribution Matching (Xu et al., 2025),
arXiv:2502.15681, theorem 1 and table 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

Divergence = Literal["rkl", "sf", "js", "sh", "kl", "jf", "lecam", "chi2", "neyman"]

# name -> h(r); beside it f(r)
WEIGHTS: dict[str, Callable[[Any], Any]] = {
    "rkl": lambda r: 0 * r + 1.0,  # −log r, reverse KL
    "sf": lambda r: 1 / (1 + r),  # (r + 1)·log(1/2 + 1/(2r)), softened reverse KL
    "js": lambda r: r / (1 + r),  # r·log r − (r + 1)·log((r + 1)/2), Jensen-Shannon
    "sh": lambda r: r**0.5,  # 2·(sqrt(r) − 1)², squared Hellinger
    "kl": lambda r: r,  # r·log r, forward KL
    "jf": lambda r: 1 + r,  # (r − 1)·log r, Jeffreys
    "lecam": lambda r: 4 * r**2 / (1 + r) ** 3,  # (r − 1)²/(2·(r + 1)), Le Cam
    "chi2": lambda r: 2 * r**2,  # (r − 1)², Pearson
    "neyman": lambda r: 1 / (r * (r > 1e-8) + 1e-8 * (r <= 1e-8)),  # (r − 1)²/(2r)
}


def f_weight(name: str, r: Any) -> Any:
    """h(r) of a divergence, for ratios r > 0 teacher/student (a float, an array or a tensor).

    name: rkl, sf, js, sh, kl, jf, lecam, chi2 or neyman. Raises ValueError for another one.
    """
    if name not in WEIGHTS:
        raise ValueError(f"Unknown divergence {name!r:.40}; one of {', '.join(WEIGHTS)}.")
    return WEIGHTS[name](r)
