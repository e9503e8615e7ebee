"""Measurement operators of inverse problems, y = A(x) + noise, and how they are named in files.

An operator has `A(x)`, differentiable, rows independent, x [B, C, H, W] in [-1, 1]; and, where
there is a start better than the one a user gives, `A_dagger(y) -> x`, a pseudo-inverse. These are
the method names of deepinv's physics, so that those objects, and anything else with them, serve as
well. The filters are in `operators_filter.py`, the non-linear ones in `operators_nonlinear.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, cast

import torch
from annotated_types import Gt, Le
from torch import Tensor

from sampler.registry.constraints import checked

_linalg: Any = torch.linalg  # whose functions have no types
_HERE = "sampler.samplers.operators"
# name in a configuration -> (module, class)
OPERATORS = {
    "inpaint": (_HERE, "Inpaint"),
    "denoise": (_HERE, "Identity"),
    "grayscale": (_HERE, "Grayscale"),
    "compressed_sensing": (_HERE, "CompressedSensing"),
    "superres": (f"{_HERE}_filter", "SuperResolution"),
    "deblur": (f"{_HERE}_filter", "Deblur"),
    "hdr": (f"{_HERE}_nonlinear", "HighDynamicRange"),
    "phase": (f"{_HERE}_nonlinear", "PhaseRetrieval"),
    "jpeg": (f"{_HERE}_nonlinear", "JPEG"),
}


def build(spec: Any) -> Any:
    """An operator from its name, {"name": ..., field: ...}, a list (composed), or as it is.

    Raises ValueError for an unknown name or field.
    """
    if isinstance(spec, (list, tuple)):
        return Compose(tuple(map(build, cast("Sequence[Any]", spec))))
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        return spec
    settings = cast("Mapping[str, Any]", spec)
    name: Any = settings.get("name")
    if name not in OPERATORS:
        raise ValueError(f"Unknown operator {name!r}; one of {', '.join(OPERATORS)}.")
    module, cls = OPERATORS[name]
    operator = getattr(importlib.import_module(module), cls)
    given = {k: v for k, v in settings.items() if k != "name"}
    allowed = [f.name for f in fields(operator)]
    if wrong := sorted(set(given) - set(allowed)):
        raise ValueError(
            f"operator {name!r} has no field {wrong[0]!r}; it has {', '.join(allowed) or 'none'}."
        )
    return operator(**given)


def measure(
    operator: Any,
    x: Tensor,
    sigma: float = 0.0,
    seed: int = 0,
    data_range: tuple[float, float] = (-1.0, 1.0),
) -> Tensor:
    """y = A(x) + noise: what a sensor would see of clean images x [B, ...].

    sigma: the noise's standard deviation as a share of the data range, so 0.1 means the same for
    images in [-1, 1] as for images in [0, 1]. Row b has the noise of seed + b.
    """
    from sampler.core.noise import Noise

    y = getattr(operator, "A", operator)(x)
    if sigma == 0:
        return y
    width = data_range[1] - data_range[0]
    noise = Noise(tuple(seed + b for b in range(len(y)))).draw(0, y, "reddiff")
    return y + sigma * width * noise


@dataclass(frozen=True, eq=False)
class Inpaint:
    """A(x) = mask·x: pixels are lost where the mask is 0; y has the size of the image.

    mask: tensor [H, W], or [C, H, W] per element, 1 (or True) where x is known; or the path of an
    image file, whose white (> 0.5) is to be filled in, as in diffusers' inpainting pipelines.
    A_dagger leaves the holes at 0, mid-grey.
    """

    mask: Any

    def __post_init__(self) -> None:
        mask = self.mask
        if isinstance(mask, str):
            from sampler.core.images import read_mask

            mask = 1 - read_mask(mask)
        if not isinstance(mask, Tensor) or mask.ndim not in (2, 3):
            raise ValueError("inpaint: mask must be a tensor [H, W] or [C, H, W], or a file.")
        object.__setattr__(self, "_known", mask)

    def A(self, x: Tensor) -> Tensor:
        known: Tensor = cast(Any, self)._known
        if known.shape[-2:] != x.shape[-2:] or (
            known.ndim == 3 and len(known) not in (1, x.shape[1])
        ):
            raise ValueError(
                f"inpaint: a mask of {tuple(known.shape)} does not fit images of "
                f"{tuple(x.shape[1:])}; give one of the image's size."
            )
        return known.to(x) * x

    def A_dagger(self, y: Tensor) -> Tensor:
        return self.A(y)


@dataclass(frozen=True)
class Identity:
    """A(x) = x; all that is lost is noise."""

    def A(self, x: Tensor) -> Tensor:
        return x

    def A_dagger(self, y: Tensor) -> Tensor:
        return y


@dataclass(frozen=True)
class Grayscale:
    """A(x) = the mean of the channels [B, 1, H, W]; A_dagger repeats it (pseudo-inverse)."""

    channels: int = 3

    def A(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True)

    def A_dagger(self, y: Tensor) -> Tensor:
        return y.expand(-1, self.channels, -1, -1).contiguous()


@dataclass(frozen=True)
class Matrix:
    """A(x) = matrix·x on flattened rows, x [B, *shape]; y [B, m].

    inverse: the pseudo-inverse [D, m], computed where None.
    """

    matrix: Any
    shape: tuple[int, ...]
    inverse: Any = None

    def __post_init__(self) -> None:
        size = torch.Size(self.shape).numel()
        if self.matrix.ndim != 2 or self.matrix.shape[1] != size:
            raise ValueError(
                f"A matrix for rows of {tuple(self.shape)} must be [m, {size}], "
                f"not {tuple(self.matrix.shape)}."
            )
        if self.inverse is None:
            object.__setattr__(self, "inverse", _linalg.pinv(self.matrix))

    def A(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix.to(x).T

    def A_dagger(self, y: Tensor) -> Tensor:
        return (y @ self.inverse.to(y).T).reshape(-1, *self.shape)


@checked("compressed_sensing")
@dataclass(frozen=True)
class CompressedSensing:
    """A(x) = S·x with `ratio`·D random directions, orthonormal rows, drawn from `seed`.

    shape: (C, H, W) of the images. The matrix is dense: D·m numbers.
    """

    shape: tuple[int, ...]
    ratio: Annotated[float, Gt(0), Le(1)] = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        size = torch.Size(self.shape).numel()
        generator = torch.Generator().manual_seed(self.seed)
        draws = torch.randn(size, max(1, round(self.ratio * size)), generator=generator)
        rows: Tensor = _linalg.qr(draws).Q.T.contiguous()
        object.__setattr__(self, "_matrix", Matrix(rows, tuple(self.shape), rows.T.contiguous()))

    def A(self, x: Tensor) -> Tensor:
        return cast(Any, self)._matrix.A(x)

    def A_dagger(self, y: Tensor) -> Tensor:
        return cast(Any, self)._matrix.A_dagger(y)


@dataclass(frozen=True)
class Compose:
    """A(x) = A_n(... A_1(x)); A_dagger undoes them in the reverse order."""

    parts: Sequence[Any]

    def A(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part.A(x)
        return x

    def A_dagger(self, y: Tensor) -> Tensor:
        for part in reversed(self.parts):
            y = part.A_dagger(y)
        return y
