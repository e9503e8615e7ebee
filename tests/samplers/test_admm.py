"""Plug-and-play ADMM: the lasso, the published order, changing weights, rows, pipelines."""

import pytest
import torch

import sampler
from sampler.core.noise import Noise
from sampler.models.proximal import ProximalConfig, ProximalNetwork
from sampler.samplers.operators import Matrix
from sampler.types import Level
from tests import tiny
from tests.analytic import vp_grid

D, M, LAM = 32, 24, 0.3


def draw(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


MATRIX, Y = draw(M, D) / M**0.5, draw(2, M, seed=1)
SPEC = {"name": "admm", "operator": Matrix(MATRIX, (D,)), "y": Y, "noise": 1.0, "rho": 1.0}


def soft(x, by):
    return x.sign() * (x.abs() - by).clamp(min=0)


def flat(steps, sigma=1.0):
    """The grid of a proximal operator: one level, and a last one without noise."""
    return [Level(0, 1.0, sigma)] * steps + [Level(0, 1.0, 0.0)]


def run(spec, levels, fn, rows=2, shape=(D,), **options):
    engine = sampler.Engine(sampler.denoiser(fn, prediction="x0"))
    x = draw(rows, *shape, seed=2)
    first, grid = engine.start(x, levels, None, spec, "none", **options)
    *_, last = engine.steps(first, grid, None, spec, "none")
    return last


def lasso(y, steps=5_000):
    """The minimiser of ‖y − A x‖²/2 + LAM·‖x‖₁ by ISTA."""
    step = 1 / torch.linalg.matrix_norm(MATRIX, 2) ** 2
    x = torch.zeros(len(y), D, dtype=torch.float64)
    for _ in range(steps):
        x = soft(x - step * (x @ MATRIX.T - y) @ MATRIX, step * LAM)
    return x


def test_with_the_proximal_operator_of_l1_it_is_the_lasso():
    exact, rho = lasso(Y), 0.7
    spec = {**SPEC, "rho": rho, "cg": M + 1}
    last = run(spec, flat(300), lambda x, level, _: soft(x, LAM / rho))
    assert (last.x - exact).abs().max() <= 1e-6
    assert (last.sampler.x - last.sampler.z).abs().max() <= 1e-6  # the primal residual
    assert ((last.sampler.z == 0) == (exact.abs() < 1e-9)).all()  # z is sparse exactly
    assert 4 < (exact[0] == 0).sum() < D - 4


def test_only_the_product_of_rho_and_the_variance_of_the_noise_counts():
    fn = lambda x, *_: soft(x, 0.2)  # noqa: E731
    one = run({**SPEC, "noise": 2.0, "rho": 0.25}, flat(3), fn)
    assert torch.allclose(one.x, run(SPEC, flat(3), fn).x, atol=1e-10)
    assert not torch.allclose(one.x, run({**SPEC, "rho": 0.25}, flat(3), fn).x, atol=1e-3)


def test_every_iterate_is_that_of_the_published_order():
    """Update x, u, then z ("132"), from z = the pseudo-inverse and u = 0; the result is x."""
    rho, fn = 0.4, lambda x, *_: 0.7 * torch.tanh(x)
    inverse = torch.linalg.inv(MATRIX.T @ MATRIX + rho * torch.eye(D).double())
    z, u = Y @ torch.linalg.pinv(MATRIX).T, 0.0
    found = []
    for _ in range(6):
        x = (Y @ MATRIX + rho * (z - u)) @ inverse
        u = u + x - z
        z = fn(x + u)
        found.append((x, u, z))
    for steps in (1, 5):
        last = run({**SPEC, "rho": rho, "cg": D}, flat(steps), fn)
        assert torch.allclose(last.sampler.z, found[steps - 1][2], atol=1e-10)
        assert torch.allclose(last.x, found[steps][0], atol=1e-10)


def test_the_dual_is_rescaled_with_rho():
    """Without rho it is alpha²/sigma² + 1 of the level that comes; rho·u stays as it is."""
    levels, fn = vp_grid(3), lambda x, *_: 0.7 * torch.tanh(x)
    state = run({**SPEC, "rho": None, "cg": D}, levels, fn).sampler
    rhos = [(level.alpha / max(level.sigma, 1e-9)) ** 2 + 1 for level in levels]
    z, u, before = Y @ torch.linalg.pinv(MATRIX).T, 0.0, rhos[0]
    for k, rho in enumerate(rhos[:-1]):
        u = u * before / rho
        x = (Y @ MATRIX + rho * (z - u)) @ torch.linalg.inv(
            MATRIX.T @ MATRIX + rho * torch.eye(D).double()
        )
        u, before = u + x - z, rho
        z = fn(levels[k].alpha * (x + u))
    assert torch.allclose(state.z, z, atol=1e-9)
    assert torch.allclose(state.x, z, atol=1e-9)  # no noise is left: the prior alone decides


def test_renoising_uses_the_noise_of_the_row():
    """Queries are alpha·(x + u) + sigma·n: the first n is the start's, then the seeds'."""
    seen, levels = [], vp_grid(3)

    def fn(x, level, _):
        seen.append(x)
        return 0.5 * torch.tanh(x)

    spec = {**SPEC, "renoise": True, "rho": None}
    engine = sampler.Engine(sampler.denoiser(fn, prediction="x0"))
    noise = draw(2, D, seed=2)
    snap, grid = engine.start(noise, levels, None, spec, "none", [5, 6])
    for k, after in enumerate(engine.steps(snap, grid, None, spec, "none")):
        level = levels[k]
        n = noise if k == 0 else Noise((5, 6)).draw(k - 1, noise)
        clean = snap.sampler.x + snap.sampler.u
        assert torch.allclose(seen[k], level.alpha * clean + level.sigma * n, atol=1e-12)
        snap = after
    assert torch.equal(snap.x, snap.sampler.x)
    assert (
        sampler.build("sampler", spec).stochastic and not sampler.build("sampler", SPEC).stochastic
    )


def test_rows_with_measurements_and_levels_of_their_own():
    """A row waits, another is finished early: each is what it would be alone with its own y."""
    levels = vp_grid(4)
    fn = lambda x, level, _: 0.7 * torch.tanh(x)  # noqa: E731
    paths = ((0, 1, 2, 3, 4, 4), (0, 0, 2, 4, 4, 4), (0, 1, 1, 2, 3, 4))
    together = [
        Level(*(torch.tensor(v, dtype=torch.float64) for v in zip(*at, strict=True)))
        for at in zip(*([levels[i] for i in path] for path in paths), strict=True)
    ]
    y = draw(3, M, seed=4)
    spec = {**SPEC, "rho": None}
    found = run({**spec, "y": y}, together, fn, rows=3)
    for row, path in enumerate(paths):
        own = [levels[i] for i in dict.fromkeys(path)]
        alone = run({**spec, "y": y[row : row + 1]}, own, fn, rows=1)
        assert (found.x[row] - alone.x[0]).abs().max() <= 1e-12, row


def test_a_learned_proximal_network_has_a_fixed_point():
    """z = f(z − gradient/rho) where it ends: a minimum of the data term and the named prior."""
    torch.manual_seed(0)
    network = ProximalNetwork(ProximalConfig((D,), hidden=16, layers=2, alpha=0.1)).double()
    rho = 2.0
    last = run({**SPEC, "rho": rho, "cg": M + 1}, flat(100), network)
    z = last.sampler.z
    slope = (z @ MATRIX.T - Y) @ MATRIX
    with torch.no_grad():
        assert torch.allclose(network(z - slope / rho), z, atol=1e-7)
    assert z.abs().max() > 0.01


@pytest.mark.parametrize("renoise", [False, True])
def test_it_restores_images_of_a_pipeline(renoise):
    engine = sampler.load(tiny.sd())
    y = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    spec = {
        "name": "admm", "operator": {"name": "superres", "factor": 4}, "y": y, "noise": 0.1,
        "space": "image", "renoise": renoise, "cg": 4,
    }  # fmt: skip
    run = {"steps": 3, "height": 32, "width": 32, "guidance": "none", "output": "tensor"}
    made = engine.generate(["a dog"] * 2, seeds=[1, 2], sampler=spec, **run)
    assert made.nfe == [3, 3] and made.images.isfinite().all()
    assert bool((made.images[0] - made.images[1]).abs().max() > 1e-4) == renoise
    plain = engine.generate(["a dog"] * 2, seeds=[1, 2], sampler="ddim", **run)
    gaps = [
        (torch.nn.functional.avg_pool2d(images, 4) - (y / 2 + 0.5)).abs().mean()
        for images in (made.images, plain.images)
    ]
    assert gaps[0] < gaps[1]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"noise": 0.0}, "noise = 0.0"),
        ({"rho": 0.0}, "rho = 0.0"),
        ({"cg": 0}, "cg = 0"),
        ({"operator": lambda x: x}, "admm: this operator has no A_dagger"),
        ({"y": 3.0}, "admm: y must be a tensor"),
    ],
)
def test_bad_input_is_refused_when_built(change, part):
    with pytest.raises(ValueError, match=part):
        sampler.build("sampler", {**SPEC, **change})


def test_bad_input_is_refused_before_the_first_evaluation():
    def never(x, level, cond):
        raise AssertionError("the network was called")

    with pytest.raises(ValueError, match=r"admm: space = 'image' needs generate\(\)"):
        run({**SPEC, "space": "image"}, flat(2), never)
    with pytest.raises(ValueError, match="admm: y has 2 rows for a batch of 3"):
        run(SPEC, flat(2), never, rows=3)
    with pytest.raises(ValueError, match="the start has shape"):
        run(SPEC, flat(2), never, shape=(D + 1,))
