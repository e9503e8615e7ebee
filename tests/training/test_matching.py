"""nft and awm: gradients against their formulas, levels, old weights, memory, refusals."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import sampler
from sampler import registry
from sampler.core.noise import Noise
from sampler.core.trajectory import Run
from sampler.engine import Engine
from sampler.models.trainable_lora import adapted
from sampler.objectives import gdpo_advantages, matching_log_prob, old_decay
from sampler.objectives import group_advantages as group_advantages_of
from sampler.training import checkpoint, group_advantages
from sampler.training.averages import Average, Averaged, warm_decay
from sampler.training.batches import batch
from sampler.training.matching.levels import (
    flow_sigma,
    grid_levels,
    level_at,
    matching_levels,
)
from sampler.training.matching.trainers import AWM, NFT
from sampler.training.matching.update import Matching, predict_at
from sampler.training.online import Collected, sampled
from sampler.training.session import Session
from sampler.types import Level, Prediction, Snapshot
from tests import tiny
from tests import tiny_transformers as tiny2
from tests.training import world

LEVELS = [Level(1000 * s, 1 - s, s) for s in (0.9, 0.5, 0.2)]
ADVANTAGES = torch.tensor([2.0, -1.0, 0.5, -7.0], dtype=torch.float64)


class Weights:
    """Two numbers, trained; the old and the base model's are others."""

    def __init__(self, new=(0.3, -0.2), old=(0.3, -0.2)):
        self.theta = torch.nn.Parameter(torch.tensor(new, dtype=torch.float64))
        self.parameters = {"theta": self.theta}
        self.averages = {"old": Average.of(self.parameters)}
        self.averages["old"].values["theta"] = torch.tensor(old, dtype=torch.float64)
        self.kept = self.theta.data

    def disable(self):
        self.theta.data = torch.tensor([0.1, 0.4], dtype=torch.float64)

    def enable(self):
        self.theta.data = self.kept


def toy(trainer, weights):
    """(method, collected): a linear velocity on 4 samples of 3 numbers."""

    def network(x, level=None, cond=None):
        return weights.theta[0] * x + weights.theta[1] * level.sigma

    engine = Engine(sampler.denoiser(network, "velocity"))
    session = Session(
        engine, None, engine.sampler, engine.guidance, 4, (16, 16), 4, trainable=weights
    )
    torch.manual_seed(0)
    x0 = torch.randn(4, 3, dtype=torch.float64)
    start = Snapshot(0, x0, (), (), (5, 6, 7, 8), (0,) * 4)
    run = Run(start, tuple(LEVELS), sampler.Cond(), engine.sampler, engine.guidance)
    reward = torch.zeros(4)
    collected = Collected(rows=[0, 1, 2, 3], run=run, x0=x0, reward=reward, parts={}, nfe=0)
    return Matching(trainer, session), collected


def gradient(trainer, weights, monkeypatch):
    """The gradient of all losses of the toy, and the metrics of the last level."""
    monkeypatch.setattr(
        "sampler.training.matching.update.matching_levels", lambda *arguments: LEVELS
    )
    method, collected = toy(trainer, weights)
    limit = trainer.max_advantage
    total, metrics = torch.zeros(2, dtype=torch.float64), {}
    for loss, metrics in method.losses(None, collected, ADVANTAGES.clamp(-limit, limit)):
        (found,) = torch.autograd.grad(loss.sum(), weights.theta)
        total += found
    return total, metrics, collected.x0


def noised(x0):
    """(level, x, eps) of every level, as the trainer draws them."""
    for number, level in enumerate(LEVELS):
        eps = Noise((5, 6, 7, 8)).draw(number, x0, "renoise")
        yield level, level.alpha * x0 + level.sigma * eps, eps


