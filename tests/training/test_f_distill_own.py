"""f-distill along the student's own trajectory: what is matched, and how such a student samples."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

import sampler
from sampler import objectives
from sampler.models.lora import load_lora
from sampler.training.batches import batch
from sampler.training.f_distill.micro_batch import DENOISE, GUIDE, PERTURB
from sampler.types import Branch, Level, Prediction, Span
from tests import tiny
from tests.training import world
from tests.training.test_f_distill import begun, grads, tune

TIMES = (999, 749, 499, 249)
OWN = {"trajectory": "own", "timesteps": TIMES, "divergence": "rkl", "gan_weight": 0.0}
WEIGHTED = {"divergence": "kl", "gan_weight": 0.1, "memory": 0.9}
SMALL = {"height": 16, "width": 16, "output": "latent"}


@pytest.fixture(scope="module")
def engine():
    return world.engine()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, over = tmp_path_factory.mktemp("own"), world.engine()
    return {
        form: tune(
            over,
            root / form,
            6,
            trainer={**OWN, "ema": 0.0, "student": form, "fake": form},
            alpha=9.0,
        ).lora
        for form in ("full", "lora")
    }


def steps_of(method, session, count=40):
    """The updates of a run, by the step of the student that they are at."""
    found = [method.step(session, batch(world.PROMPTS, 2, n, 0)) for n in range(count)]
    return {step.last: step for step in reversed(found)}


def plain(level):
    """The levels of a micro-batch as [B, 1, 1, 1]."""
    return (v.view(-1, 1, 1, 1) for v in (level.alpha, level.sigma))


@pytest.mark.parametrize("separate", [False, True])
def test_noise_is_added_above_the_start_of_the_next_step(engine, tmp_path, separate):
    """And, where separate, not beyond the step's own level."""
    method, session, opened = begun(engine, tmp_path, {**OWN, "separate": separate})
    with opened as made:
        steps = steps_of(method, replace(session, trainable=made), 60)
        assert set(steps) == {0, 1, 2, 3}
        seen = {k: [] for k in steps}
        for n in range(60):
            step = method.step(replace(session, trainable=made), batch(world.PROMPTS, 2, n, 0))
            seen[step.last] += step.parts[0].level.t.tolist()
    for k, times in seen.items():
        low, high = (*TIMES, 1)[k + 1], TIMES[k] if separate else 999
        assert low <= min(times) and max(times) <= high
        assert max(times) - min(times) > 0.5 * (high - low)


