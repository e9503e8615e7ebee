"""Non-linear measurements: clipping, lost phase, JPEG."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor

from sampler.core.jpeg import CHROMINANCE, COSINES, LUMINANCE, YCBCR, scaled_table
from sampler.registry.constraints import Positive, checked

_fft: Any = torch.fft  # whose functions have no types
_linalg: Any = torch.linalg


@checked("hdr")
@dataclass(frozen=True)
class HighDynamicRange:
    """A(x) = clip(gain·x, −1, 1): highlights and shadows are lost. A_dagger(y) = y/gain."""

    gain: Positive = 2.0

    def A(self, x: Tensor) -> Tensor:
        return (self.gain * x).clamp(-1, 1)

    def A_dagger(self, y: Tensor) -> Tensor:
        return y / self.gain


@checked("phase")
@dataclass(frozen=True)
class PhaseRetrieval:
    """A(x) = |FFT(x)|, orthonormal, after zero-padding by `pad` pixels on each side.

    The phase is lost: sign and point reflection of x cannot be recovered. A_dagger is
    |FFT^{-1}(y)|, cropped: a start, no inverse. Computed in the precision of x.
    """

    pad: Annotated[int, Ge(0)] = 64

    def A(self, x: Tensor) -> Tensor:
        x = _fft.ifftshift(F.pad(x, (self.pad,) * 4), dim=(-2, -1))
        spectrum: Tensor = _fft.fftshift(_fft.fft2(x, norm="ortho"), dim=(-2, -1))
        return spectrum.abs()

    def A_dagger(self, y: Tensor) -> Tensor:
        spectrum = _fft.ifftshift(y, dim=(-2, -1)).to(torch.complex(y[:0], y[:0]).dtype)
        x: Tensor = _fft.fftshift(_fft.ifft2(spectrum, norm="ortho"), dim=(-2, -1)).abs()
        return x[..., self.pad : x.shape[-2] - self.pad, self.pad : x.shape[-1] - self.pad]


@checked("jpeg")
@dataclass(frozen=True)
class JPEG:
    """A(x) = what is left of x after JPEG at `quality` (1 to 100), without chroma subsampling.

    8 x 8 blocks of cosine coefficients in YCbCr, rounded to multiples of the standard tables. The
    rounding's gradient is taken as 1 (straight-through): its own is 0, and the measurement would
    have no effect. Height and width must be multiples of 8. A_dagger(y) = y.
    """

    quality: Annotated[int, Ge(1), Le(100)] = 20

    def A(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        if channels != 3 or height % 8 or width % 8:
            raise ValueError(
                f"jpeg: {tuple(x.shape[1:])} must be 3 x H x W with H and W multiples of 8."
            )
        colour, cosine = torch.tensor(YCBCR).to(x), x.new_tensor(COSINES)
        ycc = torch.einsum("ij,bjhw->bihw", colour, x * 127.5)
        blocks = ycc.reshape(batch, 3, height // 8, 8, width // 8, 8).permute(0, 1, 2, 4, 3, 5)
        table = self._tables().to(x)[:, None, None]
        scaled = cosine @ blocks @ cosine.T / table
        rounded = scaled + (scaled.round() - scaled).detach()
        blocks = cosine.T @ (rounded * table) @ cosine
        ycc = blocks.permute(0, 1, 2, 4, 3, 5).reshape(batch, 3, height, width)
        back: Tensor = _linalg.inv(colour.double()).to(x)
        return torch.einsum("ij,bjhw->bihw", back, ycc) / 127.5

    def A_dagger(self, y: Tensor) -> Tensor:
        return y

    def _tables(self) -> Tensor:
        """Quantisation steps [3, 8, 8] of this quality, by the IJG's rule."""
        tables = [scaled_table(t, self.quality) for t in (LUMINANCE, CHROMINANCE, CHROMINANCE)]
        return torch.tensor(tables, dtype=torch.float64)
