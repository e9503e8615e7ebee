"""Denoising error per noise level, with the best linear denoiser's and the guidance gap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sampler.core.adapter import PipelineAdapter
from sampler.core.loop import Loop
from sampler.core.noise import Noise
from sampler.engine.inspection.features import check_adapter, level_at
from sampler.types import Level

SHARES = (0.05, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9)


@torch.no_grad()
def loss(
    engine: Loop,
    images: Tensor,
    prompts: Sequence[str] | None = None,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """Errors of the denoiser on images [N, 3, H, W] in [0, 1], a row per level, per element.

        error     E‖D(x) − x0‖²/n,   x = alpha·x0 + sigma·noise, one noise per image and level
        wiener    Σ_i λ_i·q²/(λ_i + q²)/n,   λ of the latents' covariance, q = sigma/alpha
        gap       E‖D_cond − D_uncond‖²/n, the guidance error; nan without prompts

    error_se: standard error over the images. With fewer images than elements the covariance is
    that of a subspace, and `wiener` is below what a linear denoiser reaches on new images. shares:
    levels as shares of the training times. Raises ValueError for another number of prompts, and
    for a level without signal.
    """
    adapter = check_adapter(engine, "loss")
    texts = None if prompts is None else list(prompts)
    if texts is not None and len(texts) != len(images):
        raise ValueError(f"loss: {len(texts)} prompts for {len(images)} images; give one each.")
    size = adapter.size(*images.shape[-2:])
    z = torch.cat([adapter.latents_of(part) for part in images.split(batch_size)])
    spectrum = eigenvalues(z)
    found: list[dict[str, Any]] = []
    for number, share in enumerate(shares):
        level = level_at(adapter.schedule, share)
        if not level.alpha:
            raise ValueError(f"loss: at t = {share} there is no signal; give a smaller share.")
        noise = Noise(tuple(seed + i for i in range(len(z)))).draw(number, z, "start")
        x = level.alpha * z + level.sigma * noise
        errors: list[Tensor] = []
        gaps: list[Tensor] = []
        for first in range(0, len(x), batch_size):
            part = slice(first, first + batch_size)
            own = None if texts is None else texts[part]
            with adapter.exclusive():
                cond, uncond = _denoised(adapter, x[part], level, own, size)
            errors.append((cond - z[part]).square().flatten(1).mean(1))
            if uncond is not None:
                gaps.append((cond - uncond).square().flatten(1).mean(1))
        error, q = torch.cat(errors), level.sigma / level.alpha
        found.append({
            "noise": share, "timestep": level.t, "q": q, "error": float(error.mean()),
            "error_se": float(error.std() / math.sqrt(len(error))) if len(error) > 1 else math.nan,
            "wiener": wiener(spectrum, q, z[0].numel()),
            "gap": float(torch.cat(gaps).mean()) if gaps else math.nan,
        })  # fmt: skip
    return found


def eigenvalues(z: Tensor) -> Tensor:
    """Eigenvalues of the covariance of rows z [N, ...] that are not 0, float64."""
    flat = z.double().flatten(1)
    flat = flat - flat.mean(0)
    return torch.linalg.svdvals(flat).square() / max(1, len(flat) - 1)


def wiener(values: Tensor, q: float, size: int) -> float:
    """Expected squared error per element of the best linear denoiser at noise q."""
    return float((values * q * q / (values + q * q)).sum() / size)


def _denoised(
    adapter: PipelineAdapter,
    x: Tensor,
    level: Level,
    prompts: Sequence[str] | None,
    size: tuple[int, int],
) -> tuple[Tensor, Tensor | None]:
    """x0 with the prompts and without; only without where there are none."""
    empty = [""] * len(x)
    both = adapter.encode(
        empty if prompts is None else list(prompts), empty, prompts is not None, size
    )

    denoiser: Any = adapter

    def x0(cond: Any) -> Tensor:
        out = denoiser.forward(x, level, cond, "main")
        return adapter.predict(x, out.to(x.dtype), level, "main").x0.tensor()

    return x0(both.cond), None if prompts is None else x0(both.uncond)
