"""The laws that every registered sampler obeys (architecture: one evaluation, state is a value)."""

import math
from itertools import islice

import pytest
import torch
from scipy.integrate import solve_ivp
from torch.utils.checkpoint import checkpoint

import sampler
from sampler import registry
from sampler.core.snapshots import load_snapshot, save_snapshot
from tests.analytic import mixture, sigma_grid
from tests.laws.world import Counting, buildable, cond, grid, noise, run, spec

NAMES = buildable("sampler")
CFG = {"name": "cfg", "scale": 3.0}


def build(name):
    return registry.build("sampler", spec("sampler", name))


@pytest.mark.parametrize("name", registry.names("sampler"))
def test_every_strategy_is_covered(name):
    if name in NAMES:
        build(name)


@pytest.mark.parametrize("name", NAMES)
def test_observed_order_on_the_exact_ode(name):
    """Halving the steps divides the error by 2^order: on equal steps in sigma/alpha."""
    method = build(name)
    if method.convergence is None:
        pytest.skip("declares no order")
    mix = mixture(6, 5)
    z = noise(1).flatten(1)[:, :6] * 8.0
    levels = sigma_grid(1)

    def slope(u, z):
        a = 1 / math.sqrt(1 + u * u)
        level = sampler.Level(u, a, u * a)
        return mix.eps(torch.as_tensor(z)[None] * a, level)[0].numpy()

    exact = torch.as_tensor(
        solve_ivp(slope, (8.0, 0.5), z[0].numpy(), method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
    )
    engine = sampler.Engine(sampler.denoiser(lambda x, level, _: mix.eps(x, level)))
    errors = []
    for steps in (80, 160, 320):
        levels = sigma_grid(steps)
        x = engine.run(z * levels[0].alpha, levels, sampler=method)
        errors.append(float((x[0] / levels[-1].alpha - exact).norm()))
    observed = math.log2(errors[1] / errors[2])
    # Above order 3 the Euler start hides the rest at any affordable number of steps.
    assert observed >= min(method.convergence, 3.0) - 0.35, (errors, observed)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_see_its_batch(name):
    x, levels = noise(3), grid(name, 7)
    together = run(spec("sampler", name), CFG, levels, x, seeds=[4, 5, 6])
    for row in range(3):
        alone = run(spec("sampler", name), CFG, levels, x[row : row + 1], seeds=[4 + row])
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("name", NAMES)
def test_resuming_from_any_snapshot_is_bit_equal(name, tmp_path):
    method, levels, x = build(name), grid(name, 6), noise(2)
    engine = sampler.Engine(Counting().denoiser)
    first, walked = engine.start(x, levels, cond(2), method, CFG, [1, 2])
    whole = list(engine.steps(first, walked, cond(2), method, CFG))
    for snapshot in whole[:-1]:
        save_snapshot(snapshot, tmp_path / "s")
        *_, last = engine.steps(load_snapshot(tmp_path / "s"), walked, cond(2), method, CFG)
        assert torch.equal(last.x, whole[-1].x)
        assert last.nfe == whole[-1].nfe and last.seeds == (1, 2)


@pytest.mark.parametrize("name", NAMES)
def test_two_interleaved_runs_share_nothing(name):
    method, levels = build(name), grid(name, 5)
    engine = sampler.Engine(Counting().denoiser)
    starts = [engine.start(noise(2) * k, levels, cond(2), method, CFG) for k in (1.0, 0.5)]
    alone = [list(engine.steps(s, walked, cond(2), method, CFG))[-1].x for s, walked in starts]
    walks = [engine.steps(s, walked, cond(2), method, CFG) for s, walked in starts]
    last = [None, None]
    for pair in zip(*walks, strict=True):
        last = [snap.x for snap in pair]
    assert all(torch.equal(a, b) for a, b in zip(alone, last, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_exactly_one_evaluation_per_step(name):
    counting, method, levels = Counting(), build(name), grid(name, 6)
    engine = sampler.Engine(counting.denoiser)
    first, walked = engine.start(noise(2), levels, cond(2), method, CFG)
    *_, last = engine.steps(first, walked, cond(2), method, CFG)
    assert len(counting.rows) == len(walked) - 1
    assert sum(counting.rows) == sum(last.nfe)


@pytest.mark.parametrize("name", NAMES)
def test_float64_stays_and_everything_else_is_float32(name):
    levels = grid(name, 4)
    for dtype, kept in ((torch.float64,) * 2, (torch.float16, torch.float32)):
        assert run(spec("sampler", name), CFG, levels, noise(2, dtype)).dtype == kept


@pytest.mark.parametrize("prediction", ["v", "x0", "velocity"])
@pytest.mark.parametrize("name", NAMES)
def test_parametrisations_of_one_model_agree(name, prediction):
    x, levels = noise(2), grid(name, 6)
    method = spec("sampler", name)
    eps = run(method, CFG, levels, x)
    other = run(method, CFG, levels, x, prediction=prediction)
    assert (eps - other).abs().max() <= 1e-9 * eps.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_snr_start(name):
    """A first level without signal (alpha = 0) is finite for v-prediction."""
    levels = (sampler.Level(999, 0.0, 1.0), *grid(name, 4))
    fn = lambda x, level, _: torch.tanh(x)  # noqa: E731
    engine = sampler.Engine(sampler.denoiser(fn, "v"))
    assert engine.run(noise(2), levels, sampler=spec("sampler", name)).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_gradient_against_finite_differences_and_checkpointing(name):
    method, levels = build(name), grid(name, 4)
    engine = sampler.Engine(Counting().denoiser)
    x, probe = noise(1), noise(1).roll(1)

    def loss(x):
        return (engine.run(x, levels, cond(1), method, CFG, [3], grad=True) * probe).sum()

    leaf = x.clone().requires_grad_()
    if not loss(leaf).requires_grad:
        pytest.skip("the start does not reach the result (an inverse solver from its measurement)")
    (plain,) = torch.autograd.grad(loss(leaf), leaf)
    (saved,) = torch.autograd.grad(checkpoint(loss, leaf, use_reentrant=False), leaf)
    assert torch.equal(plain, saved)
    h = 1e-6
    way = noise(1).flip(-1)
    with torch.no_grad():
        numeric = (loss(x + h * way) - loss(x - h * way)) / (2 * h)
    assert float((plain * way).sum()) == pytest.approx(float(numeric), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_only(name):
    levels = grid(name, 1)
    assert run(spec("sampler", name), "none", levels, noise(1)).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_direction_is_followed_or_refused(name):
    """On the first step x' changes by k·sigma'·(direction − eps), or cfg_pp is refused.

    k is the share of the noise that is not drawn anew, 1 in a deterministic step.
    """
    method, levels, x = build(name), grid(name, 6), noise(2)
    pred = sampler.Prediction.from_x0(x, 0.3 * x, levels[0])
    other = sampler.Prediction.from_x0(x, 0.3 * x, levels[0], eps=x.flip(-1))
    start, state = method.start(x, levels[0])
    span = sampler.Span(0, levels[0], levels[1], 6)
    if not method.follows_direction:
        with pytest.raises(ValueError, match="no place for a direction"):
            run(spec("sampler", name), "cfg_pp", levels, x)
        return
    moves = [
        sampler.settle(sampler.Lin.of(method.step(start, p, span, state).mean))
        for p in (pred, other)
    ]
    std = method.step(start, pred, span, state).std
    kept = math.sqrt(levels[1].sigma ** 2 - std**2)
    expected = kept * (other.eps.tensor() - pred.eps.tensor())
    assert torch.allclose(moves[1] - moves[0], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", [{"name": "ddim", "eta": 1.0}, *NAMES], ids=str)
def test_stochastic_moves_have_a_density_and_follow_their_seeds(method):
    given = method if isinstance(method, dict) else spec("sampler", method)
    method = given if isinstance(given, dict) else {"name": given}
    if method["name"] == "reddiff" or not registry.build("sampler", method).stochastic:
        pytest.skip("no noise, or RED-Diff's own")
    levels, x = grid(method["name"], 5), noise(2)
    one = run(method, CFG, levels, x, seeds=[1, 2])
    assert torch.equal(one, run(method, CFG, levels, x, seeds=[1, 2]))
    assert not torch.equal(one, run(method, CFG, levels, x, seeds=[1, 3]))
    counting = Counting()
    engine = sampler.Engine(counting.denoiser)
    first, walked = engine.start(x, levels, cond(2), method, CFG, [1, 2])
    snap = next(islice(engine.steps(first, walked, cond(2), method, CFG), 1))
    normal = torch.distributions.Normal(0.3 * x, 0.7)
    move = sampler.Move(0.3 * x, 0.7)
    expected = normal.log_prob(snap.x).flatten(1).sum(1)
    assert torch.allclose(move.log_prob(snap.x), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="no density"):
        sampler.Move(x, 0.0).log_prob(x)
