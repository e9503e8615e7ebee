"""The trainer f_distill: who learns when, what it leaves alone, how it goes on."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch

import sampler
from sampler import registry
from sampler.training import checkpoint
from sampler.training.batches import batch, derived
from sampler.training.f_distill.micro_batch import PERTURB
from sampler.training.f_distill.setup import student_levels
from sampler.training.session import Session
from sampler.training.settings import settings_from
from tests import tiny
from tests.training import world

TRAINER = {"name": "f_distill", "samples": 3, "student_every": 2, "gan_weight": 0.1}
SETTINGS = {**world.SHORT, "steps": 2, "guidance": {"name": "cfg", "scale": 2.0}}


@pytest.fixture(scope="module")
def engine():
    return world.engine()


def tune(over, out, updates=4, progress=None, trainer=(), **settings):
    return sampler.finetune(
        over,
        {**TRAINER, **dict(trainer)},
        None,
        world.PROMPTS,
        out,
        updates,
        settings={**SETTINGS, **settings},
        progress=progress,
    )


def begun(engine, out, trainer=(), **settings):
    """(trainer, session with its networks): a context manager, for looking at single updates."""
    method = registry.build("trainer", {**TRAINER, **dict(trainer)})
    chosen = settings_from({**SETTINGS, **settings}).resolved(
        method.defaults, engine, world.PROMPTS
    )
    session = Session(
        engine, None, chosen.sampler, chosen.guidance, 2, (16, 16), chosen.micro, chosen.negative
    )
    return method, session, method.trainable(session, world.PROMPTS, out, chosen)


def grads(parameters, group):
    return [p.grad for name, p in parameters.items() if name.startswith(group)]


def test_each_update_gives_gradients_to_its_own_networks_alone(engine, tmp_path):
    method, session, opened = begun(engine, tmp_path)
    with opened as made:
        session = replace(session, trainable=made)
        teacher = dict(engine.pipeline.network.named_parameters())
        kinds = {0: {"fake.", "heads."}, 1: {"student."}}
        for number, groups in kinds.items():
            rows = batch(world.PROMPTS, 2, number, 0)
            seen = set()
            for part in method.updates(session, rows, method.start()):
                for parameter in made.parameters.values():
                    parameter.grad = None
                part.loss.backward()
                seen.add(part.prefix)
                own = grads(made.parameters, part.prefix)
                assert any(g is not None and bool(g.any()) for g in own)
                assert all(p.grad is None for p in teacher.values())
                if part.prefix != "student.":  # the student's loss passes through the heads
                    others = {"student.", "fake.", "heads."} - {part.prefix}
                    assert all(g is None for o in others for g in grads(made.parameters, o))
                else:
                    assert all(g is None for g in grads(made.parameters, "fake."))
            assert seen == groups


def test_only_the_group_of_an_update_moves(engine, tmp_path):
    """And a group that has no gradient is not touched by the optimiser's weight decay."""
    before, moved = {}, []

    def look(record):
        if record["update"] == 1:
            return
        found = checkpoint.load_newest(tmp_path / "checkpoints")  # of the update before
        now = found.adapter
        if before:
            moved.append({k.partition(".")[0] for k in now if not torch.equal(now[k], before[k])})
        before.update(now)

    tune(engine, tmp_path, 5, look, checkpoint_every=1, weight_decay=0.1)
    assert moved == [{"student", "ema"}, {"fake", "heads"}, {"student", "ema"}]


def test_the_pipeline_is_as_before_and_the_student_is_not_the_teacher(engine, tmp_path):
    network = engine.pipeline.network
    before = world.state(network)
    flags = {n: p.requires_grad for n, p in network.named_parameters()}
    report = tune(engine, tmp_path)
    assert world.same(before, world.state(network))
    assert flags == {n: p.requires_grad for n, p in network.named_parameters()}
    assert not any(module._forward_hooks for module in network.modules())
    assert engine.pipeline.models == ("main",) and engine.pipeline.student is None
    student = sampler.load(tiny.sd(), student=report.lora).pipeline.networks["student"]
    assert not world.same(before, world.state(student))


