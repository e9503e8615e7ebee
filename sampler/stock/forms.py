"""The guidance formula of a stock pipeline, as `solving.py` finds it from one step.

With O_k the row blocks of the network's answers [B, ...] and M what the pipeline gives to its
scheduler, a formula is the coefficients a of

    M = Σ_k a_k · O_k         a = (1 − s, s) for classifier-free guidance at scale s

whose sum is 1, or −1 for a network whose clock runs backwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sampler.stock.readings import Frame, Part, rows_like

Role = Literal["cond", "uncond", "extra", "idle"]
TOLERANCE, TOLERANCE_HALF = 1e-5, 2e-2  # of relative residuals


class Unsolved(Exception):
    """A formula that is no sum of the branches; the message is the sentence for the user."""


@dataclass(frozen=True)
class Form:
    """A solved formula.

    frame, part: how model_output and answers are read. roles, weights: of every block, over all
    used calls in order; `weights` sum to 1 and `sign` is their common factor. used: numbers of
    blocks per call, 0 for calls that are no part of the formula. token: the dimension whose norm
    the pipeline sets after guiding, None for none. on_uncond: the extra term weighs uncond and a
    third branch, not cond. settled: False where two branches are equal, so
    that the roles are a guess. error: the relative residual.
    """

    frame: Frame
    part: Part
    used: tuple[int, ...]
    weights: tuple[float, ...]
    roles: tuple[Role, ...] = ()
    sign: float = 1.0
    token: int | None = None
    on_uncond: bool = False
    settled: bool = True
    error: float = 0.0

    @property
    def scale(self) -> float:
        """s of the part (1 − s)·uncond + s·cond."""
        if "uncond" not in self.roles:
            return 1.0
        known = dict(zip(self.roles, self.weights, strict=True))
        return known["cond"] if self.on_uncond else 1.0 - known["uncond"]

    @property
    def extra(self) -> tuple[float, ...]:
        """Weights of what the pipeline adds to its classifier-free guidance."""
        if "extra" not in self.roles:
            return ()
        plain = {"cond": self.scale, "uncond": 1.0 - self.scale, "extra": 0.0, "idle": 0.0}
        return tuple(w - plain[role] for w, role in zip(self.weights, self.roles, strict=True))

    def blocks(self, answers: Sequence[Tensor], output: Tensor) -> list[Tensor]:
        """The branches [B, ...] in the order of `roles`."""
        like = self.frame.rows(output)
        found: list[Tensor] = []
        for answer, count in zip(answers, self.used, strict=True):
            if count:
                rows = rows_like(answer, like, self.part)
                found.extend([] if rows is None else rows.split(len(like)))
        return found

    @torch.no_grad()
    def residual(self, blocks: Sequence[Tensor], output: Tensor) -> Tensor:
        """‖M − Σ a·O‖ / ‖M‖, 0-d; of the directions of its tokens where the norms are set."""
        m = self.frame.rows(output).float()
        weights = [self.sign * w for w in self.weights]
        made = weights[0] * blocks[0].float()
        for weight, block in zip(weights[1:], blocks[1:], strict=True):
            made = made.add_(block.float(), alpha=weight)
        if self.token is not None:
            made = normed(made, blocks[self.roles.index("cond")].float(), self.token)
        return (m - made).norm() / m.norm().clamp_min(1e-30)


def tolerance(*values: Tensor) -> float:
    """Bar of relative residuals for the coarsest of these dtypes."""
    coarse = any(value.dtype in (torch.float16, torch.bfloat16) for value in values)
    return TOLERANCE_HALF if coarse else TOLERANCE


def normed(made: Tensor, cond: Tensor, dim: int) -> Tensor:
    """`made` with the norms of `cond` along a dimension (Qwen-Image, Lumina 2)."""
    own = made.norm(dim=dim, keepdim=True).clamp_min(1e-30)
    return made * (cond.norm(dim=dim, keepdim=True) / own)


__all__ = ["Form", "Role", "Unsolved", "normed", "tolerance"]
