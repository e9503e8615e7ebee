"""Solving of a stock pipeline's guidance formula from the numbers of one step.

The coefficients of `forms.py` by least squares in float64, in the differences O_k − O_0, which stay
accurate where the branches are close.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sampler.stock.forms import TOLERANCE_HALF, Form, Role, Unsolved, normed, tolerance
from sampler.stock.readings import Part, frames, rows_like

# Roles of three blocks where the coefficients do not tell, by a part of the class name.
THREE: dict[str, tuple[Role, Role, Role]] = {
    "PAG": ("uncond", "cond", "extra"),
    "Pix2Pix": ("cond", "uncond", "extra"),
    "DreamLite": ("extra", "uncond", "cond"),
    "SAG": ("uncond", "cond", "extra"),
}
ON_UNCOND = ("Pix2Pix", "SAG")  # whose extra term weighs uncond and the third branch, not cond
IDLE = 1e-4  # share of the largest weight below which a branch may be no part of the formula


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
            return _named(_without_idle(solved, blocks, m, bar), bar, name)
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


def _without_idle(form: Form, blocks: Sequence[Tensor], m: Tensor, bar: float) -> Form:
    """Leave out branches of weight 0: the pipeline evaluates them for other ends (attention)."""
    least = IDLE * max(map(abs, form.weights))
    weights = tuple(0.0 if abs(w) < least else w for w in form.weights)
    if not form.settled or 0.0 not in weights:
        return form
    made = sum((w * b.double() for w, b in zip(weights, blocks, strict=True)), 0 * m.double())
    error = _relative(made, m)
    return replace(form, weights=weights, error=error) if error <= bar else form


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
    try:
        roles = _roles(form, weights, slack, name)
    except Unsolved:
        used = tuple(w for w in weights if w)
        if not form.settled or len(used) == len(weights):
            raise
        found = iter(_roles(form, used, slack, name))
        roles = tuple(next(found) if w else "idle" for w in weights)
    on_uncond = "extra" in roles and any(part in name for part in ON_UNCOND)
    return replace(form, weights=weights, sign=sign, roles=roles, on_uncond=on_uncond)


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
        made = normed(sign * made, blocks[roles.index("cond")].double(), dims[0])
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
