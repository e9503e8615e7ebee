"""Image quality measures: distances and diversity of features, and divergence of latents."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# Statistics of COCO latents of Stable Diffusion 1.x's VAE, as the authors' code has them.
_STATISTICS = {
    "channel": (
        (0.1455953, -0.10772908, 0.023680864, 0.045954444),
        (0.9220753, 1.0913924, 0.73026365, 0.72270846),
    ),
    "global": ((0.02687545,) * 4, (0.8845245,) * 4),
}


def magnitude_score(
    latents: Tensor,
    kernel: int = 4,
    threshold: float = 3.0,
    statistics: Literal["channel", "global"] = "channel",
) -> Tensor:
    """Magnitude score of Stable Diffusion 1.x latents, a measure of divergence artifacts, [B].

        m = max over channels of |(z − mean)/std|, max-pooled k x k with stride k;
        score = mean over cells of m where m >= threshold, else 0

    latents [B, 4, h, w], multiplied with the VAE's scaling factor; kernel k, 4 for 64 x 64 latents;
    threshold in standard deviations, the paper's 3; statistics: one mean and deviation per channel,
    or one for all. Higher is worse; it is not calibrated against human judgement, and its constants
    hold for that VAE only. The paper's text sums over the cells; its table and its code take their
    mean, as here.

    Raises ValueError for latents that do not have 4 channels, or are smaller than the kernel, and
    for other statistics.

    Reference: Diffusion Sampling with Momentum for Mitigating Divergence Artifacts (Wizadwongsa et
    al., 2024), arXiv:2307.11118, section 5.
    """
    if latents.ndim != 4 or latents.shape[1] != 4 or not 1 <= kernel <= min(latents.shape[2:]):
        raise ValueError(
            f"magnitude_score needs latents [B, 4, h, w] and a kernel from 1 to h and w, "
            f"not {tuple(latents.shape)} and {kernel}."
        )
    if statistics not in _STATISTICS:
        raise ValueError(
            f"statistics = {statistics!r:.40} must be one of {', '.join(_STATISTICS)}."
        )
    mean, std = (latents.new_tensor(v).view(1, -1, 1, 1) for v in _STATISTICS[statistics])
    magnitude = ((latents - mean) / std).abs().amax(1, keepdim=True)
    cells = F.max_pool2d(magnitude, kernel)
    return (cells * (cells >= threshold)).flatten(1).mean(1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to features a [n, d] and b [m, d].

        |mean_a − mean_b|² + tr(C_a + C_b − 2·(C_a·C_b)^{1/2})

    With centred features A and B, divided by the root of n − 1 and of m − 1, the trace of the root
    is the sum of the singular values of A·Bᵀ: exact for singular covariances too, those of fewer
    samples than features. The estimate falls with n: compare equal numbers of samples only, and
    warn below 10,000.

    Raises ValueError for fewer than two samples, and features of different length or not finite.

    Source: GANs Trained by a Two Time-Scale Update Rule (Heusel et al., 2017), arXiv:1706.08500.
    """
    a, b = _features("frechet_distance", a, b)
    gap = a.mean(0) - b.mean(0)
    first, second = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    roots = [torch.linalg.qr(x, mode="r").R for x in (first, second)]  # at most d rows
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    spread = first.square().sum() + second.square().sum() - 2 * cross
    return max(float(gap @ gap + spread), 0.0)


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Kernel distance: unbiased squared MMD of features a [n, d] and b [m, d], cubic kernel.

        k(x, y) = (x·y/d + 1)³
        MMD² = mean_{i≠j} k(a_i, a_j) + mean_{i≠j} k(b_i, b_j) − 2·mean_{i,j} k(a_i, b_j)

    Unbiased, so it may be negative. Raises ValueError for fewer than two samples, and features of
    different length or not finite.

    Source: Demystifying MMD GANs (Binkowski et al., 2018), arXiv:1801.01401.
    """
    a, b = _features("kernel_distance", a, b)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        k, n = kernel(x, x), len(x)
        return (k.sum() - k.trace()) / (n * (n - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def vendi_score(a: Tensor) -> float:
    """Vendi score of features a [n, d]: the effective number of distinct samples, 1 to n.

        exp(−Σ λ log λ),   λ the eigenvalues of K/n,   K the cosine similarities

    Raises ValueError for an empty set, and for features of length 0 or not finite.

    Source: The Vendi Score (Friedman & Dieng, 2022), arXiv:2210.02410.
    """
    a = torch.as_tensor(a).detach().to("cpu", torch.float64)
    if a.ndim != 2 or not len(a):
        raise ValueError(f"vendi_score needs features [n, d], n >= 1, not {tuple(a.shape)}.")
    _check_finite("vendi_score", a)
    if zero := (a.norm(dim=1) == 0).nonzero()[:, 0].tolist():
        raise ValueError(f"vendi_score: the features of sample {zero[0]} are all 0.")
    unit = F.normalize(a, dim=1)
    values = torch.linalg.eigvalsh(unit @ unit.T / len(a)).clamp(min=0)
    return float(torch.special.entr(values).sum().exp())


def _features(name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets of features as float64 on the CPU, checked."""
    a, b = (torch.as_tensor(x).detach().to("cpu", torch.float64) for x in (a, b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"{name} needs features [n, d] and [m, d] with n, m >= 2, "
            f"not {tuple(a.shape)} and {tuple(b.shape)}."
        )
    _check_finite(name, a, b)
    return a, b


def _check_finite(name: str, *sets: Tensor) -> None:
    for features in sets:
        if bad := (~features.isfinite()).any(1).nonzero()[:, 0].tolist():
            raise ValueError(f"{name}: the features of sample {bad[0]} are not finite.")


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of images [B, C, H, W] in [0, 1], mean per image [B]; 1 is equal.

        (2·mean_a·mean_b + c1)·(2·cov + c2) / ((mean_a² + mean_b² + c1)·(var_a + var_b + c2))

    in every Gaussian window of 11 pixels, sigma 1.5, inside the image and of each channel, with
    c1 = 0.01², c2 = 0.03²; in float32 for half precision. Raises ValueError for images of different
    shapes, below 11 pixels, or of integers.

    Source: Image Quality Assessment: From Error Visibility to Structural Similarity (Wang et al.,
    2004).
    """
    if a.shape != b.shape or a.ndim != 4 or min(a.shape[2:]) < 11:
        raise ValueError(
            f"ssim needs two sets of images [B, C, H, W] of one shape, H, W >= 11, not "
            f"{tuple(a.shape)} and {tuple(b.shape)}."
        )
    if not a.is_floating_point() or not b.is_floating_point():
        raise ValueError(f"ssim takes float images in [0, 1], not {a.dtype} and {b.dtype}.")
    exact = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(exact), b.to(exact)
    taps = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = (torch.outer(taps, taps) / taps.sum() ** 2).to(a)

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x.flatten(0, 1)[:, None], window[None, None])

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return value.flatten(1).mean(1).view(a.shape[0], -1).mean(1)
