"""Formulas of stock pipelines that rescale the guided output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from sampler.stock.forms import Form, Unsolved, normed
from sampler.stock.roles import roles_of


def rescaled(form: Form, blocks: Sequence[Tensor], m: Tensor, bar: float, name: str) -> Form | None:
    """A formula of two branches whose guided tokens, or other groups along one dimension, get the
    norm of cond; else None.

    Raises Unsolved for one that rescales whole images.
    """
    whole = tuple(range(1, m.ndim))
    single = [(dim,) for dim in reversed(range(1, m.ndim))]  # tokens first
    for dims in (whole, *single) if len(blocks) == 2 else ():
        scale = _common_scale(blocks, m, dims)
        weights = (1 - scale, scale)
        made = weights[0] * blocks[0].double() + weights[1] * blocks[1].double()
        factor = _factor(made, m.double(), dims)
        if relative(made * factor, m) > bar:
            continue
        if dims == whole:
            raise Unsolved(
                "it rescales the guided output of every image; switch that off "
                "(guidance_rescale=0, cfg_normalization=False) and set rescale or match_norm in "
                "the rule"
            )
        roles = roles_of(weights, True, 100 * bar, name)
        sign = -1.0 if float(factor.median()) < 0 else 1.0
        made = normed(sign * made, blocks[roles.index("cond")].double(), dims[0])
        if (error := relative(made, m)) <= bar:
            found = replace(form, weights=weights, roles=roles, sign=sign, error=error)
            return replace(found, token=dims[0], dims=m.ndim, settled=True)
    return None


def relative(made: Tensor, m: Tensor) -> float:
    """‖M − made‖ / ‖M‖."""
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
