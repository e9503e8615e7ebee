"""The artifact metric against the authors' code, and structural similarity."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sampler.metrics import magnitude_score, ssim

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
