"""Measurement operators: pseudo-inverses, gradients, and JPEG against Pillow."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from sampler.config import tasks
from sampler.core import images
from sampler.core.errors import SamplerError
from sampler.samplers import operators
from sampler.samplers.operators_filter import Deblur, SuperResolution, least_squares
from sampler.samplers.operators_nonlinear import JPEG, HighDynamicRange, PhaseRetrieval

SIZE = (3, 16, 16)


def picture(rows=2):
    """Smooth images in [-1, 1] [B, 3, 16, 16], float64."""
    axis = torch.linspace(0, 3, 16, dtype=torch.float64)
    wave = torch.sin(axis)[:, None] * torch.cos(1.3 * axis)
    return torch.stack(
        [torch.stack([wave, wave.T, 0.5 - wave]) * 0.8 / (b + 1) for b in range(rows)]
    )


LINEAR = {
    "inpaint": operators.Inpaint((torch.rand(16, 16) > 0.4).double()),
    "denoise": operators.Identity(),
    "grayscale": operators.Grayscale(),
    "compressed_sensing": operators.CompressedSensing(SIZE, 0.5),
    "average": SuperResolution(4),
    "bicubic": SuperResolution(4, "bicubic"),
    "gaussian": Deblur("gaussian"),
    "uniform": Deblur("uniform", 5),
    "motion": Deblur("motion", 7),
    "composed": operators.build([{"name": "grayscale"}, {"name": "superres", "factor": 2}]),
    "order matters": operators.build([SuperResolution(4), operators.Inpaint(torch.eye(4))]),
}
OTHERS = {"hdr": HighDynamicRange(), "phase": PhaseRetrieval(8), "jpeg": JPEG(90)}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_and_rowwise(name):
    operator, x = LINEAR[name], picture(3)
    y = operator.A(x)
    assert torch.allclose(operator.A(2 * x[:1] - x[1:2]), 2 * y[:1] - y[1:2], atol=1e-9)
    assert torch.allclose(operator.A(x[1:2])[0], y[1], atol=1e-12)


@pytest.mark.parametrize("name", LINEAR)
def test_pseudo_inverse(name):
    """A(A_dagger(y)) = y; by conjugate gradients nearly, and always nearer than a plain start."""
    operator, x = LINEAR[name], picture()
    y = operator.A(x)
    back = operator.A_dagger(y)
    assert back.shape == x.shape
    gap = (operator.A(back) - y).norm() / y.norm()
    if name in ("bicubic", "gaussian", "uniform", "motion"):
        assert gap < 0.02
    else:
        assert gap < 1e-6


@pytest.mark.parametrize("name", ["bicubic", "gaussian", "uniform", "motion"])
def test_pseudo_inverse_of_fine_detail(name):
    """On noise, of which a filter leaves little: it goes on for long enough to fit y to 10 %."""
    g = torch.Generator().manual_seed(0)
    operator, x = LINEAR[name], torch.randn(2, *SIZE, generator=g, dtype=torch.float64)
    y = operator.A(x)
    assert (operator.A(operator.A_dagger(y)) - y).norm() < 0.1 * y.norm()


@pytest.mark.parametrize("name", [*LINEAR, *OTHERS])
def test_gradient(name):
    operator = {**LINEAR, **OTHERS}[name]
    torch.manual_seed(0)  # of some directions the finite difference crosses an amplitude of 0
    x = (0.5 * picture(1) + 0.05).requires_grad_()
    probe = torch.randn_like(operator.A(x))
    (grad,) = torch.autograd.grad((operator.A(x) * probe).sum(), x)
    assert grad.abs().sum() > 0
    if name == "jpeg":  # its own gradient is 0 almost everywhere: straight-through is on purpose
        assert torch.allclose(grad, torch.autograd.grad((x * probe).sum(), x)[0], atol=1e-9)
        return
    way = torch.randn_like(x)
    slope = ((operator.A(x + 1e-6 * way) - operator.A(x - 1e-6 * way)) * probe).sum() / 2e-6
    assert float((grad * way).sum()) == pytest.approx(float(slope), rel=1e-5, abs=1e-6)


def test_kernels():
    for kind in ("gaussian", "uniform", "motion"):
        kernel = Deblur(kind, 9, angle=0.0).kernel()
        assert kernel.shape == (9, 9) and kernel.sum() == pytest.approx(1) and (kernel >= 0).all()
        assert torch.allclose(kernel, kernel.flip(0).flip(1))
    line = Deblur("motion", 9, angle=0.0).kernel()
    assert (line[4] > 0).all() and (line[:4] == 0).all()
    constant = torch.full((1, *SIZE), 0.7)
    for operator in (Deblur(), Deblur("motion"), SuperResolution(4, "bicubic")):
        assert torch.allclose(operator.A(constant), torch.tensor(0.7), atol=1e-6)


@pytest.mark.parametrize("sigma", [0.8, 2.0])
def test_gaussian_kernel_has_its_width(sigma):
    kernel = Deblur("gaussian", 15, sigma=sigma).kernel()
    assert float(kernel[7, 8] / kernel[7, 7]) == pytest.approx(np.exp(-1 / (2 * sigma**2)))
    assert float(kernel[5, 8] / kernel[7, 7]) == pytest.approx(np.exp(-5 / (2 * sigma**2)))


def test_bicubic_is_pillows():
    """Filtered before it is subsampled: fine detail is averaged, not aliased."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    theirs = np.asarray(Image.fromarray(noise).resize((8, 8), Image.Resampling.BICUBIC))
    x = torch.from_numpy(noise.copy()).permute(2, 0, 1)[None].double()
    ours = SuperResolution(4, "bicubic").A(x)[0].permute(1, 2, 0)
    assert np.abs(ours.numpy() - theirs).max() < 1.5  # Pillow rounds twice


