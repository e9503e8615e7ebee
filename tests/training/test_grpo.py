"""grpo: ratios, losses and KL against their formulas, windows, resume, storage, refusals."""

import math
from dataclasses import replace

import pytest
import torch
from sampler_kernels import map_tree

import sampler
from sampler import registry
from sampler.core.noise import Noise
from sampler.core.trajectory import Run
from sampler.engine import Engine
from sampler.models.trainable_lora import adapted
from sampler.objectives import sde_window
from sampler.training.batches import batch
from sampler.training.policy.group import Graded, GroupPolicy, action_loss
from sampler.training.policy.grpo import GRPO
from sampler.training.policy.rollout import Action, Policy
from sampler.training.policy.window import NoiseWindow
from sampler.training.session import Session
from sampler.types import Level, Snapshot, spans
from tests import tiny, tiny_transformers
from tests.training import world
from tests.training.test_matching import saved_bytes

NOW, NEXT = Level(900, 0.1, 0.9), Level(600, 0.4, 0.6)
S = 0.6 * math.sin(0.7 * math.pi / 2)
ADVANTAGE = torch.tensor([2.0, -1.0, 0.5, -3.0], dtype=torch.float64)
BASE = (0.1, 0.4)


class Weights:
    """Two numbers, trained; the base model's are others."""

    def __init__(self, values):
        self.theta = torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))
        self.kept = self.theta.data

    def disable(self):
        self.theta.data = torch.tensor(BASE, dtype=torch.float64)

    def enable(self):
        self.theta.data = self.kept


def velocity(theta, x, level):
    return theta[0] * x + theta[1] * level.sigma


def mean_of(theta, x):
    v = velocity(theta, x, NOW)
    x0, eps = x - NOW.sigma * v, x + NOW.alpha * v
    return NEXT.alpha * x0 + math.sqrt(NEXT.sigma**2 - S**2) * eps


def toy(trainer, new, old=(0.3, -0.2)):
    """(loss [4], metrics, weights, x, noise) of one action of cps, a linear velocity."""
    weights = Weights(new)

    def network(x, level=None, cond=None):
        return velocity(weights.theta, x, level)

    engine = Engine(sampler.denoiser(network, "velocity"), sampler="cps")
    session = Session(
        engine, None, engine.sampler, engine.guidance, 2, (16, 16), 4, trainable=weights
    )
    torch.manual_seed(0)
    x = torch.randn(4, 3, dtype=torch.float64)
    start = Snapshot(0, x, (), (), (5, 6, 7, 8), (0,) * 4)
    levels = (NOW, NEXT, Level(0, 1.0, 0.0))
    run = Run(start, levels, sampler.Cond(), engine.sampler, engine.guidance)
    z = Noise(start.seeds).draw(0, x)
    after = mean_of(torch.tensor(old, dtype=torch.float64), x) + S * z
    log_old = -0.5 * z.square().mean(1) - math.log(S) - 0.5 * math.log(2 * math.pi)
    action = Action(start, after, log_old)
    loss, metrics = action_loss(trainer, Policy(trainer, session), run, action, ADVANTAGE)
    return loss, metrics, weights, x, z


