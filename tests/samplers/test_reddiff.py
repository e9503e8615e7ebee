"""RED-Diff: exact steps, rows, ranges, limits with known answers, and refusals."""

import math

import pytest
import torch

import sampler
from sampler.samplers import operators
from sampler.samplers.operators_filter import SuperResolution
from sampler.types import Level
from tests.analytic import Mixture, vp_grid

SHAPE = (3, 4, 4)
PRIOR = Mixture(
    torch.ones(1, dtype=torch.float64),
    torch.full((1, 48), 0.3, dtype=torch.float64),
    torch.full((1,), 0.2, dtype=torch.float64),
)


def images(rows, seed=3):
    g = torch.Generator().manual_seed(seed)
    return 0.3 + 0.2 * torch.randn(rows, *SHAPE, generator=g, dtype=torch.float64)


def solve(spec, rows=2, levels=None, seeds=None, seen=None, eps=None):
    def fn(x, level, _):
        if seen is not None:
            seen.append((x.requires_grad, torch.is_grad_enabled(), len(x)))
        return (eps or PRIOR.eps)(x, level)

    engine = sampler.Engine(sampler.denoiser(fn))
    x = torch.zeros(rows, *SHAPE, dtype=torch.float64)
    return engine.run(x, levels or vp_grid(60), sampler=spec, seeds=seeds)


def test_a_masked_gaussian_is_recovered():
    truth = images(2)
    mask = (torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) > 0.3).double()
    y = mask * truth
    spec = {"name": "reddiff", "operator": operators.Inpaint(mask), "y": y, "lr": 0.05}
    ours = solve(spec, levels=vp_grid(300))
    known = mask.bool().expand_as(truth)
    assert (ours - truth)[known].abs().mean() < 0.02
    assert (ours - 0.3)[~known].abs().mean() < 0.15  # the prior's mode, up to Adam's last moves
    calm = solve({**spec, "decay": "linear"}, levels=vp_grid(300))
    averaged = solve({**spec, "average": 0.3}, levels=vp_grid(300))
    for better in (calm, averaged):
        assert (better - 0.3)[~known].abs().mean() < 0.5 * (ours - 0.3)[~known].abs().mean()


def test_one_evaluation_per_step_without_a_graph():
    seen = []
    truth = images(2)
    solve({"name": "reddiff", "operator": "denoise", "y": truth}, seen=seen, levels=vp_grid(13))
    assert len(seen) == 13
    assert all(not graph and not enabled for graph, enabled, _ in seen)


def test_seeds_decide_and_rows_do_not_see_their_batch():
    truth = images(3)
    spec = {"name": "reddiff", "operator": "grayscale", "y": truth.mean(1, keepdim=True)}
    together = solve(spec, 3, seeds=[5, 6, 7])
    assert torch.equal(together, solve(spec, 3, seeds=[5, 6, 7]))
    assert not torch.equal(together, solve(spec, 3, seeds=[5, 6, 8]))
    for row in range(3):
        alone = {**spec, "y": spec["y"][row : row + 1]}
        assert torch.equal(solve(alone, 1, seeds=[5 + row])[0], together[row])
    one_y = {**spec, "y": spec["y"][:1]}
    assert solve(one_y, 3, seeds=[1, 2, 3]).shape == (3, *SHAPE)


def test_without_prior_it_is_least_squares():
    g = torch.Generator().manual_seed(1)
    matrix = torch.randn(60, 48, generator=g, dtype=torch.float64)
    y = torch.randn(1, 60, generator=g, dtype=torch.float64)
    exact = torch.linalg.lstsq(matrix, y[0]).solution
    init = torch.zeros(1, *SHAPE, dtype=torch.float64)
    for reduction in ("published", "sum"):
        spec = {
            "name": "reddiff",
            "operator": matrix,
            "y": y,
            "init": init,
            "lam": 0.0,
            "decay": "cosine",
            "reduction": reduction,
        }
        found = solve(spec, 1, vp_grid(800))[0].flatten()
        assert torch.allclose(found, exact, atol=1e-3)


