"""The Jacobian of a pipeline's denoiser at an image, with pictures of its eigenvectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sampler.core.adapter import PipelineAdapter
from sampler.core.loop import Loop
from sampler.engine.inspection.basis import Basis, Denoise, basis
from sampler.engine.inspection.features import check_adapter, level_at, noised, raw_output
from sampler.engine.inspection.pictures import curves, sheet
from sampler.types import Level

SHOWN = 4  # eigenvectors in the sheet
BATCH = 16


def denoiser_of(
    adapter: PipelineAdapter, level: Level, prompt: str, size: tuple[int, int]
) -> Denoise:
    """D(y), the network's x0 at x = alpha·y, for rows y [R, ...]."""

    def denoise(y: Tensor) -> Tensor:
        parts: list[Tensor] = []
        for part in y.split(BATCH):
            x = level.alpha * part
            out = raw_output(adapter, x, level, prompt, size)
            parts.append(adapter.predict(x, out.to(x.dtype), level, "main").x0.tensor())
        return torch.cat(parts)

    return denoise


@torch.no_grad()
def inspected(
    engine: Loop, image: Tensor, shares: Sequence[float], prompt: str = "", signs: int = 24,
    full: bool = False, seed: int = 0,
) -> tuple[list[dict[str, Any]], dict[str, bytes]]:  # fmt: skip
    """Inspect the denoiser at an image [1, 3, H, W] in [0, 1] noised to each level.

    Returns a row per level and pictures by file name: the spectra, and per level a sheet of the
    noised, the denoised and the given image, and of the denoised one moved by two posterior
    standard deviations q·√λ along each of the leading eigenvectors. Raises ValueError at a level
    without signal.
    """
    adapter = check_adapter(engine, "basis")
    size = adapter.size(*image.shape[-2:])
    z = adapter.latents_of(image)
    table: list[dict[str, Any]] = []
    files: dict[str, bytes] = {}
    spectra: dict[str, Any] = {}
    for share in shares:
        level = level_at(adapter.schedule, share)
        if not level.alpha or not level.sigma:
            raise ValueError(
                f"basis: t = {share} is a level without {'noise' if level.alpha else 'signal'}; "
                "give one between."
            )
        y, q = noised(z, level, seed) / level.alpha, level.sigma / level.alpha
        with adapter.exclusive():
            denoise = denoiser_of(adapter, level, prompt, size)
            found = basis(denoise, y, q, signs, full=full, seed=seed)
        error = float((found.denoised - z).square().sum())
        table.append({"noise": share, "timestep": level.t, "q": q, **_numbers(found, error)})
        spectra[f"t = {level.t:g}"] = (range(1, len(found.values) + 1), found.values.tolist())
        files[f"t{level.t:03.0f}.png"] = _sheet(adapter, image, y, q, found)
    files["spectrum.png"] = curves("eigenvalues of (J + Jᵀ)/2", spectra, "number", "eigenvalue")
    return table, files


def _numbers(found: Basis, error: float) -> dict[str, float]:
    return {
        "trace": found.trace, "trace_se": found.trace_error, "predicted": found.predicted,
        "error": error, "sure": found.sure, "asymmetry": found.asymmetry, "affine": found.affine,
        **{f"value_{k + 1}": float(v) for k, v in enumerate(found.values[:3])},
    }  # fmt: skip


def _sheet(adapter: PipelineAdapter, image: Tensor, y: Tensor, q: float, found: Basis) -> bytes:
    shown = found.vectors[:SHOWN]
    length = 2 * q * found.values[: len(shown)].clamp(min=0).sqrt()
    moves = length.view(-1, *[1] * (shown.ndim - 1)).to(shown) * shown
    d = found.denoised
    decoded = adapter.decode(torch.cat([y, d, d - moves, d + moves])).cpu()
    count = len(shown)
    first = [decoded[0], decoded[1], image[0].cpu()]
    below, above = decoded[2 : 2 + count], decoded[2 + count :]
    blank = torch.ones_like(first[0])
    lines = [
        [*first, *([blank] * max(0, count - 3))], [*below], [*above],
    ]  # fmt: skip
    columns = [*map(str, range(1, max(3, count) + 1))]
    names = ["noised, denoised, given", "- 2 deviations", "+ 2 deviations"]
    return sheet("denoised image along its leading eigenvectors", columns, lines, names)