OWN = {
    "trajectory": "own",
    "timesteps": (999, 749, 249),
    "separate": True,
    "huber": 1e-3,
    "guidance_times": (0.5, 1.0),
    "student_lr": 0.5,
}
LORAS = {"student": "lora", "fake": "lora"}


@pytest.mark.parametrize(
    "form",
    [{"warmup": 2}, {"warmup": 2, **LORAS}, {**OWN, **LORAS}],
    ids=["full", "lora", "own lora"],
)
def test_a_run_that_is_killed_goes_on_bit_equal(engine, tmp_path, form):
    """In its warm-up, among the critics' updates and among the student's; by SIGKILL."""
    options = {"trainer": {**form, "memory": 0.5}}
    tune(engine, tmp_path / "whole", 7, checkpoint_every=1, **options)
    cut = tmp_path / "cut"
    for stop in (1, 3, 4, 6):
        child = os.fork()
        if child == 0:

            def die(record, stop=stop):
                if record["update"] == stop:
                    os.kill(os.getpid(), signal.SIGKILL)

            tune(engine, cut, 7, die, checkpoint_every=1, **options)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    report = tune(engine, cut, 7, checkpoint_every=1, **options)
    assert world.curve(cut) == world.curve(tmp_path / "whole") and len(report.log) == 7
    one, two = (checkpoint.load_newest(p / "checkpoints") for p in (cut, tmp_path / "whole"))
    assert world.same(one.adapter, two.adapter) and world.same(one.optimizer, two.optimizer)
    assert one.state == two.state and one.state["trainer"]["bins"] != [1.0] * 10
    assert one.state["trainer"]["students"] == (4 if "warmup" in form else 3)


@pytest.mark.parametrize(
    "options",
    [{"divergence": "js"}, {"divergence": "rkl"}, {"divergence": "js", **OWN}, {**OWN, **LORAS}],
)
def test_micro_batches_change_nothing(engine, tmp_path, options):
    """The weights are normalised over the whole batch before there is a gradient."""
    moments = []
    for micro in (4, 2, 1):
        settings = {"batch": 4, "micro": micro, "clip": 0, "seed": 3, "checkpoint_every": 1}
        out = tmp_path / str(micro)
        tune(engine, out, 2, trainer=options, **settings)
        found = checkpoint.load_newest(out / "checkpoints").optimizer
        moments.append(torch.cat([v.flatten() for k, v in found.items() if k.endswith("exp_avg")]))
    for other in moments[1:]:
        assert (other - moments[0]).norm() <= 1e-4 * moments[0].norm()


def test_reverse_kl_needs_neither_discriminator_nor_samples(engine, tmp_path):
    report = tune(engine, tmp_path, trainer={"divergence": "rkl", "gan_weight": 0.0})
    assert not (tmp_path / "teacher").exists()
    found = checkpoint.load_newest(tmp_path / "checkpoints")
    assert not any(k.startswith("heads.") for k in found.adapter)
    assert [r["h"] for r in report.log if "h" in r] == [1.0, 1.0]