def velocity(theta, x, level):
    return theta[0] * x + theta[1] * level.sigma


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_nft_at_the_old_weights_weighs_the_denoising_gradient_by_2r_minus_1(beta, monkeypatch):
    """For every beta, without the KL term."""
    weights = Weights()
    ours, metrics, x0 = gradient(NFT(beta=beta, kl=0.0, max_advantage=5.0), weights, monkeypatch)
    theta, wanted = weights.theta, 0
    for level, x, _ in noised(x0):
        estimate = x - level.sigma * velocity(theta, x, level)
        scale = (estimate - x0).abs().mean(1).detach()
        wanted = wanted + ADVANTAGES.clamp(-5, 5) * (estimate - x0).square().mean(1) / scale / 3
    (wanted,) = torch.autograd.grad(wanted.sum(), theta)
    assert (ours - wanted).norm() <= 1e-10 * wanted.norm()
    assert metrics["gain"].abs().max() == 0 and metrics["deviation"].abs().max() == 0
    torch.testing.assert_close(metrics["x0_norm"], x0.square().mean(1))


@pytest.mark.parametrize("average", ["levels", "each"])
def test_awm_has_the_gradient_of_its_clipped_ratio(average, monkeypatch):
    """Off policy; one ratio of all levels is built one level at a time. A KL to the base model."""
    weights = Weights(new=(0.3, -0.2), old=(0.35, -0.1))
    trainer = AWM(average=average, kl=0.7, clip_range=0.01, kl_law="elbo", kl_ema=0.0)
    ours, metrics, x0 = gradient(trainer, weights, monkeypatch)
    theta, old, base = weights.theta, weights.averages["old"].values["theta"], (0.1, 0.4)
    ratios, kl = [], 0
    for level, x, eps in noised(x0):
        new, before = (
            matching_log_prob(
                Prediction.from_velocity(x, velocity(w, x, level), level), x0, eps, "ghuber", 0.25
            )
            for w in (theta, old)
        )
        ratios.append(new - before)
        weight = 2 * 0.49 * level.sigma / (1 - min(level.sigma, 0.99))
        gap = velocity(theta, x, level) - velocity(base, x, level)
        kl = kl + 0.7 * gap.square().mean(1) / weight / 3
    if average == "levels":
        ratios = [sum(ratios) / 3] * 3
    advantage, loss = ADVANTAGES.clamp(-5, 5) / 5, 0
    for ratio in ratios:
        clipped = -advantage * ratio.exp().clamp(0.99, 1.01)
        loss = loss + torch.maximum(-advantage * ratio.exp(), clipped) / 3
    (wanted,) = torch.autograd.grad((loss + kl).sum(), theta)
    assert (ours - wanted).norm() <= 1e-10 * wanted.norm()
    assert metrics["deviation"].min() > 0
    assert torch.equal(theta.data, torch.tensor([0.3, -0.2], dtype=torch.float64))


@pytest.mark.parametrize("name", ["nft", "awm"])
def test_training_evaluates_the_condition_alone_or_the_rule_of_the_settings(name):
    """cond: c; sampling: u + 3·(c − u), whose parts are the same rule of scales 1 and 0."""
    engine = world.engine()

    def rule(scale):
        return registry.build("guidance", {"name": "cfg", "scale": scale})

    method, reward = registry.build("sampler", "ddim"), registry.build("reward", "brightness")
    session = Session(engine, reward, method, rule(3.0), 2, (16, 16), 2)
    rows = batch(["a dog"], 2, 0, 0, 2)
    with torch.no_grad():
        collected = sampled(session, rows, [0, 1])
        level, run = session.pipeline.grid(3, (16, 16))[1], collected.run
        found = {}
        for chosen in ("cond", "sampling"):
            trainer = registry.build("trainer", {"name": name, "train_rule": chosen})
            pred = Matching(trainer, session)._predict(collected, collected.x0, level)
            found[chosen] = sampler.settle(pred.out)
        parts = [
            sampler.settle(predict_at(session, run.cond, (5, 6), collected.x0, level, rule(s)).out)
            for s in (1.0, 0.0)
        ]
    torch.testing.assert_close(found["cond"], parts[0])
    guided = parts[1] + 3 * (parts[0] - parts[1])
    torch.testing.assert_close(found["sampling"], guided, rtol=1e-4, atol=1e-5)
    assert (found["cond"] - found["sampling"]).abs().max() > 1e-3


