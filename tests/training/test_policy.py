"""DDPO and RLCM: stored log-probabilities and advantages, exact expectations by quadrature."""

import json
import math

import numpy as np
import pytest
import torch

import sampler
from sampler import registry
from sampler.core.trajectory import Run
from sampler.engine import Engine
from sampler.objectives import clipped_loss
from sampler.rewards.base import Scores
from sampler.training.policy.advantages import per_group, per_prompt
from sampler.training.policy.ppo import _action_loss, _kl, _pathwise_loss
from sampler.training.policy.rollout import Action, Policy, Trajectory
from sampler.training.policy.trainers import DDPO, RLCM
from sampler.training.session import Session
from sampler.types import Level, Move, Prediction, Snapshot, Span, spans
from tests.training import toy

KIND = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


# What their files were made with, and the bar of each (the ddim file's tables are float32).
LCM = sampler.Schedule.from_config(toy.BETAS, "LCMScheduler")
PEERS = {"ddim_step_logprob": (toy.SCHEDULE, 5e-5), "rlcm_step_logprob": (LCM, 5e-6)}


@pytest.mark.parametrize("name", PEERS)
def test_log_probabilities_are_the_peers(name):
    (stored, cases), (schedule, bar) = toy.golden(name), PEERS[name]
    policy = Policy(DDPO(), None)  # "mean" over the elements, as they have it
    for spec in cases:
        key = f"c{spec['id']:03d}_"
        x, out, after = (
            torch.tensor(stored[key + k]) for k in ("x", "model_output", "prev_sample")
        )
        now = schedule.level(spec["timestep"])
        pred = schedule.predict(x, out, now)
        if name == "ddim_step_logprob":
            following = schedule.level(spec["prev_timestep"])
            method = registry.build("sampler", {"name": "ddim", "eta": spec["eta"]})
            pred = Prediction.of(KIND[spec["prediction_type"]], x, out, now)
        else:
            following = schedule.level(spec["next_timestep"])
            method = registry.build("sampler", "consistency")
            np.testing.assert_allclose(pred.x0.tensor(), stored[f"{key}denoised"], rtol=bar)
        move = method.step(x, pred, Span(0, now, following, 1), ())
        np.testing.assert_allclose(policy.log_prob(move, after), stored[f"{key}log_prob"], rtol=bar)


def test_the_tracker_and_the_clipped_loss_are_the_peers():
    stored = np.load(toy.GOLDEN / "policy_gradient.npz")
    meta, buffers = json.loads(str(stored["meta_json"])), {}
    for u in range(6):
        prompts = [meta["prompts"][i] for i in stored[f"u{u}_prompt_idx"]]
        rewards = stored[f"u{u}_rewards"].tolist()
        found, inverse, buffers = per_prompt(
            prompts, rewards, buffers, meta["buffer_size"], meta["min_count"]
        )
        np.testing.assert_allclose(found, stored[f"u{u}_advantages"], rtol=1e-12, atol=1e-12)
    new = torch.tensor(stored["ppo_new"], requires_grad=True)
    limit = float(stored["ppo_adv_clip"])
    advantage = torch.tensor(stored["ppo_adv"]).clamp(-limit, limit)
    ratio = new - torch.tensor(stored["ppo_old"])
    loss = clipped_loss(ratio, advantage, float(stored["ppo_clip"])).mean()
    assert float(loss) == pytest.approx(float(stored["ppo_loss"]), rel=1e-12)
    (grad,) = torch.autograd.grad(loss, new)
    np.testing.assert_allclose(grad, stored["ppo_grad_new"], rtol=1e-12, atol=1e-15)


def test_groups():
    prompts, rewards = ["a", "b", "a", "b"], [1.0, 5.0, 3.0, 6.0]
    found, inverse, state = per_group(prompts, rewards)
    scale = 1 / (np.std(rewards) + 1e-4)
    np.testing.assert_allclose(found, np.array([-1, -0.5, 1, 0.5]) * scale)
    assert state == {} and inverse == [pytest.approx(scale)] * 4