def test_sum_weighs_the_prior_in_units_of_the_noise_variance():
    """Denoising a Gaussian: the posterior mode is a known average of y and the prior's mean."""
    y, noise = torch.full((1, *SHAPE), 0.9, dtype=torch.float64), 0.1
    base = {"name": "reddiff", "operator": "denoise", "y": y, "decay": "linear", "lr": 0.05}
    # the loss on the grid's mean weight; "published" sees D/m = 1 here, so both agree
    one = solve({**base, "lam": noise}, 1, vp_grid(200), [1])
    two = solve({**base, "lam": noise, "reduction": "sum"}, 1, vp_grid(200), [1])
    assert torch.allclose(one, two, atol=1e-6)
    assert ((one < 0.9) & (one > 0.3)).all()
    # superres by 2 has m = D/4: "published" gives the data term four times the weight of "sum"
    small = {**base, "operator": SuperResolution(2), "y": y[..., :2, :2]}
    four = solve({**small, "reduction": "sum", "obs_weight": 4.0}, 1, vp_grid(50), [1])
    assert torch.allclose(solve(small, 1, vp_grid(50), [1]), four, atol=1e-6)


def test_without_data_it_climbs_the_prior():
    y = torch.zeros(1, *SHAPE, dtype=torch.float64)
    spec = {"name": "reddiff", "operator": "denoise", "y": y, "obs_weight": 0.0, "average": 0.5}
    assert (solve(spec, 1, vp_grid(300)) - 0.3).abs().mean() < 0.15


def test_no_signal_at_the_first_level():
    """alpha = 0 with a v-prediction: the linear weight is finite there, the square is refused."""
    levels = (Level(999, 0.0, 1.0), *vp_grid(20))
    y = images(1)

    def v(x, level, _):
        return -0.3 * torch.ones_like(x) if level.alpha == 0 else PRIOR.out(x, level, "v")

    engine = sampler.Engine(sampler.denoiser(v, "v"))
    for weight in ("linear", "sqrt", "log", "trunc_linear", "power2over3", "const"):
        spec = {"name": "reddiff", "operator": "denoise", "y": y, "weight": weight}
        assert engine.run(torch.zeros_like(y), levels, sampler=spec).isfinite().all()
    spec["weight"] = "square"
    with pytest.raises(ValueError, match="square"):
        engine.run(torch.zeros_like(y), levels, sampler=spec)


class Physics:
    """Stand-in for deepinv's physics: A and A_dagger on images in [0, 1]."""

    def __init__(self, mask):
        self.mask = mask

    def A(self, x):
        return self.mask * x

    def A_dagger(self, y):
        return y * self.mask


def test_ranges_of_deepinv_are_converted():
    """Inpainting does not commute with 2x − 1: mu is taken to [0, 1] before A."""
    truth = images(1)
    mask = torch.zeros(4, 4, dtype=torch.float64)
    mask[:, :2] = 1
    there = type("Inpainting", (Physics,), {"__module__": "deepinv.physics.inpainting"})(mask)
    y = there.A((truth + 1) / 2)
    ours = {"name": "reddiff", "operator": operators.Inpaint(mask), "y": mask * truth}
    for spec in (
        {"name": "reddiff", "operator": there, "y": y},
        {"name": "reddiff", "operator": Physics(mask), "y": y, "data_range": (0.0, 1.0)},
    ):
        # mu starts at −1 (black) in the holes there, at 0 here
        found = solve({**spec, "init": mask * truth, "obs_weight": 4.0})
        assert torch.allclose(found, solve({**ours, "init": mask * truth}), atol=1e-9)
        assert (solve(spec) - truth)[..., :2].abs().mean() < 0.1


@pytest.mark.parametrize("name", ["inpaint", "compressed_sensing", "average"])
def test_ranges_of_deepinv_are_converted_for_every_kind(name):
    """A(2x − 1) is not 2·A(x) − 1 for the first two; for averages it is."""
    truth, (low, high) = images(2), (0.0, 1.0)
    operator = {
        "inpaint": operators.Inpaint(torch.eye(4, dtype=torch.float64)),
        "compressed_sensing": operators.CompressedSensing(SHAPE, 0.5),
        "average": SuperResolution(2),
    }[name]
    y, unit = operator.A(truth), operator.A((truth + 1) / 2)
    assert torch.allclose(2 * unit - 1, y) == (name == "average")
    init = torch.zeros_like(truth)
    ours = solve({"name": "reddiff", "operator": operator, "y": y, "init": init})
    theirs = {"name": "reddiff", "operator": operator, "y": unit, "init": init, "obs_weight": 4.0}
    found = solve({**theirs, "data_range": (low, high)})
    assert torch.allclose(found, ours, atol=1e-9)
    assert not torch.allclose(solve(theirs), ours, atol=1e-2)  # without it, the wrong image
    start = sampler.build("sampler", {**theirs, "init": None, "data_range": (low, high)})
    mu = start.start(torch.zeros_like(truth), Level(0, 1.0, 0.0))[1].mu
    assert torch.allclose(operator.A(mu / 2 + 0.5), unit, atol=1e-6)


