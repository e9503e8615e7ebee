"""The operations on lazy values: linear combinations (`settle`) and inner products (`gram`)."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sampler_kernels.backend import backend
from sampler_kernels.deferred import Deferred, computed
from sampler_kernels.lin import Lin, Scalar, first_elements
from sampler_kernels.scalars import RowScalar, select
from sampler_kernels.trees import leaves, map_tree

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def gram(*vectors: Lin | Tensor, axes: Sequence[int] | None = None) -> Tensor:
    """Inner products per row: G[i, j, b] = <V_i[b], V_j[b]>, shape [K, K, B].

    `axes`: sum over these dimensions only (0, the batch, is not allowed); the result then is
    [K, K, B, ...] with the summed dimensions kept as 1, and broadcasts against the latents.
    Sums are in float32 (float64 for float64 vectors), in an order that does not depend on B.
    On the Triton backend the result is a `RowGram`, which acts as that tensor: its scalars are
    computed in one launch with the coefficients that are derived from them.

    Raises ValueError for vectors of different shapes, or axes that are not dimensions of them.
    """
    lins = [Lin.of(v) for v in vectors]
    shape = lins[0].shape
    for lin in lins[1:]:
        if lin.like is not lins[0].like and lin.shape != shape:
            raise ValueError(
                f"gram needs vectors of one shape, not {tuple(shape)} and {tuple(lin.shape)}."
            )
    dims = None
    if axes is not None:
        ndim = len(shape)
        dims = tuple(sorted({axis % ndim if -ndim <= axis < ndim else 0 for axis in axes}))
        if not dims or 0 in dims:
            raise ValueError(
                f"gram: axes {tuple(axes)} must lie in 1..{ndim - 1} (0 is the batch)."
            )
    return backend(lins[0].like).gram(lins, dims)


def pivot(value: Lin | Tensor) -> Lin:
    """The first element of each row, expanded over the row; a constant to gradients.

    A number near the others, for sums that do not depend on it: a variance of v − pivot(v) needs no
    mean beforehand and does not cancel where the mean is large.
    """
    return first_elements(Lin.of(value), {})


def settle(tree: Any) -> Any:
    """The same tree with every Lin computed: tensors of float32, or float64 for float64 inputs.

    All Lins of the tree are passed to the backend together, so that they can share one pass.
    A Lin that is a plain float32 or float64 tensor gives that tensor itself, not a copy.
    """
    found = leaves(tree)
    lins = [leaf for leaf in found if type(leaf) is Lin]
    late = [leaf for leaf in found if isinstance(leaf, Deferred)]
    if not lins and not late:
        return tree
    if late:  # only the Triton backend defers, which is imported then
        values = sys.modules["sampler_kernels.fused"].settle(lins, late=late)
    else:
        values = backend(lins[0].like).settle(lins)
    done = dict(zip(map(id, [*lins, *late]), values, strict=True))

    def known(leaf: Any) -> Any:
        return done.get(id(leaf), leaf)

    return map_tree(known, tree)


def recorded(value: Tensor, like: Tensor) -> Any:
    """A tensor [B] on the device of `like`, whose arithmetic costs no launches of its own.

    On the Triton backend everything derived from it is computed in one launch, as with the numbers
    of `gram`.
    """
    return backend(like).recorded(value.to(like.device).float())


def sqrt(value: Scalar) -> Any:
    """Square root of a scalar: a float, or a tensor of per-row scalars."""
    return math.sqrt(value) if isinstance(value, (int, float)) else value.sqrt()


def where(condition: Any, yes: Scalar, no: Scalar) -> Any:
    """`yes` where the condition holds, else `no`; for floats, or per-row scalar tensors."""
    if isinstance(condition, bool):
        return yes if condition else no
    if isinstance(condition, RowScalar):
        return select(condition, yes, no)
    import torch

    return torch.where(condition, computed(yes), computed(no))


def _evaluate(lin: Lin, dtype: torch.dtype | None) -> Tensor:
    return settle(lin) if dtype is None else backend(lin.like).settle([lin], dtype)[0]


Lin.evaluate = _evaluate
