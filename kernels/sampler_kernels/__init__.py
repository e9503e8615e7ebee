"""Row-linear algebra for guidance and sampling arithmetic.

A *row* is one sample of a batch, flattened. Every guidance rule and every sampler step of this
project is a linear combination of latent-sized tensors whose coefficients are per-row scalars, and
those scalars depend on the tensors only through inner products. So there are two latent-sized
operations: `settle` (linear combinations, all outputs at once) and `gram` (inner products).

Importing this package imports neither torch nor triton.
"""

from sampler_kernels.choice import use_backend
from sampler_kernels.lin import Lin
from sampler_kernels.rows import gram, pivot, recorded, settle, sqrt, where
from sampler_kernels.trees import leaves, map_tree

__all__ = [
    "Lin",
    "gram",
    "leaves",
    "map_tree",
    "pivot",
    "recorded",
    "settle",
    "sqrt",
    "use_backend",
    "where",
]