@pytest.mark.parametrize(
    "fields",
    [
        {"ratio": "plain", "clip_range": 0.005},
        {"ratio": "guard", "clip_range": 0.005},
        {"ratio": "guard", "clip_range": 0.005, "reweigh": True},
        {"ratio": "dppo", "threshold": 1e-3},
        {"ratio": "plain", "kl_beta": 0.7},
        {"ratio": "guard", "kl_beta": 0.7, "kl_space": "v"},
    ],
)
def test_gradients_are_those_of_the_formulas(fields):
    """Off policy, on samples of different x: some are clipped, some are not."""
    old = (0.3, -0.2)
    trainer = GRPO(**fields)
    loss, metrics, weights, x, z = toy(trainer, (0.36, -0.22))
    (ours,) = torch.autograd.grad(loss.sum(), weights.theta)
    theta = weights.theta
    mean, before = mean_of(theta, x), mean_of(torch.tensor(old, dtype=torch.float64), x)
    gap = mean - before
    log_ratio = ((z * S).square() - (before + S * z - mean).square()).mean(1) / (2 * S * S)
    if trainer.ratio == "guard":
        log_ratio = (z * gap).mean(1)
    ratio, a = log_ratio.exp(), ADVANTAGE
    if trainer.ratio == "dppo":
        away = (gap.square().mean(1) / (2 * S * S) >= 1e-3) & ((ratio - 1) * a > 0)
        wanted, clipped = torch.where(away, 0.0, -a * ratio), away
    else:
        clip = trainer.clip_range
        wanted = torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip, 1 + clip))
        clipped = (ratio - 1).abs() > clip
    wanted = wanted / 0.3 if trainer.reweigh else wanted
    if trainer.kl_beta:
        kl = (mean - mean_of(BASE, x)).square().mean(1) / (2 * S * S)
        if trainer.kl_space == "v":
            kl = (velocity(theta, x, NOW) - velocity(BASE, x, NOW)).square().mean(1)
        wanted = wanted + 0.7 * kl
    torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-9)
    (wanted,) = torch.autograd.grad(wanted.sum(), theta)
    torch.testing.assert_close(ours, wanted, rtol=1e-8, atol=1e-9)
    assert metrics["clipped"].bool().tolist() == clipped.tolist()
    if "clip_range" in fields or trainer.ratio == "dppo":
        assert 0 < clipped.sum() < 4


FAMILIES = (
    *(getattr(tiny, name) for name in ("sd", "sdxl", "sd3", "pixart", "flux")),
    *(getattr(tiny_transformers, name) for name in ("flux2", "sana", "z_image", "qwen_image")),
    *(getattr(tiny_transformers, name) for name in ("lumina2", "aura_flow", "hunyuan_dit")),
    tiny_transformers.kolors,
)


@pytest.mark.parametrize(
    ("build", "ratio"),
    [*((build, "guard") for build in FAMILIES), (tiny.sd, "dppo"), (tiny.sd3, "plain")],
)
def test_the_ratio_at_unchanged_weights_is_exactly_one(tmp_path, build, ratio, monkeypatch):
    """Two micro-batches, a whole one for each optimiser step; a LoRA that is not zero.

    That of the guard, and the plain one for the same actions.
    """
    plain = []

    def both(trainer, *arguments):
        other = replace(trainer, ratio="plain", reweigh=False)
        plain.append(action_loss(other, *arguments)[1]["ratio"])
        return action_loss(trainer, *arguments)

    monkeypatch.setattr("sampler.training.policy.group.action_loss", both)
    spec = {**world.TRAINERS["grpo"], "passes": 1, "ratio": ratio}
    size = {"height": 32, "width": 32} if build is tiny_transformers.sana else {}
    report = world.tune(world.engine(build), tmp_path, spec, updates=2, batch=4, micro=2, **size)
    for record in report.log:
        assert record["ratio"] == 1.0 and record["ratio_std"] == 0.0
        assert record["ratio_first"] == 0.0 and record["clipped"] == 0.0
        assert record["grad_norm"] > 0
    assert len(plain) == 4 and bool((torch.cat(plain) == 1).all())


@pytest.mark.parametrize("ratio", ["plain", "guard"])
@pytest.mark.parametrize("build", [tiny.sd, tiny.sd3])
def test_the_ratio_under_autocast_is_told(tmp_path, build, ratio):
    spec = {**world.TRAINERS["grpo"], "passes": 1, "ratio": ratio}
    options = {"batch": 4, "micro": 2, "mixed_precision": "bf16"}
    for record in world.tune(world.engine(build), tmp_path, spec, updates=2, **options).log:
        assert record["ratio_first"] <= 1e-3 and abs(record["ratio"] - 1) <= 1e-3
        assert record["grad_norm"] > 0