def test_few_step_models_are_trained_where_that_is_asked_for(tmp_path):
    spec = {**world.TRAINERS["nft"], "few_step": True}
    report = world.tune(world.engine(tiny2.lcm), tmp_path, spec, updates=1)
    assert report.log[0]["grad_norm"] > 0


def test_awm_is_pulled_to_its_average(monkeypatch):
    """kl_ema adds the distance to the output of the average, with the weights of its law."""
    found = []
    for kl_ema in (0.0, 0.5):
        weights = Weights(new=(0.3, -0.2), old=(0.35, -0.1))
        weights.averages["recent"] = Average.of(weights.parameters)
        weights.averages["recent"].values["theta"] = torch.tensor([0.2, 0.1], dtype=torch.float64)
        trainer = AWM(kl=0.0, kl_ema=kl_ema, kl_law="elbo")
        ours, metrics, x0 = gradient(trainer, weights, monkeypatch)
        found.append(ours)
    theta, kl = weights.theta, 0
    for level, x, _ in noised(x0):
        gap = velocity(theta, x, level) - velocity((0.2, 0.1), x, level)
        kl = kl + 0.5 * gap.square().mean(1) * (1 - level.sigma) / (2 * 0.49 * level.sigma) / 3
    (wanted,) = torch.autograd.grad(kl.sum(), theta)
    assert (found[1] - found[0] - wanted).norm() <= 1e-10 * wanted.norm()
    assert metrics["kl_ema"].min() > 0 and "kl" not in metrics


def test_the_average_of_kl_ema_follows_recent_weights(tmp_path):
    """By 0.001 per optimiser step so far, whatever fit.ema is; none is kept without the weight."""
    engine, spec = world.engine(), {**world.TRAINERS["awm"], "passes": 2}
    report = world.tune(engine, tmp_path, spec, updates=2, checkpoint_every=1, ema=0.5)
    assert report.log[0]["kl_ema"] > 0  # after the first step of the update
    before, after = (_checkpoint(tmp_path, update).adapter for update in (1, 2))
    for key in (k for k in after if not k.startswith(("old.", "recent.", "ema."))):
        wanted = 0.004 * before[f"recent.{key}"] + 0.996 * after[key]
        torch.testing.assert_close(after[f"recent.{key}"], wanted)
    assert AWM().decays(299)["recent"] == 0.299 and AWM().decays(400)["recent"] == 0.3
    for path in (tmp_path / "checkpoints").glob("*/adapter.safetensors"):
        kept = {k: v for k, v in load_file(path).items() if not k.startswith("recent.")}
        save_file(kept, path)
    with pytest.raises(sampler.SamplerError, match="lacks the average 'recent'") as error:
        world.tune(engine, tmp_path, spec, updates=3, checkpoint_every=1, ema=0.5)
    assert error.value.code == 4
    spec |= {"kl_ema": 0.0, "passes": 1}
    report = world.tune(engine, tmp_path / "none", spec, updates=1)
    assert "kl_ema" not in report.log[0]
    assert not [k for k in _checkpoint(tmp_path / "none", 1).adapter if k.startswith("recent.")]


def test_defaults_are_the_authors():
    """config/nft.py of DiffusionNFT and config/dgx_awm.py of advantage_weighted_matching."""
    nft, awm = NFT(), AWM()
    assert (nft.memory, nft.beta, nft.kl, nft.mode, nft.max_advantage) == (
        "slow",
        1,
        1e-4,
        "all",
        5,
    )
    assert (awm.memory, awm.average, awm.kl_ema, awm.clip_range) == ("on_policy", "each", 1, 1)
    assert (awm.weighting, awm.power, awm.times, awm.defaults.steps) == ("ghuber", 0.25, 6, 14)
    engine = world.engine()
    method = registry.build("sampler", "ddim")
    session = Session(engine, None, method, engine.guidance, 14, (16, 16), 2)
    grid = engine.pipeline.grid(14, (16, 16))
    assert grid_levels(session, awm.low, awm.high) == list(grid[1:12])


