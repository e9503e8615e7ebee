"""The artifact metric against the authors' code, and measures on known answers."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sampler.bundled.classifier import feature_statistics
from sampler.bundled.classifier import frechet_distance as classifier_distance
from sampler.metrics import (
    frechet_distance,
    kernel_distance,
    magnitude_score,
    ssim,
    vendi_score,
)

GOLDEN = np.load(Path(__file__).parent / "golden" / "samplers" / "magnitude_score.npz")


@pytest.mark.parametrize("case", range(4))
def test_golden(case):
    latent = torch.from_numpy(GOLDEN[f"m{case}_latent"])
    kernel, threshold, per_channel = GOLDEN[f"m{case}_kernel_threshold_perchannel"].tolist()
    statistics = "channel" if per_channel else "global"
    got = magnitude_score(latent, kernel, threshold, statistics)
    assert float(got) == pytest.approx(float(GOLDEN[f"m{case}_score_mean"]), rel=1e-6)


def test_calm_latents_score_nothing_and_rows_are_their_own():
    calm = torch.zeros(1, 4, 16, 16)
    burnt = calm.clone()
    burnt[0, 2, 5, 5] = 9.0
    scores = magnitude_score(torch.cat([calm, burnt]))
    assert scores[0] == 0 and scores[1] == magnitude_score(burnt)[0] > 0


def test_latents_of_another_vae_are_refused():
    with pytest.raises(ValueError, match="not \\(1, 16, 8, 8\\)"):
        magnitude_score(torch.zeros(1, 16, 8, 8))


def test_structural_similarity():
    a = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ssim(a, a), torch.ones(2))
    # constant images: only the luminance term is left
    dark, light = torch.full_like(a, 0.2), torch.full_like(a, 0.6)
    term = (2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4)
    assert torch.allclose(ssim(dark, light), torch.full((2,), term), atol=1e-4)
    # images that disagree within their windows, and in half of the rows only
    assert float(ssim(a[:1], 1 - a[:1])) < 0
    mixed = ssim(a, torch.stack([a[0], 1 - a[1]]))
    assert mixed[0] == pytest.approx(1) and mixed[1] < 0
    with pytest.raises(ValueError, match="of one shape"):
        ssim(a, a[..., :8])


def test_a_half_precision_image_is_compared_in_single_and_integers_are_refused():
    torch.manual_seed(0)
    a = torch.full((1, 3, 16, 16), 0.7) + 0.01 * torch.rand(1, 3, 16, 16)
    b = a + 0.02 * torch.rand_like(a)
    for dtype in (torch.float16, torch.bfloat16):
        low = a.to(dtype), b.to(dtype)
        assert torch.equal(ssim(*low), ssim(*(x.float() for x in low)))
    with pytest.raises(ValueError, match=r"float images in \[0, 1\], not torch.uint8"):
        ssim((a * 255).byte(), (b * 255).byte())


def test_the_distance_of_few_samples_is_exact():
    """Of two samples m ± u and n ± v the covariances are 2·u·uᵀ and 2·v·vᵀ."""
    torch.manual_seed(0)
    m, u, n, v = torch.randn(4, 160, dtype=torch.float64)
    a, b = torch.stack([m + u, m - u]), torch.stack([n + v, n - v])
    wanted = (m - n) @ (m - n) + 2 * u @ u + 2 * v @ v - 4 * (u @ v).abs()
    assert frechet_distance(a, b) == pytest.approx(float(wanted), rel=1e-13)
    assert 0 <= frechet_distance(a, a) < 1e-10
    many = torch.randn(3, 160, dtype=torch.float64)
    statistics = feature_statistics(many)
    assert classifier_distance(*statistics, *statistics) >= 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(value):
    features = torch.eye(4)
    features[2, 1] = value
    for call in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match="the features of sample 2 are not finite"):
            call(torch.eye(4), features)
    with pytest.raises(ValueError, match="the features of sample 2 are not finite"):
        vendi_score(features)
    with pytest.raises(ValueError, match="the features of sample 0 are all 0"):
        vendi_score(torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"kernel": 0}, "a kernel from 1"), ({"statistics": "x"}, "channel, glo")],
)
def test_options_of_the_magnitude_score_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        magnitude_score(torch.zeros(1, 4, 8, 8), **options)
