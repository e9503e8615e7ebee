"""Spaces in which a rule may work, and per-sample choices between two values.

Rules whose weights sum to one give the same result in every parametrisation. Norms, projections,
cosines and ratios of standard deviations do not: such a rule has a space, "x0", "eps", "v",
"velocity", or "native", the parametrisation of the network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from sampler_kernels import gram, leaves, map_tree, recorded, where

from sampler.types import Lin, Prediction

if TYPE_CHECKING:
    from torch import Tensor

Space = Literal["x0", "eps", "v", "velocity", "native"]


def in_space(pred: Prediction, space: str) -> Lin:
    """Value of a prediction in a space."""
    return pred.out if space == "native" else getattr(pred, space)


def from_space(like: Prediction, space: str, value: Lin) -> Prediction:
    """Prediction at the x and level of `like`, from a value in a space."""
    if space == "native":
        return like.like(value)
    return Prediction.of(space, like.x, value, like.level)


def choose(rows: Tensor, yes: Lin, no: Lin) -> Lin:
    """`yes` for samples whose flag [B] is True or 1, else `no`; exact for finite values."""
    weight = recorded(rows, yes.like)
    return yes * weight + no * (1 - weight)


def choose_prediction(rows: Tensor, yes: Prediction, no: Prediction) -> Prediction:
    """`choose` for predictions, in the parametrisation of `yes`."""
    return yes.like(choose(rows, yes.out, in_space(no, yes.kind)))


def choose_state(rows: Tensor, new: Any, old: Any) -> Any:
    """The new state of a rule for samples whose flag is True, the old one for the others.

    A new state with more buffers than the old one is returned unchanged.
    """
    if len(leaves(new)) != len(leaves(old)):
        return new
    return map_tree(lambda a, b: _choose_leaf(rows, a, b), new, old)


def _choose_leaf(rows: Tensor, new: Any, old: Any) -> Any:
    if isinstance(new, Lin) or getattr(new, "ndim", 0) > 1:
        return choose(rows, Lin.of(new), Lin.of(old))
    return new.where(rows.to(new.device).bool(), old) if getattr(new, "ndim", 0) == 1 else new


def cosine(a: Lin, b: Lin) -> Tensor:
    """<a, b> / (‖a‖·‖b‖) per sample [B]; 0 where one of them is 0."""
    products = gram(a, b)
    norm = (products[0, 0] * products[1, 1]).sqrt()
    return where(norm == 0, norm, products[0, 1] / where(norm == 0, norm + 1, norm))
