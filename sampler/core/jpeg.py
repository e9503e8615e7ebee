"""Constants of baseline JPEG: quantisation tables, colour matrix, cosine transform."""

from __future__ import annotations

import math
from collections.abc import Sequence

# ITU-T T.81, tables K.1 (luminance) and K.2 (chrominance), row by row.
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
# Full-range BT.601 (JFIF): rows Y, Cb, Cr.
YCBCR = (
    (0.299, 0.587, 0.114),
    (-0.168736, -0.331264, 0.5),
    (0.5, -0.418688, -0.081312),
)
# orthonormal DCT-II of length 8, [k][n]
COSINES = tuple(
    tuple(
        math.sqrt((1 if k == 0 else 2) / 8) * math.cos(math.pi * (2 * n + 1) * k / 16)
        for n in range(8)
    )
    for k in range(8)
)


def scaled_table(table: Sequence[Sequence[int]], quality: int) -> list[list[int]]:
    """Scale a quantisation table to a quality of 1 to 100 by the Independent JPEG Group's rule."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return [[min(255, max(1, (q * scale + 50) // 100)) for q in row] for row in table]
