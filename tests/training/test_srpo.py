"""SRPO: the authors' gradients, levels, control words, memory, refusals, and that it learns."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import sampler
from sampler import objectives, registry
from sampler.core.trajectory import Run
from sampler.engine import Engine
from sampler.models.trainable_lora import adapted
from sampler.rewards.base import RewardBase
from sampler.training.batches import batch
from sampler.training.matching.levels import flow_sigma, level_at
from sampler.training.matching.update import predict_at
from sampler.training.online import Collected, sampled
from sampler.training.session import Session
from sampler.training.srpo import SRPO, Step
from sampler.types import Level
from tests import tiny
from tests.training import world
from tests.training.test_matching import saved_bytes
from tests.training.test_objectives import cases, near

FLOW = sampler.Schedule.flow({"num_train_timesteps": 1000})


class Texts(RewardBase):
    """Scores of the first list of texts and of the second, whatever they say; keeps the lists."""

    name = "texts"

    def __init__(self, *scores):
        self.given, self.functions = [], scores

    def __call__(self, images, prompts):
        return self.functions[0](images)

    def of_texts(self, images, texts):
        self.given.append([list(one) for one in texts])
        return [function(images) for function in self.functions[: len(texts)]]


def _packed(z):
    """[B, C, H, W] as [B, L, 4·C], and back."""
    b, c, h, w = z.shape
    patches = z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, (h // 2) * (w // 2), 4 * c)


def _unpacked(z, side):
    b, _, d = z.shape
    patches = z.view(b, side // 2, side // 2, d // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(b, d // 4, side, side)


@pytest.mark.parametrize(("about", "a"), cases("srpo"))
def test_scores_and_gradients_are_the_authors(about, a):
    first, second = (a[name].clone().requires_grad_() for name in ("W1", "W2"))
    side = about["height"] // 8

    def network(x, level, cond):
        told = int(1000 * level.sigma) / 1000
        z = torch.tanh(_packed(x) @ first * (1 + told) + a["enc"].mean()) @ second
        return _unpacked(z, side)

    def decode(x):
        found = (x / 0.3611 + 0.1159)[:, :3].repeat_interleave(8, -1).repeat_interleave(8, -2)
        return (0.3 * found / 2 + 0.5).clamp(0, 1)

    pipeline = SimpleNamespace(schedule=FLOW, decode=decode, device=torch.device("cpu"))
    engine = Engine(sampler.denoiser(network, "velocity"), pipeline)
    reward = Texts(
        lambda images: -(images - a["target"]).square().flatten(1).mean(1),
        lambda images: -0.1 * (images + a["target"]).square().flatten(1).mean(1) - 1,
    )
    steps = about["sampling_steps"]
    session = Session(engine, reward, engine.sampler, engine.guidance, steps, (32, 32), 1)
    flow = torch.linspace(1, 0, steps + 1, dtype=torch.float64)  # rounded as theirs: see told
    flow = about["shift"] * flow / (1 + (about["shift"] - 1) * flow)
    grid = [Level(1000 * s, 1 - s, s) for s in flow.tolist()]
    snapshot, levels = engine.start(a["noise"], tuple(grid), sampler.Cond(), seeds=[0])
    run = Run(snapshot, levels, sampler.Cond(), engine.sampler, engine.guidance)
    with torch.no_grad():
        x0 = engine.run_to_end(*run)[0]
    found = Collected(rows=[0], run=run, x0=x0, reward=torch.zeros(1), parts={}, nfe=0)
    low, high = (i / about["vis_sampling_step"] for i in about["train_timestep"])
    trainer = SRPO(
        low=low,
        high=high,
        shift=about["shift"],
        k_denoise=tuple(about["discount_pos"]),
        k_inversion=tuple(about["discount_inv"]),
        gap=1 - about["groundtruth_ratio"],
    )
    made = trainer.steps(about["mid_timestep"], trainer.sigmas(FLOW))
    assert [("inversion" if s.inversion else "denoise") for s in made] == about["order"]
    assert [s.k for s in made] == pytest.approx(about["ks"], rel=1e-9)
    scores, total = [], torch.zeros(1, dtype=torch.float64)
    for step in made:
        score = trainer.scores(session, trainer.aligned(session, found, step), ["a"], step, 0)
        scores.append(float(score.detach()))
        total = total + trainer.loss_of(score) / len(made)
    assert scores == pytest.approx(about["scores"], rel=1e-9)
    gradients = torch.autograd.grad(total.sum(), [first, second])
    for ours, name in zip(gradients, ("W1", "W2"), strict=True):
        near(ours, a[f"grad_{name}"], 1e-7)


@pytest.fixture(scope="module", params=[tiny.sd, tiny.sd3])
def trained(request):
    """(session, batch, sampled images) of a tiny pipeline with a LoRA that is not zero."""
    engine = world.engine(request.param)
    with adapted(engine.pipeline.network, 2, 2, ["to_q", "to_v"], 0) as adapter:
        for number, parameter in enumerate(adapter.parameters.values()):
            torch.manual_seed(number)
            parameter.data = 0.1 * torch.randn_like(parameter)
        reward, method = registry.build("reward", "brightness"), registry.build("sampler", "ddim")
        session = Session(
            engine, reward, method, engine.guidance, 3, (16, 16), 2, trainable=adapter
        )
        rows = batch(["a dog", "a cat"], 2, 0, 0)
        with torch.no_grad():
            found = sampled(session, rows, [0, 1])
        yield session, rows, found


@pytest.mark.parametrize(("start", "end"), [(0.9, 0.7), (0.5, 0.65)])
def test_the_image_is_that_of_one_euler_step_without_its_noise(trained, start, end):
    """For a model of any process, in the terms of a flow."""
    session, _, found = trained
    ours = SRPO(positive=(), negative=()).aligned(session, found, Step(False, start, end, 0.0))
    level, noise = level_at(session.pipeline.schedule, start), found.run.snapshot.x
    x = level.alpha * found.x0 + level.sigma * noise
    d = predict_at(session, found.run.cond, found.run.snapshot.seeds, x, level).x0.tensor()
    a = flow_sigma(level)
    velocity = noise - found.x0 + (found.x0 - d) / a
    wanted = objectives.direct_align(velocity, found.x0, noise, a, end)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    assert ours.requires_grad and not torch.allclose(ours, found.x0)


def test_levels_are_those_that_a_model_has():
    """A range beyond the noisiest level of a table starts there."""
    schedule = world.engine(tiny.sd).pipeline.schedule
    top = flow_sigma(level_at(schedule, 1.0))
    found = SRPO(low=0.0, high=0.5).sigmas(schedule)
    assert found[0] == pytest.approx(top) and found[-1] == pytest.approx(0.75, rel=1e-4)
    assert found == sorted(found, reverse=True) and len(found) == 1000
    flow = SRPO().sigmas(FLOW)
    assert (flow[0], flow[-1]) == pytest.approx((2.7 / 2.8, 0.75))


@pytest.mark.parametrize("drawn", [5, 40, 500, 995])
def test_both_branches_end_at_the_same_level(drawn):
    sigmas = SRPO().sigmas(FLOW)
    denoise, inversion = SRPO().steps(drawn, sigmas)
    assert denoise.end == pytest.approx(inversion.end, abs=3e-4)  # equal but at the clean end
    assert inversion.start < inversion.end and denoise.end < denoise.start
    assert max(denoise.start - denoise.end, denoise.end - inversion.start) <= 0.11 * (
        sigmas[0] - sigmas[-1]
    )
    assert 0.1 <= denoise.k <= 0.25 and 0.01 <= inversion.k <= 0.3
    assert len(SRPO(inversion=False).steps(drawn, sigmas)) == 1
    assert len(SRPO(positive=(), negative=()).steps(drawn, sigmas)) == 1


def test_control_words_take_turns_and_change_places(trained):
    session, _, found = trained
    reward = Texts(lambda i: i.mean((1, 2, 3)), lambda i: 0.1 * i.mean((1, 2, 3)))
    session = replace(session, reward=reward)
    trainer = SRPO(positive=("Real", "Detail"), negative=("Oil",))
    for update, inversion in ((0, False), (1, False), (1, True)):
        trainer.scores(session, found.x0, ["a dog", "a cat"], Step(inversion, 0, 0, 0.1), update)
    assert reward.given == [
        [["Real. a dog", "Real. a cat"], ["Oil. a dog", "Oil. a cat"]],
        [["Detail. a dog", "Detail. a cat"], ["Oil. a dog", "Oil. a cat"]],
        [["Oil. a dog", "Oil. a cat"], ["Detail. a dog", "Detail. a cat"]],
    ]


def test_an_update_keeps_one_evaluation_and_one_decoding(trained):
    """Whatever the number of steps is; recomputing keeps less."""
    session, rows, _ = trained
    trainer, kept = SRPO(positive=(), negative=(), checkpointing=False), {}
    for steps in (2, 12):
        updates = trainer.updates(replace(session, steps=steps), rows, None)
        kept[steps], part = saved_bytes(lambda updates=updates: next(updates))
        assert part.step and part.loss.requires_grad
    found = sampled(session, rows, [0, 1])
    bare, _ = saved_bytes(lambda: _plain(session, found))
    assert kept[2] == pytest.approx(kept[12], rel=0.01)
    assert kept[12] <= 1.05 * bare
    again = replace(trainer, checkpointing=True).updates(session, rows, None)
    assert saved_bytes(lambda: next(again))[0] <= 0.5 * kept[12]


def _plain(session, found):
    level = level_at(session.pipeline.schedule, 0.8)
    x = level.alpha * found.x0.detach() + level.sigma * found.run.snapshot.x
    d = predict_at(session, found.run.cond, found.run.snapshot.seeds, x, level).x0.tensor()
    return session.score(session.decoder("hard")(d), ["a dog", "a cat"]).total.sum()


def test_recomputing_changes_nothing(trained):
    session, rows, _ = trained
    grads = []
    for checkpointing in (True, False):
        trainer = SRPO(positive=(), negative=(), checkpointing=checkpointing)
        (part,) = trainer.updates(session, rows, None)
        parameters = list(session.trainable.parameters.values())
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(part.loss, parameters)]))
    assert torch.equal(*grads) and grads[0].norm() > 0


@pytest.mark.parametrize(
    ("fields", "reward", "problem"),
    [
        ({}, "compressibility", "needs a differentiable reward; 'compressibility' is not"),
        ({}, "brightness", "control words do not change the score of 'brightness'"),
        ({}, {"name": "classifier", "label": "dog"}, "do not change the score of 'classifier'"),
        ({}, "classifier", "do not change the score of 'classifier'"),
        ({"positive": []}, "brightness", "a control word each, or none"),
        ({"low": 0.5}, "brightness", "low = 0.5 must be below high = 0.5"),
        ({"gap": 0}, "brightness", "gap"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence_before_sampling(
    tmp_path, monkeypatch, fields, reward, problem
):
    engine = world.engine()

    def never(*args, **kwargs):
        raise AssertionError("the network was called")

    monkeypatch.setattr(engine.pipeline, "forward", never)
    with pytest.raises((ValueError, sampler.SamplerError), match=problem) as error:
        world.tune(engine, tmp_path, {"name": "srpo", **fields}, reward, updates=1)
    assert "\n" not in str(error.value)


def test_scores_above_the_threshold_from_the_start_are_told(tmp_path, recwarn):
    """Of all images of the first update: nothing would be learned of any of them."""

    def reward(images, prompts):
        return images.mean((1, 2, 3)) + torch.tensor([4.0 * (p == "a dog") for p in prompts])

    reward.differentiable = True
    spec = {"name": "srpo", "positive": [], "negative": [], "threshold": 0.7}
    world.tune(world.engine(), tmp_path / "a", spec, reward, updates=1, batch=3, micro=1)
    assert not [w for w in recwarn if "srpo" in str(w.message)]
    spec["threshold"] = -1.0
    with pytest.warns(UserWarning, match=r"scores begin at .*, above threshold = -1, where they"):
        report = world.tune(world.engine(), tmp_path / "b", spec, reward, updates=1, micro=1)
    assert report.log[0]["grad_norm"] == 0


def test_it_learns_through_both_branches(tmp_path):
    """Towards what the positive word asks for: more than 3 standard errors, equal seeds."""
    engine = world.engine(tiny.sd, tiny_vae=True)
    spec = {"name": "srpo", "positive": ["light"], "negative": ["dark"], "threshold": None}
    options = {"batch": 2, "steps": 2, "lr": 1e-2, "guidance": "none", "rank": 4, "alpha": 8}

    def reward(images, prompts):
        sign = torch.tensor([1.0 if prompt.startswith("light") else -1.0 for prompt in prompts])
        return sign * images.mean((1, 2, 3))

    reward.differentiable = True
    report = world.tune(engine, tmp_path, spec, reward, updates=8, **options)
    assert {"score_denoise", "score_inversion", "start_denoise"} <= set(report.log[0])
    scores = []
    for _ in range(2):
        made = engine.generate(
            world.PROMPTS * 6, seeds=list(range(18)), steps=2, height=16, width=16,
            guidance="none", output="tensor",
        )  # fmt: skip
        scores.append(made.images.mean((1, 2, 3)))
        if len(scores) == 1:
            sampler.models.lora.load_lora(engine, tmp_path)
    gain = scores[1] - scores[0]
    assert gain.mean() > 3 * gain.std() / math.sqrt(len(gain))
