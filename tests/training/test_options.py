"""AlignProp's options on a pipeline, and that training does what it is for."""

import math
from dataclasses import fields, replace

import pytest
import torch

import sampler
from sampler import registry
from sampler.models.lora import load_lora
from sampler.models.trainable_lora import adapted
from sampler.training.alignprop.trainer import AlignProp
from sampler.training.batches import batch
from sampler.training.session import Session
from tests import tiny
from tests.training import world


@pytest.fixture(scope="module")
def trained():
    """(session, batch) of a tiny pipeline with an adapter whose B is not zero."""
    engine = world.engine()
    network = engine.pipeline.network
    with adapted(network, 2, 2, ["to_q", "to_v"], 0) as adapter:
        for number, parameter in enumerate(adapter.parameters.values()):
            torch.manual_seed(number)
            parameter.data = 0.3 * torch.randn_like(parameter)
        reward = sampler.build("reward", "brightness")
        method = sampler.build("sampler", {"name": "ddim", "eta": 1.0})
        session = Session(
            engine, reward, method, engine.guidance, 4, (16, 16), 2, trainable=adapter
        )
        yield session, batch(["a dog", "a cat"], 2, 0, 0)


UNUSED = [
    ({"name": "nft", "shift": 3.0}, "shift = 3.0 has no effect with law = 'grid'"),
    ({"name": "awm", "weighting": "t", "power": 0.5}, "power = 0.5 .* weighting = 't'"),
    ({"name": "awm", "kl": 0, "kl_ema": 0, "kl_law": "elbo"}, "kl_law = 'elbo' .* kl = 0 and"),
    ({"name": "dpo", "data": "pairs", "group_size": 4}, "group_size = 4 has no effect with data"),
    ({"name": "grpo", "ratio": "dppo", "clip_range": 0.1}, "clip_range = 0.1 .* ratio = 'dppo'"),
    ({"name": "grpo", "threshold": 0.1}, "threshold = 0.1 has no effect with ratio = 'guard'"),
    ({"name": "grpo", "kl_space": "v"}, "kl_space = 'v' has no effect with kl_beta = 0"),
    ({"name": "grpo", "window": {"decay": 0.2}}, "window.decay = 0.2 .* strategy = 'progressive'"),
    (
        {"name": "grpo", "window": {"size": 1, "strategy": "random", "every": 2}},
        "window.every = 2 has no effect with strategy = 'random'",
    ),
    (
        {"name": "ddpo", "advantage": "group", "group_size": 2, "min_count": 2},
        "min_count = 2 has no effect with advantage = 'group'",
    ),
    ({"name": "rlcm", "explore_std": 0.2}, "explore_std = 0.2 .* final_step = 'drop'"),
    ({"name": "alignprop", "k": 2}, "k = 2 has no effect with truncation = 'gaussian'"),
    ({"name": "alignprop", "truncation": "fixed", "low": 1}, "low = 1 .* truncation = 'fixed'"),
    ({"name": "alignprop", "value": 3.0}, "value = 3.0 has no effect with loss = 'maximise'"),
    (
        {"name": "srpo", "positive": [], "negative": [], "k_denoise": (0.1, 0.5)},
        r"k_denoise = \(0.1, 0.5\) has no effect with positive = \[\]",
    ),
]


@pytest.mark.parametrize(("spec", "problem"), UNUSED)
def test_fields_without_effect_are_refused(spec, problem, monkeypatch, tmp_path):
    """By name, before anything is sampled."""
    monkeypatch.setattr("sampler.training.matching.pair_files.read_pairs", lambda data: ["a dog"])
    monkeypatch.setattr("sampler.training.matching.pair_files.files_of", lambda *given: ())
    prompts = [] if "data" in spec else world.PROMPTS
    settings = {"height": 16, "width": 16, "steps": 8}
    with pytest.raises(ValueError, match=f"^{spec['name']}: {problem}") as error:
        sampler.finetune(
            world.engine(), spec, "brightness", prompts, tmp_path / "out", settings=settings
        )
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_fields_that_have_no_effect_exist():
    """In every trainer, by default, and they have defaults to be compared with."""
    for name in registry.names("trainer"):
        if name == "denoise":
            continue
        trainer = registry.build("trainer", name)
        known = {f.name: f.default for f in fields(trainer)}
        assert all(known[key] == getattr(trainer, key) for key in trainer.unused)


def shares(trainer, trained):
    """(gradient, updates) of a whole update."""
    session, rows = trained
    parameters = list(session.trainable.parameters.values())
    total = [torch.zeros_like(p) for p in parameters]
    updates = list(trainer.updates(session, rows, None))
    for update in updates:
        grads = torch.autograd.grad(update.loss, parameters, allow_unused=True)
        total = [t + (0 if g is None else g) for t, g in zip(total, grads, strict=True)]
    return torch.cat([t.flatten() for t in total]), updates