def test_long_prompts_are_told_apart():
    """Peers' keys are texts cut at 50 tokens: these two would be one."""
    start = "word " * 60
    _, _, buffers = per_prompt([start + "cat", start + "dog"], [0.0, 1.0], {}, 4, 2)
    assert len(buffers) == 2


def test_score_estimator_in_one_dimension():
    """pi = N(theta, s²), r = −(x − m)²: the gradient is −2(theta − m), whatever the baseline."""
    nodes, weights = quadrature()
    s, m = 0.7, 2.0
    theta = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    x = (0.4 + s * nodes)[:, None]
    for baseline in (0.0, 3.0):
        move = Move(theta.expand(len(x), 1), s)
        log_prob = move.log_prob(x)
        advantage = -((x[:, 0] - m) ** 2) - baseline
        loss = (weights * clipped_loss(log_prob - log_prob.detach(), advantage, 1e-4)).sum()
        (gradient,) = torch.autograd.grad(loss, theta)
        assert -float(gradient) == pytest.approx(-2 * (0.4 - m), rel=1e-10)


def quadrature(order=12):
    """Nodes and weights of expectations over N(0, 1), exact for polynomials."""
    nodes, weights = np.polynomial.hermite.hermgauss(order)
    return torch.tensor(nodes * math.sqrt(2)), torch.tensor(weights / math.sqrt(math.pi))


class Bare(Session):
    """Rewards on one number per row, without images."""

    def scores(self, images, prompts):
        return Scores(self.reward(images), {})

    def decoder(self, clamp):
        return lambda x: x


class Batch:
    prompts = ("",) * 2000


def linear_world(final_step, sigma):
    """T = 2, f(x) = a·x + b, r = −(f − 1)²; rows are quadrature nodes of x_0, z and the noise."""
    theta = torch.tensor([0.8, -0.3], dtype=torch.float64, requires_grad=True)

    def f(x, level=None, cond=None):
        return theta[0] * x + theta[1]

    def reward(x):
        return -((x[:, 0] - 1) ** 2)

    levels = (Level(9, 0.6, 0.8), Level(5, 0.9, math.sqrt(0.19)), Level(0, 1.0, 0.0))
    engine = Engine(sampler.denoiser(f, "x0"), sampler="consistency")
    session = Bare(engine, reward, engine.sampler, engine.guidance, 2, (16, 16), 1)
    trainer = RLCM(final_step=final_step, reduction="sum", explore_std=sigma)
    policy = Policy(trainer, session, final_step, sigma)
    z, w = quadrature()
    grid = torch.cartesian_prod(z, z, z)
    weights = torch.cartesian_prod(w, w, w).prod(1)
    rows = len(grid)
    start = Snapshot(0, grid[:, :1].contiguous(), (), (), (0,) * rows, (0,) * rows)
    run = Run(start, levels, sampler.Cond(), engine.sampler, engine.guidance)
    return theta, f, reward, policy, run, grid, weights


def score_terms(policy, run, grid, reward, f):
    """(the actions, x before the last map, the image) with the nodes as noise."""
    todo = spans(run.levels)
    with torch.no_grad():
        move = policy.action(policy.move(run, run.snapshot, todo[0])[0], todo[0])
        after = move.mean.tensor() + move.std * grid[:, 1:2]
        actions = [Action(run.snapshot, after, policy.log_prob(move, after))]
        second = run.snapshot._replace(index=1, x=after)
        image = f(after)
        last = policy.action(policy.move(run, second, todo[1])[0], todo[1])
        if last is not None:
            end = sampler.Lin.of(last.mean).tensor() + last.std * grid[:, 2:]
            actions.append(Action(second, end, policy.log_prob(last, end)))
            image = end if policy.final_step == "explore" else image
    return actions, second, reward(image)


