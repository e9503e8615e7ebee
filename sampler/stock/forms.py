"""The guidance formula of a stock pipeline, solved from the numbers of one step.

With O_k the row blocks of the network's answers [B, ...] and M what the pipeline gives to its
scheduler, a formula is the coefficients a of

    M = Σ_k a_k · O_k         a = (1 − s, s) for classifier-free guidance at scale s

solved by least squares in float64, in the differences O_k − O_0, which stay accurate where the
branches are close. The sum of a is 1, or −1 for a network whose clock runs backwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sampler.stock.readings import Frame, Part, frames, rows_like

Role = Literal["cond", "uncond", "extra"]
TOLERANCE, TOLERANCE_HALF = 1e-5, 2e-2  # of relative residuals
# Roles of three blocks where the coefficients do not tell, by a part of the class name.
THREE: dict[str, tuple[Role, Role, Role]] = {
    "PAG": ("uncond", "cond", "extra"),
    "Pix2Pix": ("cond", "uncond", "extra"),
    "DreamLite": ("extra", "uncond", "cond"),
}


class Unsolved(Exception):
    """A formula that is no sum of the branches; the message is the sentence for the user."""


@dataclass(frozen=True)
class Form:
    """A solved formula.

    frame, part: how model_output and answers are read. roles, weights: of every block, over all
    used calls in order; `weights` sum to 1 and `sign` is their common factor. used: numbers of
    blocks per call, 0 for calls that are no part of the formula. token: the dimension whose norm
    the pipeline sets after guiding, None for none. settled: False where two branches are equal, so
    that the roles are a guess. error: the relative residual.
    """

    frame: Frame
    part: Part
    used: tuple[int, ...]
    weights: tuple[float, ...]
    roles: tuple[Role, ...] = ()
    sign: float = 1.0
    token: int | None = None
    settled: bool = True
    error: float = 0.0

    @property
    def scale(self) -> float:
        """s of the part (1 − s)·uncond + s·cond."""
        if "uncond" not in self.roles:
            return 1.0
        known = dict(zip(self.roles, self.weights, strict=True))
        return known["cond"] if self._extra_on_uncond else 1.0 - known["uncond"]

    @property
    def _extra_on_uncond(self) -> bool:
        """Pix2Pix: the extra term weighs uncond and a third branch, not cond."""
        return self.roles[:1] == ("cond",) and "extra" in self.roles

    @property
    def extra(self) -> tuple[float, ...]:
        """Weights of what the pipeline adds to its classifier-free guidance."""
        if "extra" not in self.roles:
            return ()
        plain = {"cond": self.scale, "uncond": 1.0 - self.scale, "extra": 0.0}
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
        made = sum(
            (self.sign * w * block.float() for w, block in zip(self.weights, blocks, strict=True)),
            torch.zeros_like(m),
        )
        if self.token is not None:
            made = _normed(made, blocks[self.roles.index("cond")].float(), self.token)
        return (m - made).norm() / m.norm().clamp_min(1e-30)


def tolerance(*values: Tensor) -> float:
    """Bar of relative residuals for the coarsest of these dtypes."""
    coarse = any(value.dtype in (torch.float16, torch.bfloat16) for value in values)
    return TOLERANCE_HALF if coarse else TOLERANCE


def solve(output: Tensor, x: Tensor, answers: Sequence[Tensor], name: str) -> Form:
    """Solve the formula of a step from `model_output`, `sample` and the answers, in call order.

    name: of the pipeline class, for the order of three branches. Raises Unsolved with a sentence
    for formulas that rescale, that are no sum of the branches, or whose order is not known.
    """
    bar, best = tolerance(output, *answers), None
    if not output.isfinite().all():
        raise Unsolved("its model_output is not finite")
    closest: Form | None = None
    for form, blocks in _candidates(output, x, answers):
        m = form.frame.rows(output)
        solved = _fitted(form, blocks, m)
        if solved.error <= bar:
            return _named(solved, bar, name)
        if closest is None or solved.error < closest.error:
            closest, best = solved, blocks
    if closest is None or best is None:
        shapes = ", ".join(str(tuple(a.shape)) for a in answers)
        raise Unsolved(
            f"the network answers with {shapes} and the scheduler is given {tuple(output.shape)}"
        )
    return _rescaled(closest, best, closest.frame.rows(output), bar, name)


def _candidates(
    output: Tensor, x: Tensor, answers: Sequence[Tensor]
) -> Iterator[tuple[Form, list[Tensor]]]:
    for frame in frames(output, x, list(answers)):
        like, seen = frame.rows(output), set[tuple[Any, ...]]()
        parts: tuple[Part, Part] = ("leading", "trailing")
        for part in parts:
            rows = [rows_like(answer, like, part) for answer in answers]
            used = tuple(0 if r is None else len(r) // len(like) for r in rows)
            key = tuple(r is not None and (r.data_ptr(), r.stride()) for r in rows)
            if not 1 <= sum(used) <= 4 or key in seen:
                continue
            seen.add(key)
            blocks = [b for r in rows if r is not None for b in r.split(len(like))]
            yield Form(frame, part, used, ()), blocks


def _fitted(form: Form, blocks: Sequence[Tensor], m: Tensor) -> Form:
    """Least squares over the first block and the differences from it."""
    first = blocks[0].detach().double().flatten()
    columns = [first, *(b.detach().double().flatten() - first for b in blocks[1:])]
    target, length = m.detach().double().flatten(), first.norm()
    least = 1e-3 if tolerance(m, *blocks) == TOLERANCE_HALF else 1e-6
    if not length and not target.any():
        return replace(form, weights=(1.0, *[0.0] * (len(blocks) - 1)), settled=len(blocks) == 1)
    kept = [k for k, c in enumerate(columns) if c.norm() > least * length]
    settled = len(kept) == len(columns)
    matrix = torch.stack([columns[k] for k in kept] or [first], 1)
    norms = matrix.norm(dim=0).clamp_min(1e-300)
    basis, triangle = torch.linalg.qr(matrix / norms)
    pivots = triangle.diagonal().abs()
    if pivots.min() < least:
        settled = False
    found = torch.linalg.lstsq(triangle, (basis.T @ target)[:, None]).solution[:, 0] / norms
    error = (matrix @ found - target).norm() / target.norm().clamp_min(1e-300)
    weights = [0.0] * len(columns)
    for k, value in zip(kept or [0], found.tolist(), strict=True):
        weights[k] = value
    weights[0] -= sum(weights[1:])
    return replace(form, weights=tuple(weights), settled=settled, error=float(error))


def _named(form: Form, bar: float, name: str) -> Form:
    """Sign and roles of a formula that fits; see the table in docs/howto/stock_pipelines.md."""
    total, slack = sum(form.weights), 100 * bar
    if abs(abs(total) - 1) > slack:
        raise Unsolved(
            f"the weights of its branches sum to {total:.4g} instead of 1, so it rescales the "
            "guided output; switch that off (guidance_rescale=0) and set 'rescale' or "
            "'match_norm' in the rule"
        )
    sign = 1.0 if total > 0 else -1.0
    weights = tuple(w / total for w in form.weights)
    return replace(form, weights=weights, sign=sign, roles=_roles(form, weights, slack, name))


def _roles(form: Form, weights: tuple[float, ...], slack: float, name: str) -> tuple[Role, ...]:
    if len(weights) == 1:
        return ("cond",)
    if len(weights) == 2:
        if not form.settled:
            return ("uncond", "cond")
        first = weights[0] > weights[1]
        if max(weights) < 1 - slack:
            raise Unsolved(
                f"it weighs its two branches by {weights[0]:.3g} and {weights[1]:.3g}, which is a "
                "guidance scale below 1; give it one above 1"
            )
        if "PAG" in name:
            raise Unsolved(
                "it has no unconditional branch, only a perturbed one; call it with "
                "guidance_scale > 1"
            )
        return ("cond", "uncond") if first else ("uncond", "cond")
    if len(weights) == 3:
        for part, roles in THREE.items():
            if part in name:
                return roles
    raise Unsolved(
        f"it has {len(weights)} branches, weighed by "
        f"{', '.join(f'{w:.3g}' for w in weights)}, and which one is unconditional is not known "
        "for this class"
    )


def _rescaled(form: Form, blocks: Sequence[Tensor], m: Tensor, bar: float, name: str) -> Form:
    """A formula whose tokens get the norm of cond after guiding; else raise Unsolved."""
    whole = tuple(range(1, m.ndim))
    for dims in (whole, (m.ndim - 1,)) if len(blocks) == 2 else ():
        scale = _common_scale(blocks, m, dims)
        weights = (1 - scale, scale)
        made = weights[0] * blocks[0].double() + weights[1] * blocks[1].double()
        factor = _factor(made, m.double(), dims)
        if _relative(made * factor, m) > bar:
            continue
        if dims == whole:
            raise Unsolved(
                "it rescales the guided output of every image; switch that off "
                "(guidance_rescale=0, cfg_normalization=False) and set rescale or match_norm in "
                "the rule"
            )
        roles = _roles(replace(form, settled=True), weights, 100 * bar, name)
        sign = -1.0 if float(factor.median()) < 0 else 1.0
        made = _normed(sign * made, blocks[roles.index("cond")].double(), dims[0])
        if _relative(made, m) <= bar:
            error = _relative(made, m)
            found = replace(form, weights=weights, roles=roles, sign=sign, error=error)
            return replace(found, token=dims[0], settled=True)
    raise Unsolved(
        f"its formula is no sum of the {len(blocks)} branches of its network "
        f"(relative residual {form.error:.1e})"
    )


def _relative(made: Tensor, m: Tensor) -> float:
    return float((made - m.double()).norm() / m.double().norm().clamp_min(1e-300))


def _normed(made: Tensor, cond: Tensor, dim: int) -> Tensor:
    """`made` with the norms of `cond` along a dimension (Qwen-Image, Lumina 2)."""
    own = made.norm(dim=dim, keepdim=True).clamp_min(1e-30)
    return made * (cond.norm(dim=dim, keepdim=True) / own)


def _common_scale(blocks: Sequence[Tensor], m: Tensor, dims: tuple[int, ...]) -> float:
    """s of M ∝ O_0 + s·(O_1 − O_0) with a factor per group, the median over the groups."""
    o, d = blocks[0].detach().double(), (blocks[1] - blocks[0]).detach().double()
    target = m.detach().double()
    oo, od, dd = ((a * b).sum(dims) for a, b in ((o, o), (o, d), (d, d)))
    ot, dt = (o * target).sum(dims), (d * target).sum(dims)
    det = oo * dd - od * od
    factor, moved = (ot * dd - dt * od) / det, (dt * oo - ot * od) / det
    ratio = (moved / factor).flatten()
    good = ratio[ratio.isfinite()]
    return float(good.median()) if len(good) else 1.0


def _factor(made: Tensor, m: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Factor per group with which `made` comes nearest to `m`."""
    square = (made * made).sum(dims, keepdim=True)
    return (made * m).sum(dims, keepdim=True) / square.clamp_min(1e-30)


__all__ = ["Form", "Role", "Unsolved", "solve", "tolerance"]