def test_row_by_row_decoding_and_recomputing_change_nothing(trained):
    plain, _ = shares(AlignProp(truncation="fixed", k=2), trained)
    sliced, _ = shares(AlignProp(truncation="fixed", k=2, vae_slices=True), trained)
    stored, _ = shares(AlignProp(truncation="fixed", k=2, checkpointing=False), trained)
    assert torch.equal(plain, stored) and plain.norm() > 0
    assert (sliced - plain).norm() <= 1e-4 * plain.norm()


def test_straight_through_clipping_has_gradient_everywhere(trained):
    session, _ = trained
    latents = torch.full((1, 4, 8, 8), 30.0)
    pixels = {}
    for clamp in ("hard", "straight_through"):
        x = latents.clone().requires_grad_()
        images = session.decoder(clamp)(x)
        clipped = (images <= 0) | (images >= 1)
        assert clipped.any() and images.min() > -1e-6 and images.max() < 1 + 1e-6
        (grad,) = torch.autograd.grad((images * clipped).sum(), x)
        pixels[clamp] = (images.detach(), grad.abs().sum())
    torch.testing.assert_close(pixels["hard"][0], pixels["straight_through"][0])
    assert pixels["hard"][1] == 0 < pixels["straight_through"][1]


def test_anchor_is_the_squared_distance_to_the_base_prediction(trained):
    session, rows = trained
    trainer = AlignProp(truncation="fixed", k=1, anchor=2.0)
    made = trainer.window(session, [False, False, False, True]).sample(rows, rows.rows)
    run, before = session.begin(rows, rows.rows), None
    with torch.no_grad():
        snapshot = run.snapshot
        for snapshot in session.engine.steps(
            run.snapshot, run.levels, run.cond, session.method, run.rule
        ):
            before = snapshot if snapshot.index == 3 else before
        from sampler.types import spans

        span = spans(run.levels)[3]
        eps = [session.engine.predict(before, span, run.cond, run.rule)[0].eps.tensor()]
        with session.reference():
            eps.append(session.engine.predict(before, span, run.cond, run.rule)[0].eps.tensor())
    wanted = (eps[0] - eps[1]).square().flatten(1).mean(1)
    torch.testing.assert_close(made.drift.detach(), wanted)
    assert wanted.min() > 0
    with_anchor, _ = shares(trainer, trained)
    without, _ = shares(AlignProp(truncation="fixed", k=1), trained)
    grads = torch.autograd.grad(made.drift.mean(), list(session.trainable.parameters.values()))
    pull = torch.cat([g.flatten() for g in grads])
    assert (with_anchor - without - 2 * pull).norm() <= 1e-5 * pull.norm()


def test_refl_jumps_from_the_window_to_the_image(trained):
    """One more step after the prefix, whatever is left of the grid."""
    session, rows = trained
    trainer = AlignProp(ending="jump", truncation="uniform", low=1, high=1)
    kept = trainer.kept(4, rows)
    assert kept == [False, True]
    made = trainer.window(session, kept).sample(rows, rows.rows)
    run = session.begin(rows, rows.rows)
    levels = (*run.levels[:2], run.levels[-1])
    with torch.no_grad():
        *_, last = session.engine.steps(run.snapshot, levels, run.cond, session.method, run.rule)
        wanted = session.engine.pipeline.decode(last.x)
    assert torch.equal(made.images[0].detach(), wanted) and made.nfe == 2 * sum(last.nfe) / 2
    _, updates = shares(trainer, trained)
    assert len(updates) == 1 and updates[0].step


def test_drtune_jumps_at_one_of_the_last_steps_of_a_spread(trained):
    """The images are those of the grid cut there; every kept step has a gradient of its own."""
    session, _ = trained
    trainer = AlignProp(truncation="spread", k=2, through_input=False, early=3)
    ends = set()
    for update in range(12):
        rows = batch(["a dog", "a cat"], 2, update, 0)
        kept = trainer.kept(4, rows)
        ends.add(len(kept))
        assert any(kept) and trainer.kept(4, rows) == kept
    assert ends == {2, 3, 4}
    made = trainer.window(session, kept).sample(rows, rows.rows)
    run = session.begin(rows, rows.rows)
    levels = (*run.levels[: len(kept)], run.levels[-1])
    with torch.no_grad():
        *_, last = session.engine.steps(run.snapshot, levels, run.cond, session.method, run.rule)
        wanted = session.engine.pipeline.decode(last.x)
    assert torch.equal(made.images[0].detach(), wanted) and made.nfe == sum(last.nfe)
    grads = [shares(trainer, (replace(session, steps=4), rows))[0] for _ in range(2)]
    assert torch.equal(*grads) and grads[0].norm() > 0