def test_reverse_kl_without_a_discriminator_is_plain_distribution_matching(engine, tmp_path):
    """The student's gradient equals, to the bit, that of DMD written out on the same noise."""
    trainer = {"divergence": "rkl", "gan_weight": 0.0}
    method, session, opened = begun(engine, tmp_path, trainer)
    with opened as made:
        session = replace(session, trainable=made)
        rows = batch(world.PROMPTS, 2, 1, 0)
        next(iter(method.updates(session, rows, method.start()))).loss.backward()
        ours = [g.clone() for g in grads(made.parameters, "student.") if g is not None]
        for parameter in made.parameters.values():
            parameter.grad = None
        step = method.step(session, rows)
        (part,) = step.parts
        sampled = step.networks.student(part, step.last)
        x = sampled.x0
        with torch.no_grad():
            x_t = sampled.noised(part.level, part.noise(x, PERTURB))
            teacher, fake = step.networks.scores(x_t, part, sampled)
            w = 1 / ((x - teacher).abs().flatten(1).mean(1) + 1e-6)
            target = x - (fake - teacher) * w[:, None, None, None]
        (0.5 * (x - target).square().flatten(1).mean(1)).sum().div(2).backward()
        theirs = [g for g in grads(made.parameters, "student.") if g is not None]
        assert ours and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_teacher_is_the_guided_one(engine, tmp_path):
    """x0 = uncond + w·(cond − uncond), each row at a level of its own."""
    method, session, opened = begun(engine, tmp_path)
    with opened as made:
        step = method.step(replace(session, trainable=made), batch(world.PROMPTS, 2, 0, 0))
        (part,) = step.parts
        assert len(set(part.level.t.tolist())) == 2
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        guided = step.networks.guided(x, part.level, part).x0.tensor()
        pipeline, rows = engine.pipeline, []
        with torch.no_grad():
            for b in range(2):
                level = pipeline.schedule.level(int(part.level.t[b]))
                conds = [c["encoder_hidden_states"][b : b + 1] for c in
                         (part.cond.cond, part.cond.uncond)]  # fmt: skip
                c, u = (
                    pipeline.network(x[b : b + 1], level.t, encoder_hidden_states=e).sample
                    for e in conds
                )
                rows.append((x[b : b + 1] - level.sigma * (u + 2.0 * (c - u))) / level.alpha)
        torch.testing.assert_close(guided, torch.cat(rows), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [tiny.sdxl, tiny.pixart, tiny.sd3, tiny.flux])
def test_other_teachers(build, tmp_path):
    """SDXL's UNet, and a transformer, whose tokens are put in their places for the heads."""
    over = world.engine(build)
    report = tune(over, tmp_path, 2, guidance={"name": "apg", "scale": 3.0})
    assert report.stopped == "" and len(report.log) == 2
    made = sampler.load(build(), student=report.lora).generate(
        ["a dog"], seeds=1, steps=1, height=16, width=16, output="latent"
    )
    assert made.nfe == [1] and bool(torch.isfinite(made.latents).all())


