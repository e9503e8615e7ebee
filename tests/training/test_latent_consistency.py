"""RLCM on latent consistency models, and what a policy stores of a trajectory."""

import copy

import numpy as np
import pytest
import torch

import sampler
from sampler import registry
from sampler.models.lora import load_lora
from sampler.models.trainable_lora import adapted
from sampler.rewards.base import RewardBase
from sampler.training.batches import batch
from sampler.training.online import online_updates
from sampler.training.policy.ppo import PPO
from sampler.training.policy.rollout import Policy
from sampler.training.policy.trainers import DDPO, RLCM
from sampler.training.session import Session
from sampler.types import Prediction, spans
from tests.pipelines.test_latent_consistency import lcm, stock
from tests.training import toy, world

SIZE = {"height": 24, "width": 40}


def optimal(x, level, mu, s, kind):
    """Prediction of the best network of this kind where data are N(mu, s²)."""
    a, sigma = level.alpha, level.sigma
    x0 = mu + a * s**2 / (a**2 * s**2 + sigma**2) * (x - a * mu)
    eps = (x - a * x0) / sigma
    return eps if kind == "epsilon" else a * eps - sigma * x0


@pytest.mark.parametrize("case", range(8))
def test_multistep_sampling_is_the_stock_schedulers(case):
    """Stored trajectories of diffusers' LCMScheduler, with its own noise between the steps."""
    stored, cases = toy.golden("lcm_multistep")
    spec, key = cases[case], f"c{case:03d}_"
    config = {**toy.BETAS, "prediction_type": spec["prediction_type"]}
    schedule = sampler.Schedule.from_config(config, "LCMScheduler")
    grid = schedule.grid(spec["num_inference_steps"])
    assert [level.t for level in grid[:-1]] == spec["timesteps"]
    wanted, noise = torch.tensor(stored[f"{key}traj"]), torch.tensor(stored[f"{key}noise"])
    mu, s = torch.tensor(stored[f"{key}mu"]), float(stored[f"{key}s"])
    method, x = registry.build("sampler", "consistency"), wanted[0]
    for span in spans(grid):
        pred = schedule.predict(x, optimal(x, span.now, mu, s, spec["prediction_type"]), span.now)
        denoised = stored[f"{key}denoised"][span.index]
        np.testing.assert_allclose(pred.x0.tensor(), denoised, rtol=0, atol=2e-6)
        move = method.step(x, pred, span, ())
        x = sampler.settle(move.mean)
        x = x + move.std * noise[span.index] if move.std else x
        np.testing.assert_allclose(x, wanted[span.index + 1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("final_step", ["drop", "pathwise", "explore"])
def test_rlcm_trains_a_latent_consistency_model(tmp_path, final_step, monkeypatch):
    """The guidance scale is told; base weights stay; a stock LCM pipeline makes our images."""
    pipe = lcm()
    engine = sampler.load(pipe)
    before = world.state(engine.pipeline.network)
    spec = {**world.TRAINERS["rlcm"], "final_step": final_step}
    rule = {"name": "embedded", "scale": 3.0}
    report = world.tune(engine, tmp_path, spec, guidance=rule, steps=4)
    assert all(r["grad_norm"] > 0 for r in report.log)
    assert report.log[-1]["nfe"] == 2 * 2 * 4  # updates, images, steps: no unconditional branch
    assert world.same(before, world.state(engine.pipeline.network))
    if final_step != "drop":
        return
    prompts, options = ["a red fox", "two green apples", "the sea at night"], {"steps": 4, **SIZE}
    load_lora(engine, tmp_path)
    ours = engine.generate(
        prompts, seeds=[7, 8, 9], guidance=rule, output="tensor", **options
    ).images
    fresh = lcm()
    bare = stock(copy.deepcopy(fresh), 4, 3.0, monkeypatch, "pt")
    fresh.load_lora_weights(str(tmp_path / "lora"))
    theirs = stock(fresh, 4, 3.0, monkeypatch, "pt")
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert (bare - ours).abs().max() > 1e-3


def test_the_scale_that_is_told_reaches_the_gradient(tmp_path):
    found = []
    for scale in (1.0, 8.0):
        engine = sampler.load(lcm())
        rule = {"name": "embedded", "scale": scale}
        out = tmp_path / str(scale)
        found.append(world.tune(engine, out, "rlcm", guidance=rule, updates=1).log[0]["grad_norm"])
    assert found[0] != found[1]


@pytest.fixture(scope="module")
def session():
    engine = world.engine()
    with adapted(engine.pipeline.network, 2, 2, ["to_q", "to_v"], 0) as adapter:
        method = sampler.build("sampler", "consistency")
        reward = sampler.build("reward", "brightness")
        yield Session(engine, reward, method, engine.guidance, 4, (16, 16), 2, trainable=adapter)


@pytest.mark.parametrize("offload", [False, True])
def test_a_trajectory_stores_its_latents_and_nothing_else(session, offload):
    rows = batch(["a dog", "a cat"], 2, 0, 0)
    policy = Policy(RLCM(offload=offload), session)
    with torch.no_grad():
        found = policy.rollout(rows, rows.rows)
    assert len(found.actions) == 3  # T − 1
    stored = {a.before.x.untyped_storage().data_ptr() for a in found.actions}
    stored |= {a.after.untyped_storage().data_ptr() for a in found.actions}
    assert len(stored) == 4  # T·B latents: an action's end is the next one's start
    assert all(a.after.device.type == "cpu" for a in found.actions)
    assert all(a.before.sampler == () and not a.log_prob.requires_grad for a in found.actions)


def test_a_step_is_the_policy_gradient_and_advantages_are_limited(session):
    """At unchanged weights the gradient is −mean(A·∇log pi), with A clipped to ± max_advantage."""
    rows = batch(["a dog", "a cat", "a car", "a hat"], 4, 0, 0)
    parameters = list(session.trainable.parameters.values())

    def gradient(trainer, scores):
        class Fixed(RewardBase):
            differentiable = False

            def __call__(self, images, prompts):
                return torch.tensor([scores[rows.prompts.index(p)] for p in prompts])

        object.__setattr__(session, "reward", Fixed())
        total = [torch.zeros_like(p) for p in parameters]
        for update in online_updates(PPO(trainer, Policy(trainer, session)), rows, {}):
            if update.loss is not None:
                grads = torch.autograd.grad(update.loss, parameters, allow_unused=True)
                pairs = zip(total, grads, strict=True)
                total = [t + (0 if g is None else g) for t, g in pairs]
        return torch.cat([t.flatten() for t in total])

    scores = [0.0, 1.0, 2.0, 10.0]
    advantages = (np.array(scores) - np.mean(scores)) / (np.std(scores) + 1e-6)
    assert advantages[3] > 1.5
    for limit in (10.0, 0.4):
        found = gradient(RLCM(max_advantage=limit), scores)
        policy, wanted = Policy(DDPO(), session), 0.0
        with torch.no_grad():
            trajectories = [policy.rollout(rows, part) for part in ([0, 1], [2, 3])]
        for trajectory in trajectories:
            clipped = torch.tensor(advantages[trajectory.rows]).clamp(-limit, limit)
            for action in trajectory.actions:
                span = spans(trajectory.run.levels)[action.before.index]
                move = policy.move(trajectory.run, action.before, span)[0]
                log_prob = policy.log_prob(move, action.after)
                wanted = wanted - (clipped.to(log_prob) * log_prob).sum() / (4 * 3)
        grads = torch.autograd.grad(wanted, parameters, allow_unused=True)
        flat = torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).flatten()
                for g, p in zip(grads, parameters, strict=True)
            ]
        )
        assert (found - flat).norm() <= 1e-5 * flat.norm() > 0


def test_predictions_of_the_toy_kinds_agree():
    """The optimal eps and v of one Gaussian are the same x0."""
    level, x = toy.SCHEDULE.level(500), torch.randn(3, 4).double()
    mu = torch.ones(4).double()
    views = [
        Prediction.of(kind, x, optimal(x, level, mu, 0.5, name), level).x0.tensor()
        for kind, name in (("eps", "epsilon"), ("v", "v_prediction"))
    ]
    torch.testing.assert_close(*views)