TWO = {"name": "sum", "rewards": ["brightness", "colourfulness"], "weights": [1.0, 0.01]}


@pytest.mark.parametrize("name", ["nft", "grpo"])
def test_gdpo_normalises_each_part_of_a_sum(tmp_path, monkeypatch, name):
    """The advantages are those of `gdpo_advantages` on the parts; they are not those of the sum."""
    seen = []
    made = group_advantages.combined_advantages

    def watched(combine, std, reward, prompts, rewards, parts):
        value = made(combine, std, reward, prompts, rewards, parts)
        seen.append((combine, value, prompts, rewards, parts))
        return value

    for place in ("sampler.training.matching.update", "sampler.training.policy.group"):
        monkeypatch.setattr(f"{place}.combined_advantages", watched)
    for combine in ("sum", "gdpo"):
        spec = {**world.TRAINERS[name], "advantages": combine}
        report = world.tune(world.engine(), tmp_path / combine, spec, TWO, updates=1, batch=4)
        assert "reward_colourfulness" in report.log[0]
    (_, total, *_), (_, each, prompts, rewards, parts) = seen
    assert sorted(parts) == ["brightness", "colourfulness"]
    summed = [
        b + 0.01 * c for b, c in zip(parts["brightness"], parts["colourfulness"], strict=True)
    ]
    assert rewards == pytest.approx(summed, abs=1e-6)
    lists = [parts["brightness"], parts["colourfulness"]]
    assert each == pytest.approx(gdpo_advantages(prompts, lists, [1.0, 0.01]), abs=1e-12)
    assert total == pytest.approx(group_advantages_of(prompts, rewards), abs=1e-12)
    assert abs(total - each).max() > 1e-3
    assert world.weights(tmp_path / "sum") != world.weights(tmp_path / "gdpo")


@pytest.mark.parametrize("name", ["nft", "awm", "grpo"])
@pytest.mark.parametrize(
    ("fields", "reward", "problem"),
    [
        ({}, "brightness", "parts of the reward 'sum'.*'brightness' is not one"),
        ({}, {"name": "sum", "rewards": ["brightness"]}, "at least two"),
        ({"std": "group"}, TWO, "std = 'group' divides advantages of the total"),
    ],
)
def test_gdpo_needs_the_parts_of_a_sum(tmp_path, name, fields, reward, problem):
    spec = {**world.TRAINERS[name], "advantages": "gdpo", **fields}
    with pytest.raises(ValueError, match=problem) as error:
        world.tune(world.engine(), tmp_path, spec, reward, updates=1)
    assert "\n" not in str(error.value)


def test_levels_are_strata_of_their_law():
    """On a flow model, a variance-preserving one, and the sampler's own grid."""
    flow, vp = (
        Session(e, None, e.sampler, e.guidance, 8, (32, 32), 1)
        for e in (world.engine(tiny.sd3), world.engine(tiny.sd))
    )
    rows = batch(["a"], 2, 3, 0)

    def sigmas(session, law="uniform", count=4, shift=1.0, low=0.0, high=1.0):
        return [flow_sigma(v) for v in matching_levels(session, rows, law, count, shift, low, high)]

    plain = sigmas(flow)
    assert plain == sigmas(flow) == sorted(plain, reverse=True)
    assert all(1 - (k + 1) / 4 <= s <= 1 - k / 4 for k, s in enumerate(plain))
    shifted = sigmas(flow, shift=3.0)
    assert shifted == pytest.approx([3 * s / (1 + 2 * s) for s in plain], abs=1e-9)
    narrow = sigmas(flow, low=0.25, high=0.5)
    assert all(0.5 <= s <= 0.75 for s in narrow)
    normal = sigmas(flow, law="logit_normal")
    quantiles = [math.log(s / (1 - s)) for s in normal]
    assert quantiles[1] > 0 > quantiles[2] and quantiles[0] > 0.67 and quantiles[3] < -0.67
    assert sigmas(vp) == pytest.approx(plain, abs=2e-2)
    assert level_at(vp.pipeline.schedule, 1.0).t == 999
    grid = [flow_sigma(level) for level in flow.pipeline.grid(8, (32, 32))[:-1]]
    assert sigmas(flow, law="grid", count=8) == pytest.approx(grid)
    assert set(sigmas(flow, law="grid", low=0.01)) <= set(grid[1:])