@pytest.mark.parametrize(
    ("rule", "rows"),
    [
        ({"name": "adaptive", "threshold": -1.0, "rule": {"name": "cfg", "scale": 4}}, [8, 4, 4]),
        ({"name": "apg", "momentum": -0.5, "scale": 4}, [8, 8, 8]),
        ({"name": "forecast", "policy": [1, 1, 1, 0, 1, 1, 1, 1]}, [8] * 6),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_the_state_of_a_rule_is_replayed(tmp_path, monkeypatch, rule, rows):
    """Its branches are those of the roll-out, also once the weights are others.

    A step that a rule forecasts has no gradient, and no evaluation.
    """
    engine, calls, ratios = world.engine(), [], []
    forward = engine.pipeline.network.forward

    def counted(*arguments, **options):
        x = arguments[0] if arguments else options["sample"]
        calls.append((len(x), torch.is_grad_enabled()))
        return forward(*arguments, **options)

    def watched(*arguments):
        loss, metrics = action_loss(*arguments)
        ratios.append(metrics["ratio"])
        return loss, metrics

    engine.pipeline.network.forward = counted
    monkeypatch.setattr("sampler.training.policy.group.action_loss", watched)
    spec = {"name": "grpo", "group_size": 4, "window": None, "passes": 2, "ratio": "plain"}
    steps = 4 if len(rows) == 3 else 8
    world.tune(engine, tmp_path, spec, updates=1, batch=4, steps=steps, guidance=rule, lr=0.1)
    assert [count for count, grad in calls if not grad][: len(rows)] == rows
    assert [count for count, grad in calls if grad] == rows * 2  # the last step draws no noise
    first, second = torch.cat(ratios[: steps - 1]), torch.cat(ratios[steps - 1 :])
    assert bool((first == 1).all()) and not (second == 1).all()


def test_only_the_first_share_of_an_update_has_the_first_ratio(tmp_path):
    spec = {**world.TRAINERS["grpo"], "minibatches": 2}
    (record,) = world.tune(world.engine(), tmp_path, spec, updates=1, batch=4).log
    assert record["ratio_first"] == 0.0 and record["ratio_std"] > 0


def session_of(engine, method, steps, **options):
    return Session(
        engine, registry.build("reward", "brightness"), registry.build("sampler", method),
        engine.guidance, steps, (16, 16), 4, **options,
    )  # fmt: skip


def test_windows_are_functions_of_the_update():
    session = session_of(world.engine(), "cps", 8)

    def steps(update, **fields):
        return NoiseWindow(**fields).applied(session, update).method.noisy

    moving = {"size": 2, "every": 3}
    assert [steps(u, **moving) for u in (0, 2, 3, 6)] == [(0, 2), (0, 2), (1, 3), (2, 4)]
    assert steps(9, **moving) == (3, 4) and steps(15, **moving) == (0, 2)
    still = {**moving, "roll_back": False}
    assert steps(100, **still) == (2, 4)
    late = [steps(u, size=2, every=1, within=1.0, roll_back=False) for u in range(9)]
    assert late[:6] == [(u, u + 2) for u in range(6)] and late[-1] == (5, 7)  # cps ends without
    drawn = [steps(u, size=2, strategy="random")[0] for u in range(12)]
    assert drawn == [sde_window(u, 2, 4, 25, "random")[0] for u in range(12)]
    assert set(drawn) == {0, 1, 2}


@pytest.mark.parametrize("offload", [False, True])
def test_a_trajectory_keeps_the_latents_of_its_window_alone(offload, monkeypatch):
    """At most window + 1 latents of a sample, whatever the number of steps, in main memory too.

    Copies stand for what is moved there.
    """
    moved = []

    def move(tree, device):
        def copied(leaf):
            if not isinstance(leaf, torch.Tensor) or any(leaf is one for one in moved):
                return leaf
            moved.append(leaf.clone())
            return moved[-1]

        return map_tree(copied, tree)

    if offload:
        monkeypatch.setattr("sampler.training.policy.rollout.to_device", move)
    engine = world.engine()
    with adapted(engine.pipeline.network, 2, 2, ["to_q"], 0) as adapter, torch.no_grad():
        trainer = GRPO(group_size=2, window={"size": 2, "every": 1}, offload=offload)
        session = session_of(engine, "cps", 50, trainable=adapter)
        session = NoiseWindow.of(trainer.window).applied(session, 3)
        rows = batch(["a dog", "a cat"], 4, 3, 0, 2)
        found = GroupPolicy(trainer, Policy(trainer, session)).collect(rows, rows.rows)
    assert [action.before.index for action in found.actions] == [3, 4]
    latents = [found.x0, found.run.snapshot.x, found.final.x]
    latents += [x for action in found.actions for x in (action.before.x, action.after)]
    stored = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in latents}
    assert sum(stored.values()) <= 3.2 * found.actions[0].after.nbytes
    assert not offload or any(found.actions[1].before.x is one for one in moved)


@pytest.mark.parametrize("ratio", ["plain", "guard"])
def test_an_update_keeps_the_graph_of_one_step(ratio):
    """At most 1.05 times that of one guided evaluation, whatever steps and window are."""
    engine, sizes = world.engine(), []
    rows = batch(["a dog", "a cat"], 4, 0, 0, 2)
    with adapted(engine.pipeline.network, 2, 2, ["to_q", "to_v"], 0) as adapter:
        for parameter in adapter.parameters.values():
            parameter.data.add_(0.01)
        for steps, size in ((3, 1), (6, 3)):
            trainer = GRPO(group_size=2, ratio=ratio, window={"size": size, "within": 1.0})
            session = session_of(engine, "cps", steps, trainable=adapter)
            session = NoiseWindow.of(trainer.window).applied(session, 0)
            method = GroupPolicy(trainer, Policy(trainer, session))
            with torch.no_grad():
                found = method.collect(rows, rows.rows)
            losses = method.losses(rows, found, Graded(torch.ones(4)))
            sizes.append(saved_bytes(lambda losses=losses: next(losses))[0])
        run, before = found.run, found.actions[0].before
        span = spans(run.levels)[before.index]

        def plain():
            pred = session.engine.predict(before, span, run.cond, run.rule)[0]
            return (sampler.settle(pred.out) - before.x).square().flatten(1).mean(1)

        bare, _ = saved_bytes(plain)
    assert max(sizes) <= 1.05 * bare + 16 * before.x.numel() * 4
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def test_same_noise_is_one_start_for_a_group():
    engine = world.engine()
    rows = batch(["a dog", "a cat"], 4, 0, 0, 2)
    for same in (False, True):
        trainer = GRPO(group_size=2, same_noise=same, window=None)
        method = GroupPolicy(trainer, Policy(trainer, session_of(engine, "cps", 2)))
        with torch.no_grad():
            (first, *_) = method.collect(rows, rows.rows).actions
        x = first.before.x
        assert torch.equal(x[0], x[1]) == torch.equal(x[2], x[3]) == same
        assert not torch.equal(x[0], x[2]) and not torch.equal(first.after[0], first.after[1])


def test_groups_of_equal_rewards_cost_no_evaluation(tmp_path):
    """Nor do they move the weights; with a KL they are evaluated."""
    engine, calls = world.engine(), []
    forward = engine.pipeline.network.forward

    def counted(*arguments, **options):
        calls.append(torch.is_grad_enabled())
        return forward(*arguments, **options)

    engine.pipeline.network.forward = counted

    def reward(images, prompts):
        return torch.full((len(images),), 0.1)

    spec = {**world.TRAINERS["grpo"], "group_size": 4}
    options = {"batch": 4, "weight_decay": 0.0, "updates": 1}
    (record,) = world.tune(engine, tmp_path / "plain", spec, reward, **options).log
    assert record["flat_groups"] == 1.0 and record["grad_norm"] == 0.0 and not any(calls)
    (record,) = world.tune(engine, tmp_path / "kl", {**spec, "kl_beta": 1.0}, reward, **options).log
    assert record["kl"] >= 0.0 and any(calls)


def test_a_run_that_is_cut_between_windows_goes_on_bit_equal(tmp_path):
    engine = world.engine()
    spec = {**world.TRAINERS["grpo"], "window": {"size": 1, "every": 1, "within": 0.75}}
    options = {"steps": 4, "guidance": "none"}
    world.tune(engine, tmp_path / "whole", spec, updates=3, **options)
    for updates in (1, 3):
        world.tune(engine, tmp_path / "cut", spec, updates=updates, **options)
    assert world.curve(tmp_path / "cut") == world.curve(tmp_path / "whole")
    assert world.weights(tmp_path / "cut") == world.weights(tmp_path / "whole")


def test_a_ratio_that_rounding_moves_is_told(tmp_path, monkeypatch):
    trainer = GRPO(window=None)
    method = GroupPolicy(trainer, Policy(trainer, session_of(world.engine(), "cps", 2)))
    off = torch.tensor([1.0, 1.002])
    with pytest.warns(
        UserWarning, match="off 1 by 2.0e-03 .* torch.float32 and micro-batches of 2"
    ):
        assert method._first_ratio(off) == pytest.approx(2e-3, rel=1e-3)
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="torch.bfloat16"):
        method._first_ratio(off)


