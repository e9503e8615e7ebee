"""Expected gradients in one dimension: of x0 ~ N(theta, 1), whose exact flow is the network."""

import math

import numpy as np
import pytest
import torch

import sampler
from sampler.core.noise import Noise
from sampler.core.trajectory import Run
from sampler.engine import Engine
from sampler.training.averages import Average
from sampler.training.matching.trainers import AWM, NFT
from sampler.training.matching.update import Matching
from sampler.training.online import Collected
from sampler.training.policy.group import action_loss
from sampler.training.policy.grpo import GRPO
from sampler.training.policy.rollout import Action, Policy
from sampler.training.session import Session
from sampler.types import Level, Snapshot, spans

THETA = 0.4
LEVELS = [Level(1000 * s, 1 - s, s) for s in (1.0, 0.7, 0.35)]
END = Level(0, 1.0, 0.0)


class Weights:
    """theta, with the old weights of the matching trainers."""

    def __init__(self):
        self.theta = torch.nn.Parameter(torch.tensor(THETA, dtype=torch.float64))
        self.parameters = {"theta": self.theta}
        self.averages = {"old": Average.of(self.parameters)}


def gain(level):
    """k of E[x0 | x] = theta + k·(x − alpha·theta)."""
    return level.alpha / (level.alpha**2 + level.sigma**2)


def estimate(theta, x, level):
    return theta + gain(level) * (x - level.alpha * theta)


def begin(weights, method, rows, x):
    """(session, run) of the exact flow from x [rows, 1]."""

    def network(x, level=None, cond=None):
        return (x - estimate(weights.theta, x, level)) / level.sigma

    engine = Engine(sampler.denoiser(network, "velocity"), sampler=method, guidance="none")
    session = Session(
        engine, None, engine.sampler, engine.guidance, 3, (16, 16), rows, trainable=weights
    )
    start = Snapshot(0, x, (), (), (0,) * rows, (0,) * rows)
    return session, Run(start, (*LEVELS, END), sampler.Cond(), engine.sampler, engine.guidance)


def hermite(order=12):
    """Nodes and weights of expectations over N(0, 1), exact for polynomials."""
    nodes, weights = np.polynomial.hermite.hermgauss(order)
    return torch.tensor(nodes * math.sqrt(2)), torch.tensor(weights / math.sqrt(math.pi))


def half_normal(order=60, end=12.0):
    """Nodes on both sides of 0, where the sign of the noise has a jump."""
    nodes, weights = np.polynomial.legendre.leggauss(order)
    t = torch.tensor((nodes + 1) * end / 2)
    w = torch.tensor(weights * end / 2) * (-t * t / 2).exp() / math.sqrt(2 * math.pi)
    return torch.cat([-t, t]), torch.cat([w, w])


@pytest.mark.parametrize("ratio", ["plain", "guard"])
def test_grpo_has_the_gradient_of_the_expected_reward(monkeypatch, ratio):
    """Of cps, through its two noisy steps; the guard's is smaller by the deviation of its step.

    The last step draws no noise and is a part of the environment.
    """
    weights, (z, w) = Weights(), hermite()
    grid, density = torch.cartesian_prod(z, z, z), torch.cartesian_prod(w, w, w).prod(1)
    trainer = GRPO(ratio=ratio, window=None, max_advantage=1e9)
    x = grid[:, :1].contiguous()
    session, run = begin(weights, {"name": "cps", "noise_level": 0.7}, len(x), x)
    monkeypatch.setattr(Noise, "of_move", lambda self, k, like, over: grid[:, k + 1 : k + 2])
    policy = Policy(trainer, session)
    snapshot, actions = run.snapshot, []
    with torch.no_grad():
        for span in spans(run.levels):
            move, state, nfe = policy.move(run, snapshot, span)
            noise = grid[:, span.index + 1 : span.index + 2] if span.index < 2 else 0.0
            after = sampler.settle(move.mean) + move.std * noise
            if span.index < 2:
                actions.append(Action(snapshot, after, policy.log_prob(move, after)))
            snapshot = Snapshot(span.index + 1, after, (), state, snapshot.seeds, nfe)
    reward = -((snapshot.x[:, 0] - 2.0) ** 2) + 5.0
    found = [
        torch.autograd.grad(
            (density * action_loss(trainer, policy, run, action, reward)[0]).sum(), weights.theta
        )[0]
        for action in actions
    ]
    share = 0.7 * math.pi / 2
    for number, ours in enumerate(found):
        x = grid[:, :1]
        for step, (now, after) in enumerate(zip(LEVELS, (*LEVELS[1:], END), strict=True)):
            theta = weights.theta if step == number else THETA
            d = estimate(theta, x, now)
            eps = (x - now.alpha * d) / now.sigma
            kept, drawn = (math.cos(share), math.sin(share)) if step < 2 else (1.0, 0.0)
            noise = grid[:, step + 1 : step + 2] if step < 2 else 0.0
            x = after.alpha * d + after.sigma * (kept * eps + drawn * noise)
        value = (density * (5.0 - (x[:, 0] - 2.0) ** 2)).sum()
        (wanted,) = torch.autograd.grad(value, weights.theta)
        scale = LEVELS[number + 1].sigma * math.sin(share) if ratio == "guard" else 1.0
        assert wanted.abs() > 0.1
        assert -float(ours) == pytest.approx(scale * float(wanted), rel=1e-8)


