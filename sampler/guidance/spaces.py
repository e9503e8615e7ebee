"""The spaces in which a rule may work, and per-row choices between two values.

Rules whose weights sum to one give the same answer in every parametrisation. Norms, projections,
cosines and ratios of standard deviations do not: such a rule names its space, "x0", "eps", "v",
"velocity", or "native", which is whatever the network predicts.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from sampler_kernels import gram, leaves, map_tree, recorded, where

from sampler.types import Lin, Prediction

if TYPE_CHECKING:
    from torch import Tensor

Space = Literal["x0", "eps", "v", "velocity", "native"]


def in_space(pred: Prediction, space: str) -> Lin:
    """The prediction's value in a space."""
    return pred.out if space == "native" else getattr(pred, space)


def from_space(like: Prediction, space: str, value: Lin) -> Prediction:
    """A prediction at the x and level of `like`, from a value in a space."""
    if space == "native":
        return like.like(value)
    return Prediction.of(space, like.x, value, like.level)


def choose(rows: Tensor, yes: Lin, no: Lin) -> Lin:
    """`yes` in the rows [B] where it is True or 1, else `no`; exact for finite values."""
    weight = recorded(rows, yes.like)
    return yes * weight + no * (1 - weight)


def choose_prediction(rows: Tensor, yes: Prediction, no: Prediction) -> Prediction:
    """The same for predictions, in the parametrisation of `yes`."""
    return yes.like(choose(rows, yes.out, in_space(no, yes.kind)))


def choose_state(rows: Tensor, new: Any, old: Any) -> Any:
    """A rule's new state in the rows where it is True, the old one elsewhere.

    A state that has grown (a buffer that was not there yet) is taken as it is.
    """
    if new is old:
        return new
    if len(leaves(new)) != len(leaves(old)):
        return new
    return map_tree(partial(_choose_leaf, rows), new, old)


def _choose_leaf(rows: Tensor, new: Any, old: Any) -> Any:
    if isinstance(new, Lin) or getattr(new, "ndim", 0) > 1:
        return choose(rows, Lin.of(new), Lin.of(old))
    return new.where(rows.to(new.device).bool(), old) if getattr(new, "ndim", 0) == 1 else new


def cosine(a: Lin, b: Lin) -> Tensor:
    """<a, b> / (‖a‖·‖b‖) per row [B]; 0 where one of them is 0."""
    products = gram(a, b)
    norm = (products[0, 0] * products[1, 1]).sqrt()
    return products[0, 1] / where(norm == 0, 1.0, norm)