@pytest.mark.parametrize("method", ["heun", "dpmpp_2s"])
def test_a_sampler_of_two_evaluations_has_twice_the_steps(tmp_path, method):
    spec = {"name": "alignprop", "truncation": "fixed", "k": 3}
    options = {"steps": 3, "sampler": method}
    report = world.tune(world.engine(), tmp_path, spec, updates=1, **options)
    assert report.log[0]["K"] == 3 and report.log[0]["grad_norm"] > 0


def test_draft_lv_averages_over_renoised_last_steps(trained):
    session, rows = trained
    trainer = AlignProp(truncation="fixed", k=1, lv=2)
    made = trainer.window(session, [False, False, False, True]).sample(rows, rows.rows)
    assert len(made.images) == 3
    assert not torch.equal(made.images[0], made.images[1])
    assert not torch.equal(made.images[1], made.images[2])
    _, updates = shares(trainer, trained)
    mean = sum(images.mean((1, 2, 3)) for images in made.images) / 3
    torch.testing.assert_close(updates[0].metrics["reward"], mean.detach())


def test_every_sampler_and_rule_is_differentiable(trained, tmp_path):
    engine = world.engine()
    for method in ("ghvb", "dpmpp_2m", "heavy_ball"):
        rule = {"name": "apg", "scale": 4.0}
        out = tmp_path / method
        report = world.tune(engine, out, updates=1, steps=3, sampler=method, guidance=rule)
        assert report.log[0]["grad_norm"] > 0


def test_training_raises_the_reward_and_the_adapter_can_be_dosed(tmp_path):
    """30 updates: more than 3 standard errors; half the adapter gives a reward in between."""
    engine = world.engine(tiny.sd, tiny_vae=True)
    out = tmp_path / "run"
    prompts = [f"a {word}" for word in ("dog", "cat", "car", "hat")]
    options = {"steps": 2, "batch": 2, "lr": 3e-3, "height": 16, "width": 16}
    options |= {"eval_every": 30, "eval_prompts": prompts * 2}
    trainer = {"name": "alignprop", "truncation": "fixed", "k": 1}
    report = sampler.finetune(engine, trainer, "brightness", prompts, out, 30, settings=options)
    first, last = (r for r in report.log if r["kind"] == "eval")
    error = math.sqrt((first["reward_std"] ** 2 + last["reward_std"] ** 2) / 8)
    assert last["reward"] - first["reward"] > 3 * error
    rewards = []
    for weight in (0.0, 0.5, 1.0):
        dosed = world.engine(tiny.sd, tiny_vae=True)
        load_lora(dosed, (out, weight))
        made = dosed.generate(
            prompts * 2, seeds=list(range(8)), steps=2, height=16, width=16,
            sampler={"name": "ddim", "eta": 1.0}, batch_size=2, output="tensor",
        )  # fmt: skip
        rewards.append(float(made.images.mean()))
    assert rewards[0] == pytest.approx(first["reward"], abs=1e-6)
    assert rewards[0] < rewards[1] < rewards[2]
    assert rewards[2] == pytest.approx(last["reward"], abs=1e-6)


@pytest.mark.parametrize("trainer", ["rlcm", "ddpo"])
def test_policies_learn_from_a_reward_that_is_a_black_box(tmp_path, trainer):
    engine = world.engine(tiny.sd, tiny_vae=True)

    def reward(images, prompts):  # through NumPy: no gradient
        return torch.tensor(images.numpy().mean((1, 2, 3)))

    fields = {"clip_range": 0.1, "passes": 1, "buffer": 32, "min_count": 8}
    steps = 2 if trainer == "rlcm" else 3
    options = {"batch": 8, "steps": steps, "lr": 1e-2, "guidance": "none"}
    spec = {**world.TRAINERS[trainer], **fields}
    world.tune(engine, tmp_path, spec, reward, updates=25, **options)
    method = {"rlcm": "consistency", "ddpo": {"name": "ddim", "eta": 1.0}}[trainer]
    scores = []
    for _ in range(2):
        made = engine.generate(
            world.PROMPTS * 6, seeds=list(range(18)), steps=steps, height=16, width=16,
            sampler=method, guidance="none", output="tensor",
        )  # fmt: skip
        scores.append(made.images.mean((1, 2, 3)))
        if len(scores) == 1:
            load_lora(engine, tmp_path)
    gain = scores[1] - scores[0]  # of the same prompts and seeds
    assert gain.mean() > 3 * gain.std() / math.sqrt(len(gain))
