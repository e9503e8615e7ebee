"""Starting from an image: strengths, noise, and both ways in."""

import numpy as np
import pytest
import torch
from PIL import Image

import sampler
from sampler.core import images
from tests import tiny
from tests.analytic import mixture, vp_grid


def test_levels_noise_and_the_identity_at_strength_0():
    levels, x0 = vp_grid(10), torch.randn(2, 3, 4, dtype=torch.float64)
    same, left = sampler.start_from(x0, levels, 0.0, [1, 2])
    assert same is x0 and left == levels[-1:]
    for strength, steps in ((0.05, 0), (0.1, 1), (0.35, 3), (0.6, 6), (1.0, 10)):
        x, left = sampler.start_from(x0, levels, strength, [1, 2])
        assert len(left) == steps + 1 and left[-1] == levels[-1]
        if steps:
            noise = (x - left[0].alpha * x0) / left[0].sigma
            for row, seed in enumerate((1, 2)):
                drawn = torch.randn((3, 4), generator=torch.Generator().manual_seed(seed))
                assert torch.allclose(noise[row], drawn.double())
    _, left = sampler.start_from(x0, vp_grid(100), 0.29, [1, 2])
    assert len(left) == 29 + 1  # 0.29·100 is 28.999999999999996 in floating point
    with pytest.raises(ValueError, match=r"strength = 1\.5"):
        sampler.start_from(x0, levels, 1.5, [1, 2])


def test_a_weak_noise_stays_near():
    mix, levels = mixture(8), vp_grid(40)
    x0 = mix.mu[:1] + 0.3 * torch.randn(1, 8, dtype=torch.float64)
    engine = sampler.Engine(sampler.denoiser(lambda x, level, _: mix.eps(x, level)))
    gaps = []
    for strength in (0.1, 0.4, 0.9):
        x, left = sampler.start_from(x0, levels, strength, [3])
        gaps.append(float((engine.run(x, left, sampler="ghvb") - x0).norm()))
    assert gaps[0] < gaps[1] < gaps[2]


def test_generate_from_an_image(tmp_path):
    engine = sampler.load(tiny.sd())
    pixels = (np.random.default_rng(0).random((32, 48, 3)) * 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    path, options = str(tmp_path / "in.png"), {"height": 32, "width": 48, "steps": 6}
    result = engine.generate(
        "a fox", image=path, strength=0.5, seeds=[1], sampler="ghvb", output="tensor", **options
    )
    assert result.nfe == [6]  # three steps of two rows
    assert torch.equal(engine.generate(**result.config).images, result.images)
    for other in (Image.open(path), images.read(path), images.read(path)[0]):
        again = engine.generate(
            "a fox",
            image=other,
            strength=0.5,
            seeds=[1],
            sampler="ghvb",
            output="tensor",
            **options,
        )
        assert torch.equal(again.images, result.images)
    same = engine.generate("a fox", image=path, strength=0.0, output="latent", **options)
    latents = engine.pipeline.latents_of(images.read(path))
    assert torch.equal(same.latents, latents) and same.nfe == [0]
    two = torch.cat([images.read(path), 1 - images.read(path)])
    pair = engine.generate(["a", "b"], image=two, strength=0.0, output="latent", **options)
    assert torch.allclose(pair.latents[:1], latents, atol=1e-5)
    assert not torch.allclose(pair.latents[1:], latents, atol=1e-2)


def test_refusals(tmp_path):
    engine = sampler.load(tiny.sd())
    image = torch.rand(1, 3, 32, 32)
    with pytest.raises(ValueError, match="strength = 2"):
        engine.generate("a", image=image, strength=2.0, height=32, width=32)
    with pytest.raises(ValueError, match="pixels"):
        engine.generate("a", image=image, height=32, width=48)
    with pytest.raises(sampler.SamplerError, match=r"none\.png"):
        engine.generate("a", image=str(tmp_path / "none.png"), height=32, width=32)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(sampler.SamplerError, match="not a readable image"):
        images.read(tmp_path / "text.png")