@pytest.mark.parametrize(
    ("fields", "settings", "problem"),
    [
        ({"group_size": 1}, {}, "group_size = 1 must be an integer of at least 2"),
        ({"window": {"size": 3}}, {"steps": 4}, "window.size = 3 is longer than the 2 steps"),
        ({"window": {"size": 0}}, {}, "grpo: window: size = 0 must be"),
        ({"window": {"siz": 1}}, {}, "no key 'siz' .did you mean 'size'"),
        ({}, {"sampler": "ddim"}, "draws none; use cps, flow_sde"),
        ({}, {"sampler": {"name": "ddim", "eta": 1.0}}, "'ddim' cannot draw noise in a window"),
        ({}, {"sampler": {"name": "cps", "noisy": [0, 1]}}, "noisy = \\[0, 1\\] choose the steps"),
        ({}, {"sampler": "flow_sde"}, "flow_sde needs a flow-matching model"),
        ({"ratio": "plain", "reweigh": True}, {}, "reweigh belongs to ratio = 'guard'"),
        ({"group_size": 4}, {}, "multiple of 4"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(tmp_path, monkeypatch, fields, settings, problem):
    engine = world.engine()

    def never(*arguments, **options):
        raise AssertionError("the network was called")

    monkeypatch.setattr(engine.pipeline, "forward", never)
    spec = {**world.TRAINERS["grpo"], **fields}
    with pytest.raises((ValueError, sampler.SamplerError), match=problem) as error:
        world.tune(engine, tmp_path, spec, updates=1, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sign", [1, -1])
def test_it_learns_from_a_reward_that_is_a_black_box(tmp_path, sign):
    """More than 3 standard errors, of the same prompts and seeds; brighter or darker as asked."""
    engine = world.engine(tiny.sd, tiny_vae=True)

    def reward(images, prompts):
        return sign * images.numpy().mean((1, 2, 3))

    spec = {"name": "grpo", "group_size": 16, "window": {"within": 1.0}}
    options = {"batch": 48, "steps": 3, "lr": 3e-2, "guidance": "none", "rank": 4, "alpha": 8}
    world.tune(engine, tmp_path, spec, reward, updates=9, **options)
    scores = []
    for _ in range(2):
        made = engine.generate(
            world.PROMPTS * 6, seeds=list(range(18)), steps=3, height=16, width=16,
            sampler="cps", guidance="none", output="tensor",
        )  # fmt: skip
        scores.append(sign * made.images.mean((1, 2, 3)))
        if len(scores) == 1:
            sampler.models.lora.load_lora(engine, tmp_path)
    gain = scores[1] - scores[0]
    assert gain.mean() > 3 * gain.std() / math.sqrt(len(gain))
