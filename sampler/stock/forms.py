"""The guidance formula of a stock pipeline, as `solving.py` finds it from one step.

With P_k what a pipeline makes of the row blocks of its network's answers [B, ...], and M what it
gives to its scheduler, a formula is the coefficients a of

    M = Σ_k a_k · P_k         a = (1 − s, s) for classifier-free guidance at scale s

whose sum is 1. P_k is the answer itself, its negative for a network whose clock runs backwards, or
an estimate of `preconditioning.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sampler.stock.preconditioning import Preconditioning, estimated_x0
from sampler.stock.readings import Frame, Part, Region, rows_like

Role = Literal["cond", "uncond", "extra", "idle"]
TOLERANCE, TOLERANCE_HALF = 1e-5, 2e-2  # of relative residuals


class Unsolved(Exception):
    """A formula that is no sum of the branches; the message is the sentence for the user."""


class Given(NamedTuple):
    """Arguments of a scheduler step, and the answers that it follows.

    output: `model_output`; x: `sample`; answers: of the network, in call order. kind: the
    parametrisation of `output`. sigma: of x = x0 + sigma·eps (exploding), of a flow or of a
    v-prediction, 0 for other samples. data: standard deviation of the data in the scheduler's
    configuration.
    """

    output: Tensor
    x: Tensor
    answers: Sequence[Tensor]
    kind: str = ""
    sigma: float = 0.0
    exploding: bool = False
    data: float = 0.5


@dataclass(frozen=True)
class Form:
    """A solved formula.

    frame, part: how model_output and answers are read. roles, weights: of every block, over all
    used calls in order; `weights` sum to 1 and `sign` is their common factor. used: numbers of
    blocks per call, 0 for calls that are no part of the formula. preconditioning: of every
    branch, None for the answers themselves. region: the part of the sample that is guided, None
    for all of it; copied: the branch that the rest is a copy of, None where the rest is given.
    token: the dimension along which the pipeline sets norms after guiding, None for none; dims: of
    the samples then. shares: of the guidance for every entry of the dimension `share_dim`, such as
    the frames of a video; none where it is whole. on_uncond: the extra term weighs uncond and a
    third branch, not cond. settled: False where two branches are equal, so that the roles are a
    guess. error: the relative residual.
    """

    frame: Frame
    part: Part
    used: tuple[int, ...]
    weights: tuple[float, ...]
    roles: tuple[Role, ...] = ()
    sign: float = 1.0
    preconditioning: Preconditioning | None = None
    region: Region | None = None
    copied: int | None = None
    token: int | None = None
    dims: int = 0
    shares: tuple[float, ...] = ()
    share_dim: int = 0
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

    @property
    def match_norm(self) -> list[int] | None:
        """Value of the field of that name with which a rule sets the norms of the pipeline."""
        return None if self.token is None else [self.token - self.dims]

    @property
    def given_rest(self) -> bool:
        """Return whether the pipeline sets a part of the sample itself, such as first frames."""
        return self.region is not None and self.copied is None

    def rows(self, m: Tensor) -> Tensor:
        """The guided part of model_output or sample, a row per sample."""
        rows = self.frame.rows(m)
        return rows if self.region is None else self.region.of(rows)

    def back(self, guided: Tensor, output: Tensor) -> Tensor:
        """model_output with guided rows in their place."""
        if self.region is not None:
            guided = self.region.put(guided, self.frame.rows(output))
        return self.frame.back(guided, output)

    def answers(self, given: Given) -> list[Tensor]:
        """Row blocks of the answers in the order of `roles`, of the whole sample."""
        like = self.frame.rows(given.output)
        found: list[Tensor] = []
        for answer, count in zip(given.answers, self.used, strict=True):
            if count:
                rows = rows_like(answer, like, self.part)
                found.extend([] if rows is None else rows.chunk(len(rows) // len(like)))
        return found

    def branches(self, given: Given) -> list[Tensor]:
        """P_k of the whole sample [B, ...] in the order of `roles`."""
        if self.preconditioning is not None:
            x, sign = self.frame.rows(given.x), self.sign
            make = self.preconditioning.estimate
            return [make(sign * block, x, given.sigma) for block in self.answers(given)]
        found = [self.sign * b if self.sign < 0 else b for b in self.answers(given)]
        return self._shared(found) if self.shares else found

    def _shared(self, branches: list[Tensor]) -> list[Tensor]:
        """Branches whose difference is scaled by the shares; see `frame_scales.py`."""
        at, cond = self.roles.index("uncond"), branches[self.roles.index("cond")]
        shape = [-1 if dim == self.share_dim else 1 for dim in range(cond.ndim)]
        share = torch.tensor(self.shares, device=cond.device).view(shape)
        branches[at] = (1 - share) * cond + share * branches[at]
        return branches

    def guided(self, branches: Sequence[Tensor]) -> list[Tensor]:
        """The guided part of every branch."""
        return [b if self.region is None else self.region.of(b) for b in branches]

    @torch.no_grad()
    def residual(self, given: Given, branches: Sequence[Tensor] | None = None) -> float:
        """‖M − Σ a·P‖ / ‖M‖; of x0 of both where the answers are preconditioned, and of the
        directions of its tokens where the norms are set. branches: P, where they are known.
        """
        branches = self.branches(given) if branches is None else branches
        m, blocks = self.frame.rows(given.output).float(), self.guided(branches)
        made = self.weights[0] * blocks[0].float()
        for weight, block in zip(self.weights[1:], blocks[1:], strict=True):
            made = made.add_(block.float(), alpha=weight)
        if self.token is not None:
            made = normed(made, blocks[self.roles.index("cond")].float(), self.token)
        if self.region is not None:
            rest = m if self.copied is None else branches[self.copied].float()
            made = self.region.put(made, rest)
        if self.preconditioning is not None:
            x, x0 = self.frame.rows(given.x).float(), self.preconditioning.x0
            m, made = (x0(value, x, given.sigma) for value in (m, made))
        return float(torch.dist(m, made)) / max(float(torch.linalg.vector_norm(m)), 1e-30)

    def x0_of_rest(self, given: Given) -> Tensor:
        """x0 of the part that the pipeline sets itself."""
        assert self.region is not None
        m, x = (self.region.rest(self.frame.rows(v)) for v in (given.output, given.x))
        return estimated_x0(given.kind, m.double(), x.double(), given.sigma)


def tolerance(*values: Tensor) -> float:
    """Bar of relative residuals for the coarsest of these dtypes."""
    coarse = any(value.dtype in (torch.float16, torch.bfloat16) for value in values)
    return TOLERANCE_HALF if coarse else TOLERANCE


def normed(made: Tensor, cond: Tensor, dim: int) -> Tensor:
    """`made` with the norms of `cond` along a dimension (Qwen-Image, Lumina 2)."""
    own = made.norm(dim=dim, keepdim=True).clamp_min(1e-30)
    return made * (cond.norm(dim=dim, keepdim=True) / own)


__all__ = ["Form", "Given", "Role", "Unsolved", "normed", "tolerance"]
