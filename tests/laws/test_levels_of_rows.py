"""The law of level tensors: a sample that waits or is finished does not show in the others."""

import pytest
import torch

import sampler
from sampler import registry
from sampler.types import Level, Prediction, Span
from tests.laws.world import buildable, cond, grid, noise, spec

STEPS = 5
KINDS = ("eps", "v", "x0", "velocity")
# For every sample, its place in its own grid of STEPS + 1 levels at every level of the run: one
# moves always, one is finished early, one waits first, one in the middle, one does both.
OWN_START = ("reddiff", "difface")
PATHS = (
    (0, 1, 2, 3, 4, 5, 5, 5),
    (0, 3, 5, 5, 5, 5, 5, 5),
    (0, 0, 0, 1, 2, 3, 4, 5),
    (0, 1, 2, 2, 2, 3, 4, 5),
    (0, 0, 1, 2, 4, 5, 5, 5),
)
NAMES = [name for name in buildable("sampler") if name not in OWN_START]


def engine(kind):
    """A network whose output depends on the sample's own level, and a rule with two branches."""

    def fn(x, level, which):
        a, s = (torch.as_tensor(v, dtype=x.dtype).reshape(-1, 1, 1, 1) for v in level[1:])
        x0 = torch.tanh(x + which.view(-1, 1, 1, 1)) * (1 + 0.1 * a)
        x0 = torch.where(s == 0, 0.9 * x, x0)  # which is not consistent at the end
        eps = torch.where(s == 0, 0.1 * x, (x - a * x0) / torch.where(s == 0, 1, s))
        return {"eps": eps, "x0": x0, "v": a * eps - s * x0, "velocity": eps - x0}[kind]

    return sampler.Engine(sampler.denoiser(fn, kind))


def tensors(levels, rows):
    """The grid of some samples as level tensors."""
    places = zip(*(PATHS[row] for row in rows), strict=True)
    return [
        Level(
            *(
                torch.tensor(v, dtype=torch.float64)
                for v in zip(*(levels[i] for i in at), strict=True)
            )
        )
        for at in places
    ]


def alone(levels, row):
    return [levels[i] for i in dict.fromkeys(PATHS[row])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_samples_at_levels_of_their_own_are_those_alone(name, kind):
    method, levels = registry.build("sampler", spec("sampler", name)), grid(name, STEPS)
    # noise is drawn by the number of the step, which is another one where a sample has waited
    rows = (0, 1) if method.stochastic else range(len(PATHS))
    x, run = noise(len(PATHS)), engine(kind)
    given = (cond(len(rows)), method, {"name": "cfg", "scale": 2.0}, list(rows))
    together = run.run(x[list(rows)], tensors(levels, rows), *given)
    for place, row in enumerate(rows):
        own = run.run(x[row : row + 1], alone(levels, row), cond(1), *given[1:3], [row])
        assert (together[place] - own[0]).abs().max() <= 1e-12, row


@pytest.mark.parametrize("name", NAMES)
def test_resuming_and_gradients(name, tmp_path):
    method, levels = registry.build("sampler", spec("sampler", name)), grid(name, STEPS)
    rows = (0, 1) if method.stochastic else range(len(PATHS))
    run, x = engine("x0"), noise(len(PATHS))[list(rows)].requires_grad_()
    given = (cond(len(rows)), method, {"name": "cfg", "scale": 2.0})
    first, walked = run.start(x, tensors(levels, rows), *given, list(rows))
    snaps = list(run.steps(first, walked, *given))
    sampler.save_snapshot(snaps[2], tmp_path / "s")
    *_, again = run.steps(sampler.load_snapshot(tmp_path / "s"), walked, *given)
    assert torch.equal(again.x, snaps[-1].x)
    if not snaps[-1].x.requires_grad:
        assert name == "admm"  # its start is the measurement's
        return
    (grad,) = torch.autograd.grad(snaps[-1].x.square().sum(), x)
    assert grad.isfinite().all()


@pytest.mark.parametrize("name", OWN_START)
def test_a_sampler_with_a_start_of_its_own_refuses_them(name):
    levels = tensors(grid(name, STEPS), (0, 1))
    with pytest.raises(ValueError, match=f"{name}: all samples of a run need the same levels"):
        engine("eps").run(noise(2), levels, cond(2), spec("sampler", name), "none")


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_move_of_level_tensors_itself_is_finite(kind, eta):
    now, after = (
        Level(*(torch.tensor(v, dtype=torch.float64) for v in level))
        for level in (
            ([500, 500, 0], [0.8, 0.8, 1], [0.6, 0.6, 0]),
            ([0, 500, 0], [1, 0.8, 1], [0, 0.6, 0]),
        )
    )
    x = noise(3)
    pred = Prediction.of(
        kind,
        x,
        torch.where(
            torch.tensor([True, True, False]).view(3, 1, 1, 1),
            x,
            {"x0": x, "eps": 0 * x, "v": 0 * x, "velocity": -x}[kind],
        ),
        now,
    )
    method = registry.build("sampler", {"name": "ddim", "eta": eta})
    move = method.step(x, pred, Span(0, now, after), ())
    mean = sampler.settle(sampler.Lin.of(move.mean))
    assert mean.isfinite().all() and torch.allclose(mean[1:], x[1:], atol=1e-14)
    assert torch.equal(torch.as_tensor(move.std) * torch.ones(3), torch.zeros(3))
