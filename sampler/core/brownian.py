"""Standardised increments of a Brownian path, as a pure function of the path's random numbers.

    z = (B(b) − B(a))/sqrt(b − a) ~ N(0, I),   independent for intervals that do not overlap

B over the clock lambda = ln(alpha/sigma) is a stateless dyadic tree: the increment over −32 .. 32
is one draw, and a cell's increment w over the length L is divided into w/2 ± sqrt(L)/2·z, with one
draw z per cell, down to lengths of 2^−14. An increment costs about 40 draws.

The same path at other numbers of steps: Li et al. (2020), arXiv:2001.01328, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

Interval = tuple[float, float]
REACH = 32  # sigma/alpha from e^−32 to e^32
DEPTH = 20  # 2^20 cells
CELL = 2 * REACH / 2**DEPTH
WHOLE = 0  # the node of the increment over all cells; 1 .. 2^DEPTH − 1 divide cells
BEFORE = 2**DEPTH  # the node of what lies before the path: steps from alpha = 0


def increment(over: Interval, draw: Callable[[int], Tensor]) -> Tensor | None:
    """Return z [...] of an interval (a, b), a < b; None where it is shorter than a cell.

    draw(node): standard normal numbers [...] of a node of the tree. From a = −inf all of z belongs
    to the interval, whatever b.
    """
    if over[0] == -math.inf:
        return draw(BEFORE)
    first, last = (min(max(round((v + REACH) / CELL), 0), 2**DEPTH) for v in over)
    if first >= last:
        return None

    def inside(node: int, low: int, high: int, w: Tensor) -> Tensor:
        """The part of the increment w over the cells low .. high that lies in the interval."""
        if first <= low and high <= last:
            return w
        middle = (low + high) // 2
        left = w / 2 + math.sqrt((high - low) * CELL) / 2 * draw(node)
        if last <= middle:
            return inside(2 * node, low, middle, left)
        if first >= middle:
            return inside(2 * node + 1, middle, high, w - left)
        return inside(2 * node, low, middle, left) + inside(2 * node + 1, middle, high, w - left)

    whole = math.sqrt(2 * REACH) * draw(WHOLE)
    return inside(1, 0, 2**DEPTH, whole) / math.sqrt((last - first) * CELL)