@pytest.mark.parametrize("final_step", ["drop", "pathwise", "explore"])
def test_final_steps_are_unbiased_or_biased_as_stated(final_step):
    sigma = 0.2
    theta, f, reward, policy, run, grid, weights = linear_world(final_step, sigma)
    actions, before_last, scores = score_terms(policy, run, grid, reward, f)
    terms = [_action_loss(policy, run, a, scores)[0] for a in actions]
    score = [-torch.autograd.grad((weights * t).sum(), theta)[0] for t in terms]

    def objective(noise, through_first=True):
        first = f(grid[:, :1]) if through_first else f(grid[:, :1]).detach()
        x1 = 0.9 * first + math.sqrt(0.19) * grid[:, 1:2]
        return (weights * reward(f(x1) + noise * grid[:, 2:])).sum()

    true = torch.autograd.grad(objective(0.0), theta)[0]
    last = torch.autograd.grad(objective(0.0, through_first=False), theta)[0]
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(score[0], true - last, **close)
    assert last.abs().min() > 0.1  # what `drop` leaves out is not small
    if final_step == "pathwise":
        trajectory = Trajectory(
            rows=list(range(len(grid))), run=run, x0=grid, reward=scores, parts={}, nfe=0,
            actions=actions, final=before_last,
        )  # fmt: skip
        ones = torch.ones(len(grid), dtype=torch.float64)
        loss = _pathwise_loss(policy, Batch, trajectory, ones)
        path = -torch.autograd.grad((weights * loss).sum(), theta)[0]
        torch.testing.assert_close(score[0] + path, true, **close)
    if final_step == "explore":
        smoothed = torch.autograd.grad(objective(sigma), theta)[0]
        torch.testing.assert_close(score[0] + score[1], smoothed, **close)
    assert len(actions) == (2 if final_step == "explore" else 1)


def test_kl_is_the_gaussian_one():
    theta, f, reward, policy, run, grid, weights = linear_world("drop", 0.1)

    class Shifted:  # the policy without adapter has its mean 0.5·alpha' away
        def disable(self):
            theta.data[1] -= 0.5

        def enable(self):
            theta.data[1] += 0.5

    object.__setattr__(policy.session, "trainable", Shifted())
    span = spans(run.levels)[0]
    move = policy.action(policy.move(run, run.snapshot, span)[0], span)
    found = _kl(policy, run, run.snapshot, span, move)
    wanted = torch.full_like(found, (0.9 * 0.5) ** 2 / (2 * 0.19))
    torch.testing.assert_close(found, wanted)


def test_clipping_and_limits_work_on_both_signs():
    log_ratio = torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    (grad,) = torch.autograd.grad(clipped_loss(log_ratio, advantage, 0.1).sum(), log_ratio)
    assert grad[0] == 0 and grad[3] == 0 and grad[1] > 0 and grad[2] < 0


def test_log_probabilities_are_float32_under_autocast():
    policy = Policy(DDPO(), None)
    mean, after = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    plain = policy.log_prob(Move(mean, 0.3), after)
    with torch.autocast("cpu", torch.bfloat16):
        cast = policy.log_prob(Move(mean, 0.3), after)
    assert cast.dtype == torch.float32 and torch.equal(cast, plain)


def test_bad_fields_are_one_sentence():
    for spec, problem in [
        ({"name": "ddpo", "min_count": 64}, "never be reached"),
        ({"name": "ddpo", "advantage": "group"}, "group_size of at least 2"),
        ({"name": "rlcm", "explore_std": 0.0}, "explore_std"),
        ({"name": "rlcm", "clip_range": 0.0}, "clip_range"),
        ({"name": "ddpo", "kl_beta": -1.0}, "kl_beta"),
        ({"name": "ddpo", "passes": 0}, "passes = 0"),
    ]:
        with pytest.raises(ValueError, match=problem):
            sampler.build("trainer", spec)
