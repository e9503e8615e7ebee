"""The backend that the user asks for: `use_backend`, else SAMPLER_KERNELS, else "auto"."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

NAMES = ("auto", "reference", "triton")

# Read once: a lookup that finds nothing takes as long as a small torch operation.
_default = os.environ.get("SAMPLER_KERNELS") or "auto"
_chosen: ContextVar[str | None] = ContextVar("sampler_kernels_backend", default=None)


@contextmanager
def use_backend(name: str) -> Generator[None]:
    """Select the backend of latent-sized arithmetic in this context.

    name: "auto", "reference" or "triton". Takes precedence over the environment variable
    SAMPLER_KERNELS. Raises ValueError for another name.
    """
    token = _chosen.set(_checked(name, "use_backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


def requested() -> str:
    """The name set by `use_backend`, else by SAMPLER_KERNELS, else "auto".

    The variable is read when the package is imported. Raises ValueError where it holds an unknown
    name.
    """
    return _chosen.get() or _checked(_default, "SAMPLER_KERNELS")


def _checked(name: str, where: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{where}: unknown backend {name!r}; one of {', '.join(NAMES)}.")
    return name
