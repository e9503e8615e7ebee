"""Operation codes of recorded programs, shared by the recorders and the Triton kernels.

Plain integers, because the kernels read them as compile-time constants. A code is part of the key
under which Triton keeps a compiled kernel on disk: append new ones, never renumber.
"""

# Formulas: a node is (code, a, b).
LOAD = 0  # tensor a
FIRST = 1  # the first element of each row of tensor a
FILL = 2  # constant a everywhere
ADD = 3  # node a + node b
SUB = 4  # node a - node b
MUL_CONST = 5  # node a * constant b
MUL_TABLE = 6  # node a * coefficient b, one per row
DIV_CONST = 7  # node a / constant b
DIV_TABLE = 8  # node a / coefficient b

# Per-row scalars: a node is (code, a, b, c); ADD and SUB as above.
PART = 9  # the sum of pair b of the partial sums a; c rows share it
INPUT = 10  # tensor a; c rows share a value
CONST = 11  # constant a
MUL = 12  # node a * node b
DIV = 13  # node a / node b
SQRT = 14  # square root of node a
LESS = 15  # 1 where node a < node b, else 0
LESS_EQUAL = 16  # 1 where node a <= node b, else 0
EQUAL = 17  # 1 where node a == node b, else 0
WHERE = 18  # node b where node a != 0, else node c