@pytest.mark.parametrize(
    "options",
    [{}, {"separate": True, "huber": 1e-3}, {"guidance_times": (0.7, 1.0)}],
    ids=["plain", "separate and huber", "decoupled"],
)
def test_the_students_gradient_is_that_of_the_paper(engine, tmp_path, options):
    """Written out with diffusers' own networks on the same noise, at every step."""
    method, session, opened = begun(engine, tmp_path, {**OWN, **options})
    schedule, pipe, w = engine.pipeline.schedule, engine.pipeline, 2.0
    with opened as made:
        session = replace(session, trainable=made)
        for k, step in steps_of(method, session).items():
            rows, (part,) = step.batch, step.parts
            for parameter in made.parameters.values():
                parameter.grad = None
            next(method.step(session, rows).matching(method.start())).loss.backward()
            ours = [g.clone() for g in grads(made.parameters, "student.") if g is not None]
            text, empty = (c["encoder_hidden_states"] for c in (part.cond.cond, part.cond.uncond))

            def ask(network, x, level, text=text):
                """(x0, eps) of an eps-network, at one level or at those of the rows."""
                eps = network(x, level.t, encoder_hidden_states=text).sample
                a, s = plain(level) if torch.is_tensor(level.t) else level[1:]
                return (x - s * eps) / a, eps

            nets = made.networks.networks
            levels = [schedule.level(t) for t in TIMES]
            x = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s))
                             for s in part.seeds])  # fmt: skip
            for now, after in zip(levels[:k], levels[1 : k + 1], strict=True):
                with torch.no_grad():
                    d, eps = ask(nets["student"], x, now)
                    x = after.alpha * d + after.sigma * eps
            d, eps = ask(nets["student"], x, levels[k])
            mid = (*levels, Level(0, 1.0, 0.0))[k + 1]

            def noised(level, purpose, d=d.detach(), eps=eps.detach(), mid=mid, part=part):
                scale, sigma = (v / u for v, u in zip(plain(level), (mid.alpha, 1), strict=True))
                rest = (sigma**2 - (scale * mid.sigma) ** 2).clamp(min=0).sqrt()
                x_mid = mid.alpha * d + mid.sigma * eps
                return scale * x_mid + rest * part.noise(x_mid, purpose)

            with torch.no_grad():
                x_t = noised(part.level, PERTURB)
                cond = ask(pipe.network, x_t, part.level)[0]
                at = (x_t, part.level)
                if part.guide is not None:
                    at = noised(part.guide, GUIDE), part.guide
                    assert not torch.equal(part.guide.t, part.level.t)
                    assert min(part.guide.t) >= 700 or k == 0
                c, u = ask(pipe.network, *at)[0], ask(pipe.network, *at, text=empty)[0]
                guided = cond + (w - 1) * (c - u)
                fake = ask(nets["fake"], x_t, part.level)[0]
                scale = (d - guided).abs().mean((1, 2, 3))
            gap = (d - (d + guided - fake).detach()) ** 2
            if huber := options.get("huber"):
                gap = (gap + huber**2).sqrt() - huber
            for parameter in made.parameters.values():
                parameter.grad = None
            (gap.mean((1, 2, 3)) / scale).sum().div(2).backward()
            theirs = [g for g in grads(made.parameters, "student.") if g is not None]
            norm = torch.stack([g.norm() for g in theirs]).norm()
            apart = torch.stack([(a - b).norm() for a, b in zip(ours, theirs, strict=True)]).norm()
            assert apart <= 3e-3 * norm > 0  # the rounding of float32 networks, in other batches


def test_the_fake_scores_loss_has_the_weight_of_the_mixed_noise(engine, tmp_path):
    method, session, opened = begun(engine, tmp_path, OWN)
    levels = [*(engine.pipeline.schedule.level(t) for t in TIMES), Level(0, 1.0, 0.0)]
    with opened as made:
        session = replace(session, trainable=made)
        for k, step in steps_of(method, session).items():
            (part,) = step.parts
            (found,) = step.critics()
            with torch.no_grad():
                sampled = step.networks.student(part, k)
                mid = levels[k + 1]
                x = mid.alpha * sampled.x0 + mid.sigma * sampled.eps
                noise = part.noise(x, DENOISE)
                x_t = objectives.renoised(x, mid, part.level, noise)
                mixed = objectives.mixed_noise(sampled.eps, noise, mid, part.level)
                a, s = plain(part.level)
                torch.testing.assert_close(x_t, a * sampled.x0 + s * mixed, rtol=1e-4, atol=1e-5)
                out = made.networks.networks["fake"](
                    x_t, part.level.t, encoder_hidden_states=part.cond.cond["encoder_hidden_states"]
                ).sample
                snr = (part.level.alpha / part.level.sigma).square().clamp(max=5)
                error = ((x_t - s * out) / a - sampled.x0).square().mean((1, 2, 3))
                weight = (noise.square() - mixed.square()).mean((1, 2, 3)).div(2).exp()
            torch.testing.assert_close(
                found.loss, (snr * error * weight).mean(), rtol=1e-4, atol=1e-6
            )


