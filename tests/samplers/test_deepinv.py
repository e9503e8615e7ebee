"""Operators of deepinv itself, where it is installed; it needs a torchvision of the same torch."""

import pytest
import torch

import sampler
from sampler.samplers.measurement import measurement
from tests import tiny
from tests.analytic import vp_grid

try:
    import deepinv
except (ImportError, RuntimeError) as error:  # a torchvision of another torch is a RuntimeError
    pytest.skip(f"deepinv cannot be imported: {error}", allow_module_level=True)


def physics(name):
    """An operator of deepinv on images [B, 3, 32, 32] in [0, 1]."""
    made, size = deepinv.physics, (3, 32, 32)
    if name == "downsampling":
        return made.Downsampling(img_size=size, factor=4, filter="bicubic", padding="circular")
    if name == "blur":
        return made.BlurFFT(img_size=size, filter=made.blur.gaussian_blur(sigma=1.5))
    if name == "inpainting":
        mask = torch.ones(1, *size)
        mask[..., 12:20, 12:20] = 0
        return made.Inpainting(img_size=size, mask=mask)
    return made.CompressedSensing(img_size=size, m=300)


METHODS = ("reddiff", "daps", "data", "admm")


@pytest.mark.parametrize("name", ["downsampling", "blur", "inpainting", "compressed_sensing"])
@pytest.mark.parametrize("method", METHODS)
def test_an_operator_of_deepinv_is_restored_with(name, method):
    """The measurement is fitted under the prior N(0, I) of pixels in [-1, 1]."""
    operator = physics(name)
    truth = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y = operator.A(truth)
    made = measurement(operator, y, needs_start=True)
    assert torch.allclose(made.forward(2 * truth - 1), y, atol=1e-5)  # its images are in [0, 1]

    def mean(x, level, _):
        return level.alpha * x / (level.alpha**2 + level.sigma**2)

    engine = sampler.Engine(sampler.denoiser(mean, "x0"))
    spec = {"name": method, "operator": operator, "y": y}
    spec |= {"lr": 0.25} if method == "reddiff" else {"noise": 0.05}
    options = {"guidance": spec} if method == "data" else {"sampler": spec}
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    far = (operator.A(engine.run(x, vp_grid(20)) / 2 + 0.5) - y).norm()
    near = (operator.A(engine.run(x, vp_grid(20), **options) / 2 + 0.5) - y).norm()
    assert near < 0.5 * far


def test_through_the_decoder_of_a_pipeline():
    engine, operator = sampler.load(tiny.sd()), physics("downsampling")
    run = {"steps": 10, "height": 32, "width": 32, "guidance": "none", "output": "tensor"}
    truth, other = engine.generate("", seeds=1, n=2, **run).images.split(1)
    y = operator.A(truth)
    options = {"operator": operator, "n": 1, "seeds": 2, "output": "tensor", "steps": 10}
    found = engine.restore(y, method="daps", noise=0.01, **options)
    assert (operator.A(found.images) - y).norm() < 0.8 * (operator.A(other) - y).norm()