def matched(monkeypatch, trainer, level, slope=1.0, curve=0.5):
    """The expected gradient on policy at one level, and what its formula needs.

    The reward is slope·y + curve·y², y = x0 − theta.
    u = E[x0 | x] − x0 and what is left of y are independent: they are the axes of the quadrature.
    """
    weights, (t, p), (z, w) = Weights(), half_normal(), hermite()
    grid, density = torch.cartesian_prod(t, z), torch.cartesian_prod(p, w).prod(1)
    k, a, s = gain(level), level.alpha, level.sigma
    spread = math.sqrt((1 - k * a) ** 2 + (k * s) ** 2)  # of u = (k·alpha − 1)·y + k·sigma·eps
    one, other = (k * a - 1) / spread, k * s / spread
    y = (one * grid[:, 0] + other * grid[:, 1])[:, None]
    eps = (other * grid[:, 0] - one * grid[:, 1])[:, None]
    monkeypatch.setattr(Noise, "draw", lambda self, number, like, stream="step": eps)
    monkeypatch.setattr(
        "sampler.training.matching.update.matching_levels", lambda *arguments: [level]
    )
    x0 = THETA + y
    session, run = begin(weights, "ddim", len(x0), x0)
    collected = Collected(
        rows=list(range(len(x0))), run=run, x0=x0, reward=x0[:, 0], parts={}, nfe=0
    )
    advantage = slope * y[:, 0] + curve * y[:, 0] ** 2
    ((loss, metrics),) = Matching(trainer, session).losses(None, collected, advantage)
    assert metrics["deviation"].abs().max() == 0
    (found,) = torch.autograd.grad((density * loss).sum(), weights.theta)
    return float(found), 1 - k * a, (k * a - 1) * slope, spread


@pytest.mark.parametrize("level", LEVELS[1:])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_nft_has_the_expected_gradient_of_matching_weighed_by_2r_minus_1(monkeypatch, level, beta):
    """2·E[A·sign(u)]·dD/dtheta, A = A_max·(2r − 1): of (D − x0)²/|D − x0| in one dimension.

    E[A·sign(u)] = cov(A, u)/spread·sqrt(2/pi): the even part of the reward has no effect.
    """
    trainer = NFT(beta=beta, kl=0.0, max_advantage=500.0)
    found, slope, covariance, spread = matched(monkeypatch, trainer, level)
    wanted = 2 * slope * covariance / spread * math.sqrt(2 / math.pi)
    assert found == pytest.approx(wanted, rel=1e-8)


@pytest.mark.parametrize("level", LEVELS[1:])
def test_awm_has_the_expected_gradient_of_its_log_probability(monkeypatch, level):
    """−E[A·grad log p], log p = −(v − v*)² = −u²/sigma²."""
    trainer = AWM(kl=0.0, kl_ema=0.0, max_advantage=500.0, weighting="uniform")
    found, slope, covariance, _ = matched(monkeypatch, trainer, level)
    assert found == pytest.approx(2 * slope * covariance / level.sigma**2 / 500, rel=1e-8)