def test_a_discriminator_weights_the_samples_of_the_trajectory(engine, tmp_path):
    """h is a factor of the loss of every sample; the adversarial gradient passes through x_t."""
    method, session, opened = begun(engine, tmp_path, {**OWN, **WEIGHTED})
    with opened as made:
        step = steps_of(method, replace(session, trainable=made))[1]
        (found,) = step.matching(method.start())
        (part,) = step.parts
        sampled = step.networks.student(part, 1)
        first = next(iter(made.student.parameters()))
        assert torch.autograd.grad(sampled.mid.sum(), first)[0].any()
        one = torch.ones(2)
        with torch.no_grad():
            scores = step.networks.scores(sampled.noised(part.level, part.noise(sampled.mid, 0)),
                                          part, sampled)  # fmt: skip
            bare = step.trajectory.student_loss(sampled, *scores, one)
        expected = bare * found.metrics["h"]
        torch.testing.assert_close(found.metrics["loss_distill"], expected, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(found.metrics["h"], one)


@pytest.mark.parametrize("form", ["full", "lora"])
def test_the_engine_walks_the_trajectory_of_the_training(folders, form, tmp_path):
    """Every start of a step is the training's own, and no noise is drawn."""
    over = sampler.load(tiny.sd(), student=folders[form])
    assert json.loads((folders[form] / "manifest.json").read_text())["trajectory"] == "own"
    run = over.generate(world.PROMPTS, seeds=[1, 2, 3], steps=4, **SMALL)
    assert run.nfe == [4, 4, 4]
    again = over.generate(world.PROMPTS, seeds=[1, 2, 3], steps=4, batch_size=1, **SMALL)
    torch.testing.assert_close(run.latents, again.latents, rtol=1e-4, atol=1e-4)
    network, schedule = over.pipeline.networks["student"], over.pipeline.schedule
    text = over.pipeline.encode(world.PROMPTS, [""] * 3, False, (16, 16)).cond
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(s))
                   for s in (1, 2, 3)])  # fmt: skip
    levels = [*(schedule.level(t) for t in TIMES), Level(0, 1.0, 0.0)]
    with torch.no_grad():
        for now, after in zip(levels[:-1], levels[1:], strict=True):
            out = network(x, now.t, encoder_hidden_states=text["encoder_hidden_states"]).sample
            pred = Prediction.from_eps(x, out, now)
            x = (after.alpha * pred.x0 + after.sigma * pred.eps).tensor()
    torch.testing.assert_close(run.latents, x, rtol=1e-4, atol=1e-4)


def test_stock_pipelines_make_the_same_images(folders):
    """The folder of a full student with its DDIM scheduler; a LoRA of weight 1 on the base, in a
    stock pipeline and in an engine. Its strength alpha/rank is 9/64."""
    options = {"num_inference_steps": 4, "height": 16, "width": 16, "output_type": "latent"}
    options |= {"guidance_scale": 1.0}

    def stock(pipe):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        return pipe(world.PROMPTS[0], generator=generator, **options).images

    def near(a, b):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)

    full, lora = (
        sampler.load(tiny.sd(), student=folders[form]).generate(
            world.PROMPTS[0], seeds=1, steps=4, **SMALL
        ).latents
        for form in ("full", "lora")
    )  # fmt: skip
    near(stock(DiffusionPipeline.from_pretrained(folders["full"], local_files_only=True)), full)
    base = tiny.sd()
    base.scheduler = DDIMScheduler.from_config(base.scheduler.config, timestep_spacing="trailing")
    bare = stock(base)
    base.load_lora_weights(str(folders["lora"]))
    near(stock(base), lora)
    assert (bare - lora).norm() > 0.02 * lora.norm()
    over = world.engine()
    load_lora(over, (folders["lora"], 1.0))
    over = over.with_grid({"timesteps": list(TIMES)})
    near(over.generate(world.PROMPTS[0], seeds=1, steps=4, sampler="ddim", guidance="none",
                       **SMALL).latents, lora)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"steps": 2}, "use steps = 4 without timesteps"),
        ({"steps": 8}, "use steps = 4 without timesteps"),
        (
            {"steps": 4, "sampler": {"name": "consistency", "timesteps": (999, 749, 499, 1)}},
            "use steps = 4 without timesteps",
        ),
        ({"steps": 4, "sampler": "ddim"}, "use the sampler 'consistency' with 4 steps"),
        (
            {"steps": 2, "guidance": {"name": "nag", "rule": "student"}, "negative": "a cat"},
            "use steps = 4 without timesteps",
        ),
    ],
)
def test_other_steps_than_its_own_are_refused(folders, options, problem):
    over = sampler.load(tiny.sd(), student=folders["full"])
    with pytest.raises(ValueError, match=problem) as error:
        over.generate("a dog", seeds=1, **{**SMALL, **options})
    assert "\n" not in str(error.value)


