"""`engine.restore`: every method on the bundled model, uncertainty, restorers, bad input."""

import pytest
import torch

import sampler
from sampler.core import images
from sampler.core.errors import UsageError
from sampler.samplers import operators
from sampler.samplers.methods import METHODS, Problem, strategies
from tests.analytic import vp_grid

PROMPT, NOISE = "a red apple on a blue background", 0.05
SUPERRES = {"name": "superres", "factor": 4}


@pytest.fixture(scope="module")
def engine():
    return sampler.load()


@pytest.fixture(scope="module")
def problem():
    truth = images.read("configs/images/apple.png")
    operator = operators.build(SUPERRES)
    return truth[0], operators.measure(operator, truth * 2 - 1, NOISE / 2, seed=3)


def restored(engine, y, **given):
    run = {"operator": SUPERRES, "n": 2, "steps": 4, "seeds": 1, "output": "tensor", **given}
    return engine.restore(y, **run)


def squared(image, truth):
    return float((image - truth).square().mean())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_improves_on_the_pseudo_inverse_or_fits(engine, problem, method):
    truth, y = problem
    noise = NOISE if METHODS[method].needs_noise else None
    found = restored(engine, y, method=method, noise=noise, prompt=PROMPT, steps=8)
    assert found.images.shape == (2, 3, 64, 64) and found.config["method"] == method
    assert torch.equal(found.mean, found.images.mean(0))
    assert torch.allclose(found.std, found.images.std(0))
    fit = (operators.build(SUPERRES).A(found.images * 2 - 1) - y).square().mean().sqrt()
    assert fit < 0.25
    if METHODS[method].needs_noise:
        start = operators.build(SUPERRES).A_dagger(y)[0] / 2 + 0.5
        assert squared(found.mean, truth) < 0.5 * squared(start, truth) and fit < 2 * NOISE


def test_the_default_is_daps_where_the_noise_is_known(engine, problem):
    _, y = problem
    assert strategies(None, Problem(SUPERRES, y, 0.1))[0] == "daps"
    assert strategies(None, Problem(SUPERRES, y))[0] == "reddiff"
    one = restored(engine, y, noise=NOISE, n=1, output="pil")
    assert one.config["sampler"]["name"] == "daps" and one.images[0].size == (64, 64)
    assert torch.equal(one.std, torch.zeros(3, 64, 64))


def test_difface_starts_from_the_restorer_and_says_how_much_of_its_error_is_left(engine, problem):
    truth, y = problem
    start = images.read("configs/images/apple.png")

    def perfect(given):
        assert given.shape == (1, 3, 16, 16) and 0 <= given.median() <= 1
        return start

    options = {"method": "difface", "prompt": PROMPT, "steps": 10}
    near = restored(engine, y, restorer=perfect, strength=0.1, **options)
    far = restored(engine, y, restorer=perfect, strength=0.8, **options)
    other = restored(engine, y, restorer="bicubic", strength=0.1, **options)
    assert squared(near.mean, truth) < squared(far.mean, truth)
    assert squared(near.mean, truth) < squared(other.mean, truth)
    level = engine.pipeline.grid(10, (64, 64))[-2]
    assert near.contraction == pytest.approx((level.alpha / level.sigma) ** 2)
    assert far.contraction < near.contraction and near.nfe == [2, 2]
    again = restored(engine, y, restorer="configs/images/apple.png", strength=0.1, **options)
    assert torch.equal(again.images, near.images)


def test_the_noise_of_difface_is_that_of_the_level():
    """x_N = alpha_N·x̂0 + sigma_N·n, on levels of a Karras grid whose first sigma is no 1."""
    grid = [sampler.Level(s, 1.0, s) for s in (8.0, 2.0, 0.5)] + [sampler.Level(0, 1.0, 0.0)]
    y = torch.full((1, 1, 2, 2), 0.3)
    spec = {"name": "difface", "operator": "denoise", "y": y, "strength": 0.7}
    method = sampler.build("sampler", {**spec, "sampler": "ddim"})
    assert [level.sigma for level in method.levels(tuple(grid))] == [2.0, 0.5, 0.0]
    vp = vp_grid(10)
    kept = method.levels(vp)
    noise = torch.randn(2, 1, 2, 2)
    x, _ = method.start(noise, kept[0])
    assert len(kept) == 8 and kept[0] == vp[3]
    assert torch.allclose(sampler.settle(x), kept[0].alpha * y + kept[0].sigma * noise, atol=1e-6)


def test_an_inpainting_of_difface_holds_the_known_pixels(engine):
    truth = images.read("configs/images/apple.png") * 2 - 1
    mask = {"name": "inpaint", "mask": "configs/images/apple_mask.png"}
    _, spec, rule = strategies("difface", Problem(mask, truth, guidance="cfg"))
    assert spec["strength"] == 0.48 and spec["sampler"] == {"name": "ddim", "eta": 1.0}
    assert (rule["name"], rule["rule"], rule["noise"]) == ("data", "cfg", 0.05)


class Blind:
    """An operator whose result has no gradient."""

    def A(self, x):
        return x.detach()

    def A_dagger(self, y):
        return y


Y = torch.zeros(1, 3, 16, 16)
BAD = [
    ({"operator": "blurr"}, ValueError, "Unknown operator 'blurr'"),
    ({"method": "dapps", "noise": 0.1}, ValueError, "Unknown method 'dapps'"),
    ({"noise": 0.0}, ValueError, "noise = 0.0 must be above 0"),
    ({"noise": -1.0, "method": "difface"}, ValueError, "noise = -1.0 must be above 0"),
    ({"method": "data"}, ValueError, "'data' needs noise, such as 0.05; without it use reddiff"),
    ({"n": 0}, ValueError, "n = 0 must be at least 1"),
    ({"noise": 0.1, "operator": operators.Inpaint(torch.ones(8, 8))}, ValueError, "does not fit"),
    ({"noise": 0.1, "operator": lambda x: x}, ValueError, "daps: the operator maps x"),
    ({"method": "difface", "operator": lambda x: x}, ValueError, "has no A_dagger"),
    ({"method": "difface", "operator": Blind(), "restorer": 3}, ValueError, "restorer = 3 must be"),
    ({"noise": 0.1, "restorer": "bicubic"}, ValueError, "belong to the method 'difface'"),
    ({"method": "difface", "restorer": "os:getcwd"}, UsageError, "The restorer 'os:getcwd' is"),
    ({"method": "difface", "strength": 2.0}, ValueError, "strength = 2.0"),
    ({"output": "latent"}, ValueError, "output = 'latent' must be 'pil' or 'tensor'"),
]


@pytest.mark.parametrize(("given", "error", "part"), BAD, ids=lambda value: str(value)[:30])
def test_bad_input_is_one_sentence_before_the_network(engine, given, error, part, monkeypatch):
    monkeypatch.setattr(engine.pipeline.network, "forward", None)
    with pytest.raises(error) as found:
        restored(engine, Y, **given)
    assert part in str(found.value), found.value
    assert str(found.value).endswith(".") and "\n" not in str(found.value)


def test_python_code_is_a_restorer_where_it_is_allowed(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "import torch\ndef grey(images):\n    return torch.full((1, 3, 64, 64), 0.5)\n"
    (tmp_path / "own_restorer.py").write_text(code)
    options = {"method": "difface", "strength": 0.25, "allow_python": True}
    found = restored(engine, Y, restorer="own_restorer:grey", **options)
    assert found.nfe == [1, 1]