@pytest.mark.parametrize("memory", ["on_policy", "slow", "fast"])
def test_old_weights_follow_at_their_pace(tmp_path, memory):
    """And not in an update that was skipped."""
    engine, calls = world.engine(), []

    def reward(images, prompts):
        calls.append(1)
        return images.mean((1, 2, 3)) * (math.nan if len(calls) == 3 else 1)

    spec = {**world.TRAINERS["nft"], "memory": memory}
    world.tune(engine, tmp_path, spec, reward, updates=4, checkpoint_every=1, keep=4)
    states = [_checkpoint(tmp_path, update) for update in (1, 2, 3, 4)]
    for number, (before, after) in enumerate(zip(states[:-1], states[1:], strict=True), 1):
        assert after.state["trainer"]["steps"] == [2, 2, 3][number - 1]
        decay = old_decay(after.state["trainer"]["steps"], memory)
        for key in (k for k in after.adapter if not k.startswith("old.")):
            moved = decay * before.adapter[f"old.{key}"] + (1 - decay) * after.adapter[key]
            wanted = before.adapter[f"old.{key}"] if number == 2 else moved
            torch.testing.assert_close(after.adapter[f"old.{key}"], wanted)


def _checkpoint(out, update):
    folder = out / "checkpoints" / f"{update:06d}"
    state = json.loads((folder / "state.json").read_text())
    return checkpoint.Checkpoint(update, load_file(folder / "adapter.safetensors"), {}, state)


def test_an_average_warms_up():
    assert [warm_decay(0.9, n) for n in (0, 1, 8, 10**6)] == [1 / 10, 2 / 11, 9 / 18, 0.9]


@pytest.mark.parametrize("trainer", ["nft", "awm"])
def test_an_average_is_evaluated_and_saved(tmp_path, trainer):
    engine = world.engine()
    report = world.tune(engine, tmp_path, trainer, updates=3, ema=0.9, eval_every=3)
    last, average = (
        sampler.models.lora_files.read_lora(tmp_path / name / sampler.models.lora_files.FILE)[0]
        for name in ("lora_last", "lora")
    )
    assert report.lora == tmp_path / "lora" and any(
        not torch.equal(last[k], average[k]) for k in last
    )
    sampler.models.lora.load_lora(engine, tmp_path)
    options = {"steps": 2, "height": 16, "width": 16, "sampler": {"name": "ab", "order": 2}}
    made = engine.generate(world.PROMPTS, seeds=[0, 1, 2], batch_size=2, output="tensor", **options)
    assert float(made.images.mean()) == pytest.approx(report.log[-1]["reward"], abs=1e-6)


def saved_bytes(function):
    """Bytes that a forward pass keeps for its backward pass, each storage once."""
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = function()
    return sum(seen.values()), kept