def test_a_plain_function_needs_a_start():
    y = images(1).mean((2, 3))
    spec = {"name": "reddiff", "operator": lambda x: x.mean((2, 3)), "y": y}
    with pytest.raises(ValueError, match="give init"):
        sampler.build("sampler", spec)
    found = solve(
        {**spec, "init": torch.zeros(1, *SHAPE, dtype=torch.float64), "decay": "linear"}, 1
    )
    assert torch.allclose(found.mean((2, 3)), y, atol=0.05)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"y": torch.zeros(1, 3, 5, 5), "init": torch.zeros(1, *SHAPE)}, "but y is"),
        ({"operator": operators.Inpaint(torch.ones(8, 8))}, "mask of"),
        ({"operator": "inpainting"}, "Unknown operator"),
        ({"operator": {"name": "jpeg", "quality": 0}}, "quality = 0"),
        ({"operator": {"name": "superres", "ratio": 4}}, "no field 'ratio'"),
        (
            {"operator": {"name": "superres", "factor": 3}, "init": torch.zeros(1, *SHAPE)},
            "not a mult",
        ),
        ({"operator": {"name": "deblur", "size": 4}}, "odd"),
        ({"lam": -1.0}, "lam = -1.0"),
        ({"lr": 0.0}, "lr = 0.0"),
        ({"weight": "cubic"}, "weight"),
        ({"average": 1.0}, "average = 1.0"),
        ({"y": 3.0}, "y must be a tensor"),
        ({"data_range": (1.0, 0.0)}, "data_range"),
    ],
)
def test_bad_input_is_refused_when_built(change, part):
    spec = {"name": "reddiff", "operator": "denoise", "y": torch.zeros(1, *SHAPE), **change}
    with pytest.raises(ValueError, match=part):
        sampler.build("sampler", spec)


def test_bad_input_is_refused_before_the_first_evaluation():
    seen = []
    for y, part in (
        (torch.zeros(1, 3, 8, 8), "the start has shape"),
        (torch.zeros(3, *SHAPE), "rows"),
    ):
        with pytest.raises(ValueError, match=part):
            solve({"name": "reddiff", "operator": "denoise", "y": y}, seen=seen)
    with pytest.raises(ValueError, match="space = 'image' needs generate"):
        y = torch.zeros(1, *SHAPE)
        solve({"name": "reddiff", "operator": "denoise", "y": y, "space": "image"}, seen=seen)
    assert not seen
    with pytest.raises(ValueError, match="not differentiable"):
        flat = type("Rounded", (), {"A": staticmethod(lambda x: x.detach().round())})()
        y = torch.zeros(1, *SHAPE)
        solve({"name": "reddiff", "operator": flat, "y": y, "init": y}, rows=1)


def test_adam_is_torchs():
    """The update of one row, against torch.optim.Adam on the loss as the paper writes it."""
    truth, levels = images(1), vp_grid(6)
    operator = SuperResolution(2)
    y = operator.A(truth)
    spec = {"name": "reddiff", "operator": operator, "y": y, "lam": 0.4, "weight": "sqrt"}
    method = sampler.build("sampler", spec)
    engine = sampler.Engine(sampler.denoiser(lambda x, level, _: PRIOR.eps(x, level)))
    snap, grid = engine.start(torch.randn_like(truth), levels, sampler=method)
    mu = operator.A_dagger(y).clone().requires_grad_()
    optimiser = torch.optim.Adam([mu], lr=0.1, betas=(0.9, 0.99), eps=1e-8)
    for level in levels[:-1]:
        n = (snap.x - level.alpha * mu.detach()) / level.sigma
        gap = (PRIOR.eps(snap.x, level) - n).detach()
        weight = 0.4 * math.sqrt(level.sigma / level.alpha)
        loss = ((y - operator.A(mu)) ** 2).mean() / 2 + weight * (gap * mu).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        snap = next(iter(engine.steps(snap, grid, sampler=method)))
        assert torch.allclose(snap.sampler.mu, mu, rtol=1e-8, atol=1e-8)