def test_a_list_of_its_times_is_no_way_around(folders):
    over = sampler.load(tiny.sd(), student=folders["full"]).with_grid({"timesteps": list(TIMES)})
    with pytest.raises(ValueError, match="its own deterministic trajectory"):
        over.generate("a dog", seeds=1, steps=4, sampler={"name": "ddim", "eta": 1.0}, **SMALL)


def test_two_loras_are_trained_on_one_network(engine, tmp_path):
    """No second model: the teacher's own modules, with as many weights more as the LoRAs have."""
    forms = {"student": "lora", "fake": "lora"}
    own = {id(p) for p in engine.pipeline.network.parameters()}
    method, session, opened = begun(engine, tmp_path, {**OWN, **forms}, rank=2)
    with opened as made:
        found = {id(p): p for n in made.networks.networks.values() for p in n.parameters()}
        added = sum(p.numel() for key, p in found.items() if key not in own)
        assert added == sum(p.numel() for p in made.parameters.values()) > 0
        x, level = torch.randn(1, 4, 8, 8), engine.pipeline.schedule.level(500)
        cond = session.encode(["a dog"])[1].cond
        for parameter in made.parameters.values():
            parameter.data += 0.1
        with torch.no_grad():
            outs = made.networks(x, Span(0, level, level), {
                name: Branch(cond, model=name) for name in ("main", "student", "fake")
            }, [0])  # fmt: skip
            plain = engine.pipeline(x, Span(0, level, level), {"cond": Branch(cond)}, [0])["cond"]
        assert torch.equal(outs["main"].out.tensor(), plain.out.tensor())
        assert not torch.equal(outs["main"].out.tensor(), outs["student"].out.tensor())


@pytest.mark.parametrize(
    ("trainer", "settings", "problem"),
    [
        ({"trajectory": "renoised", "separate": True}, {}, "separate is of trajectory = 'own'"),
        ({"trajectory": "renoised", "huber": 1e-3}, {}, "huber is of trajectory = 'own'"),
        ({"trajectory": "theirs"}, {}, "trajectory"),
        ({"warmup": 3}, {}, "the warm-up makes the first step jump"),
        ({"huber": 0.0}, {}, "huber"),
        ({"guidance_times": (0.5, 0.2)}, {}, "guidance_times"),
        ({"guidance_times": (0.2, 1.0)}, {"guidance": "none"}, "the guidance 'none' has none"),
        (
            {"guidance_times": (0.2, 0.5)},
            {},
            "guidance_times leaves no level for the step",
        ),
        ({"times": (0.1, 0.7)}, {}, "times leaves no level for the step at t = 999"),
        ({"student_lr": 0.0}, {}, "student_lr"),
    ],
)
def test_options_that_do_not_apply_are_refused(engine, tmp_path, trainer, settings, problem):
    with pytest.raises((ValueError, sampler.SamplerError), match=problem) as error:
        tune(engine, tmp_path, trainer={**OWN, **trainer}, **settings)
    assert "\n" not in str(error.value) and not (tmp_path / "checkpoints").exists()