@pytest.mark.parametrize("name", ["nft", "awm"])
@pytest.mark.parametrize("build", [tiny.sd, tiny.sd3])
def test_an_update_keeps_the_graph_of_one_forward_pass(build, name):
    """At most 1.05 times a plain one of the same samples, whatever steps, levels and groups are."""
    engine = world.engine(build)
    network = engine.pipeline.network
    with adapted(network, 2, 2, ["to_q", "to_v"], 0) as adapter:
        averages = {name: Average.of(adapter.parameters) for name in ("old", "recent")}
        trained = Averaged(adapter, averages)
        for parameter in adapter.parameters.values():
            parameter.data.add_(0.01)
        sizes = []
        for steps, times, group in ((3, 2, 2), (6, 4, 4)):
            method = registry.build("sampler", "ddim")
            session = Session(
                engine, registry.build("reward", "brightness"), method, engine.guidance, steps,
                (16, 16), 2, trainable=trained,
            )  # fmt: skip
            trainer = registry.build("trainer", {"name": name, "times": times, "group_size": group})
            rows = batch(["a dog", "a cat"], 2 * group, 0, 0, group)
            matching = Matching(trainer, session)
            with torch.no_grad():
                collected = matching.collect(rows, [0, 1])
            weights = torch.ones(len(rows.prompts), dtype=torch.float64)
            losses = matching.losses(rows, collected, weights)
            sizes.append(saved_bytes(lambda losses=losses: next(losses))[0])
        level = session.pipeline.grid(3, (16, 16))[1]
        x = torch.randn_like(collected.x0)

        def plain():
            pred = matching._predict(collected, x, level)
            return (sampler.settle(pred.out) - x).square().flatten(1).mean(1)

        bare, _ = saved_bytes(plain)
    assert max(sizes) <= 1.05 * bare + 16 * x.numel() * 4
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


@pytest.mark.parametrize("name", ["nft", "awm"])
def test_the_share_of_equal_groups_is_logged(tmp_path, name):
    """One of three prompts has equal rewards; its images are trained on all the same."""

    def reward(images, prompts):
        return torch.tensor(
            [0.1 if p == "a dog" else v for p, v in zip(prompts, images[:, 0, 0, 0], strict=True)]
        )

    spec = {**world.TRAINERS[name], "passes": 1}
    (record,) = world.tune(world.engine(), tmp_path, spec, reward, updates=1, batch=6).log
    assert record["flat_groups"] == pytest.approx(1 / 3) and record["grad_norm"] > 0


@pytest.mark.parametrize("name", ["nft", "grpo"])
def test_groups_of_gdpo_are_equal_where_every_part_is(tmp_path, name):
    """Two parts that cancel: their sum is the same for all images, and each of them teaches."""
    parts = {"name": "sum", "rewards": ["brightness", "brightness"], "weights": [1.0, -1.0]}
    for combine, flat in (("sum", 1.0), ("gdpo", 0.0)):
        spec = {**world.TRAINERS[name], "advantages": combine}
        out = tmp_path / combine
        (record,) = world.tune(world.engine(), out, spec, parts, updates=1, batch=4).log
        assert record["flat_groups"] == flat