def test_a_folder_of_images_is_data(engine, tmp_path):
    from PIL import Image

    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for i, prompt in enumerate(world.PROMPTS):
        Image.new("RGB", (16, 16), (80 * i, 10, 200)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": prompt}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    trainer = {"data": str(folder)}
    tune(engine, tmp_path / "run", 2, trainer=trainer)
    assert not (tmp_path / "run" / "teacher").exists()
    assert (tmp_path / "run" / "data.safetensors").is_file()
    with pytest.raises(sampler.SamplerError, match="is 16 x 16 pixels; this run needs 32"):
        tune(engine, tmp_path / "large", 2, trainer=trainer, height=32, width=32)
    (folder / "metadata.jsonl").write_text("\n".join(lines[:2]))
    with pytest.raises(ValueError, match="no sample has the prompt 'a red car'"):
        tune(engine, tmp_path / "short", 2, trainer=trainer)
    (folder / "metadata.jsonl").write_text("{}")
    with pytest.raises(sampler.SamplerError, match="metadata.jsonl must have"):
        tune(engine, tmp_path / "bad", 2, trainer=trainer)


def test_the_warm_up_learns_the_teachers_images_from_their_noise(engine, tmp_path):
    """One image, learnt by heart: the student's own image from that seed is then close to it."""
    trainer = {"warmup": 60, "samples": 1, "ema": 0.0, "divergence": "rkl", "gan_weight": 0.0}
    report = tune(engine, tmp_path, 60, trainer=trainer, lr=3e-3, batch=1, checkpoint_every=60)
    errors = [r["regression"] for r in report.log]
    assert errors[-1] < 0.1 * errors[0]
    options = {"seeds": derived(0, 0, "teacher"), "height": 16, "width": 16, "output": "latent"}
    teacher = engine.generate(
        world.PROMPTS[0], steps=2, sampler={"name": "ab", "order": 2},
        guidance=SETTINGS["guidance"], **options,
    ).latents  # fmt: skip
    made = sampler.load(tiny.sd(), student=report.lora).generate(
        world.PROMPTS[0], steps=1, **options
    )
    untrained = engine.generate(
        world.PROMPTS[0], steps=1, sampler={"name": "consistency", "timesteps": (999,)},
        guidance="none", **options,
    ).latents  # fmt: skip
    assert (made.latents - teacher).norm() < 0.35 * (untrained - teacher).norm()


def test_evaluations_are_the_students_average(engine, tmp_path):
    report = tune(engine, tmp_path, eval_every=2, eval_prompts=["a dog"], trainer={"ema": 0.0})
    evaluations = [r for r in report.log if r["kind"] == "eval"]
    assert [e["update"] for e in evaluations] == [0, 2, 4]
    assert all(e["drift"] > 0 and "reward" not in e for e in evaluations)
    base = engine.generate(
        ["a dog"], seeds=[0], steps=2, height=16, width=16, output="latent",
        sampler={"name": "ab", "order": 2}, guidance=SETTINGS["guidance"],
    ).latents  # fmt: skip
    student = sampler.load(tiny.sd(), student=report.lora)
    made = student.generate(["a dog"], seeds=[0], steps=1, height=16, width=16, output="latent")
    drift = float((made.latents - base).square().mean())
    assert drift == pytest.approx(evaluations[-1]["drift"], rel=1e-3)


@pytest.mark.parametrize(
    ("trainer", "settings", "problem"),
    [
        ({"gan_weight": 0.0}, {}, "only divergence = 'rkl' works with 0"),
        ({"divergence": "chi"}, {}, "divergence"),
        ({"timesteps": (99.0, 999.0)}, {}, "must be falling times"),
        ({"timesteps": (1200.0,)}, {}, "must lie in 0..999"),
        ({"low": 2.0}, {}, "above 0 and at most 1"),
        ({"student_every": 0}, {}, "must be an integer of at least 1"),
        ({}, {"guidance": {"name": "adaptive"}}, "depends on the step or on earlier"),
        ({}, {"guidance": {"name": "cfg", "interval": (0.1, 5.0)}}, "depends on the step or on"),
        ({"warmup": 2}, {"sampler": {"name": "ddim", "eta": 1.0}}, "use a deterministic sampler"),
        ({"features": ("nowhere",)}, {}, "no module 'nowhere'"),
        ({"data": "missing.safetensors"}, {}, "is neither a folder of images"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(engine, tmp_path, trainer, settings, problem):
    with pytest.raises((ValueError, sampler.SamplerError), match=problem) as error:
        tune(engine, tmp_path, trainer=trainer, **settings)
    assert "\n" not in str(error.value)


def test_an_eps_network_says_nothing_at_pure_noise():
    method, schedule = registry.build("trainer", "f_distill"), zero_snr_eps()
    with pytest.raises(ValueError, match="says nothing about x0 at t = 999"):
        student_levels(method.timesteps, schedule)
    lower = registry.build("trainer", {"name": "f_distill", "timesteps": (900, 500)})
    assert [level.t for level in student_levels(lower.timesteps, schedule)] == [900, 500]


def zero_snr_eps():
    config = {**tiny.DDIM, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return sampler.Schedule.from_config(config, "DDIMScheduler")


def test_trainers_that_need_a_reward_still_do(engine, tmp_path):
    with pytest.raises(ValueError, match="'ddpo' needs a reward"):
        world.tune(engine, tmp_path, "ddpo", None)


def test_values_that_are_not_finite_are_skipped(engine, tmp_path):
    def spoil(record):
        if record["update"] == 1:
            network = engine.pipeline.network
            with torch.no_grad():
                network.conv_in.bias[0] = float("nan")

    kept = engine.pipeline.network.conv_in.bias.detach().clone()
    try:
        report = tune(engine, tmp_path, 3, spoil)
    finally:
        engine.pipeline.network.conv_in.bias.data.copy_(kept)
    assert "skipped" in report.log[1]