def test_least_squares_reaches_the_solution():
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(30, 12, generator=g, dtype=torch.float64)
    y = torch.randn(2, 30, generator=g, dtype=torch.float64)
    start = torch.zeros(2, 12, dtype=torch.float64)
    found = least_squares(lambda x: x @ matrix.T, y, start, 12)
    assert torch.allclose(found, torch.linalg.lstsq(matrix, y.T).solution.T, atol=1e-8)


@pytest.mark.parametrize("quality", [20, 75, 95])
def test_jpeg_against_pillow(quality):
    pixels = ((picture(1)[0] + 1) * 127.5).round().clamp(0, 255)
    file = io.BytesIO()
    image = Image.fromarray(pixels.permute(1, 2, 0).byte().numpy())
    image.save(file, "JPEG", quality=quality, subsampling=0)
    theirs = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1).double()
    ours = (JPEG(quality).A(pixels[None] / 127.5 - 1)[0] + 1) * 127.5
    assert (ours.clamp(0, 255) - theirs).abs().mean() < 1.0  # Pillow rounds in between


def test_a_seed_names_the_directions_of_compressed_sensing():
    x, one = picture(1), operators.CompressedSensing(SIZE, 0.1, seed=1)
    assert torch.equal(one.A(x), operators.CompressedSensing(SIZE, 0.1, seed=1).A(x))
    assert not torch.allclose(one.A(x), operators.CompressedSensing(SIZE, 0.1).A(x))


def test_clipping_and_lost_phase():
    x = picture()
    assert torch.equal(HighDynamicRange().A(x), (2 * x).clamp(-1, 1))
    phase = PhaseRetrieval(8)
    y = phase.A(x)
    assert y.shape[-2:] == (32, 32) and torch.allclose(y, phase.A(-x))
    assert y.square().sum() == pytest.approx(float(x.square().sum()))  # orthonormal
    assert phase.A_dagger(y).shape == x.shape
    assert phase.A(x.float()).dtype == torch.float32


def test_measured_noise_is_a_share_of_the_range():
    x = torch.zeros(1, 3, 64, 64)
    y = operators.measure(operators.Identity(), x, sigma=0.1, seed=4)
    assert float(y.std()) == pytest.approx(0.2, rel=0.03)
    unit = operators.measure(operators.Identity(), x, sigma=0.1, seed=4, data_range=(0.0, 1.0))
    assert torch.allclose(2 * unit, y)
    two = operators.measure(operators.Identity(), x.expand(2, -1, -1, -1), sigma=0.1, seed=3)
    assert torch.equal(two[1], y[0])


def test_masks_from_files(tmp_path):
    pixels = np.zeros((16, 16), dtype=np.uint8)
    pixels[:4] = 255  # white is to be filled
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    operator = operators.Inpaint(str(tmp_path / "mask.png"))
    y = operator.A(torch.ones(1, *SIZE))
    assert (y[..., :4, :] == 0).all() and (y[..., 4:, :] == 1).all()
    with pytest.raises(ValueError, match="mask of"):
        operator.A(torch.ones(1, 3, 8, 8))


def test_image_files_are_looked_at_before_they_are_decoded(tmp_path):
    """More than 64 megapixels by the header alone, and other formats; a turned photo is upright."""
    header = struct.pack(">IIBBBBB", 8001, 8000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    Image.new("RGB", (4, 2)).save(tmp_path / "small.png")
    rest = (tmp_path / "small.png").read_bytes()[33:]
    (tmp_path / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data + rest)
    with pytest.raises(SamplerError, match="8001 x 8000 pixels; at most 64 megapixels"):
        images.read(tmp_path / "large.png")
    Image.new("RGB", (4, 2)).save(tmp_path / "image.gif")
    for look in (images.read, lambda path: tasks.restore_settings("superres", path, None)):
        with pytest.raises(SamplerError, match="not a readable image"):
            look(str(tmp_path / "image.gif"))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (4, 2)).save(tmp_path / "turned.jpg", exif=exif)
    assert images.read(tmp_path / "turned.jpg").shape == (1, 3, 4, 2)
    found = tasks.restore_settings("denoise", str(tmp_path / "turned.jpg"), None)
    assert (found["--image width"][1], found["--image height"][1]) == (2, 4)