@pytest.mark.parametrize(("name", "average"), [("nft", ""), ("awm", "each"), ("awm", "levels")])
def test_an_update_evaluates_what_its_loss_needs(name, average):
    """On policy and without KL the same calls as plain training, one forward pass per level.

    References have no graph: the base model's with a KL, those of old weights that are others.
    """
    engine, calls, rows = world.engine(), [], batch(["a dog"], 2, 0, 0, 2)
    network = engine.pipeline.network
    forward = network.forward

    def counted(*arguments, **options):
        x = arguments[0] if arguments else options["sample"]
        calls.append((len(x), torch.is_grad_enabled()))
        return forward(*arguments, **options)

    method, reward = registry.build("sampler", "ddim"), registry.build("reward", "brightness")
    with adapted(network, 2, 2, ["to_q"], 0) as adapter:
        trained = Averaged(adapter, {"old": Average.of(adapter.parameters)})
        session = Session(
            engine, reward, method, engine.guidance, 3, (16, 16), 2, trainable=trained
        )
        with torch.no_grad():
            collected = sampled(session, rows, [0, 1])
        network.forward = counted
        seen = {}
        for moved in (False, True):
            for kl in (0.0, 1e-3):
                spec = {"name": name, "times": 3, "kl": kl}
                spec |= {"kl_ema": 0.0, "average": average} if name == "awm" else {}
                trainer = registry.build("trainer", spec)
                calls.clear()
                for loss, _ in Matching(trainer, session).losses(rows, collected, torch.ones(2)):
                    loss.sum().backward()
                assert {count for count, _ in calls} == {2}
                grads = [grad for _, grad in calls]
                seen[moved, kl > 0] = grads.count(True), grads.count(False)
            for parameter in adapter.parameters.values():
                parameter.data.add_(0.01)
        network.forward = forward
    joint = 6 if average == "levels" else 0  # the mean log-ratio of all levels comes first
    assert seen == {
        (False, False): (3, 0), (False, True): (3, 3),
        (True, False): (3, 3 + joint), (True, True): (3, 6 + joint),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("trainer", "build", "problem"),
    [
        (
            {"name": "nft", "group_size": 1},
            tiny.sd,
            "group_size = 1 must be an integer of at least",
        ),
        ({"name": "awm", "low": 0.5, "high": 0.5}, tiny.sd, "low = 0.5 must be below high = 0.5"),
        (
            {"name": "nft", "low": 0.9, "group_size": 2},
            tiny.sd,
            "No level of the 2 steps lies in low = 0.9",
        ),
        ("nft", tiny2.lcm, "matching blurs few-step models"),
        ({"name": "nft", "group_size": 3}, tiny.sd, "multiple of 3"),
        ({"name": "nft", "mode": "most"}, tiny.sd, "mode = 'most'"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(tmp_path, trainer, build, problem):
    with pytest.raises((ValueError, sampler.SamplerError), match=problem) as error:
        world.tune(world.engine(build), tmp_path, trainer, updates=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("trainer", ["nft", "awm"])
def test_it_learns_from_a_reward_that_is_a_black_box(tmp_path, trainer, sign):
    """More than 3 standard errors, of the same prompts and seeds; brighter or darker as asked."""
    engine = world.engine(tiny.sd, tiny_vae=True)

    def reward(images, prompts):
        return sign * images.numpy().mean((1, 2, 3))

    spec = {"name": trainer, "group_size": 4, "times": 2, "kl": 0.0}
    options = {"batch": 8, "steps": 3, "lr": 1e-2, "guidance": "none", "rank": 4, "alpha": 8}
    world.tune(engine, tmp_path, spec, reward, updates=25, **options)
    scores = []
    for _ in range(2):
        made = engine.generate(
            world.PROMPTS * 6, seeds=list(range(18)), steps=3, height=16, width=16,
            sampler={"name": "ab", "order": 2}, guidance="none", output="tensor",
        )  # fmt: skip
        scores.append(sign * made.images.mean((1, 2, 3)))
        if len(scores) == 1:
            sampler.models.lora.load_lora(engine, tmp_path)
    gain = scores[1] - scores[0]
    assert gain.mean() > 3 * gain.std() / math.sqrt(len(gain))


def test_the_kl_of_nft_is_one_number_whatever_the_network_predicts():
    """Of velocities eps − x0; awm takes it of the outputs, as its log-probability."""
    torch.manual_seed(0)
    level, (x, gap) = Level(500, 0.8, 0.6), torch.randn(2, 4, 3, dtype=torch.float64)
    pairs = {}
    for kind in ("eps", "v", "x0"):
        first = Prediction.from_x0(x, torch.zeros_like(x), level)
        second = Prediction.from_x0(x, gap, level)
        outs = [sampler.settle(getattr(p, kind)) for p in (first, second)]
        pairs[kind] = [Prediction.of(kind, x, out, level) for out in outs]
    wanted = ((1 + 0.8 / 0.6) * gap).square().mean(1)  # eps = (x − alpha·x0)/sigma
    for new, base in pairs.values():
        torch.testing.assert_close(NFT().pull(new, base), wanted)
    torch.testing.assert_close(AWM().pull(*pairs["x0"]), gap.square().mean(1))
