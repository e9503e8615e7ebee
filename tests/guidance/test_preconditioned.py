"""Pipelines that estimate x0 of every branch before they guide, on samples x0 + sigma·eps."""

import pytest
import torch
from diffusers import EDMEulerScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler

import sampler
from tests import tiny
from tests.guidance.own_formula import STEPS, Pipe, built

pytestmark = pytest.mark.filterwarnings("ignore")
S = 3.0
APG = {"name": "apg", "scale": S, "space": "x0", "norm_threshold": 3.0, "momentum": -0.5}


def read(p, o, x, i):
    """x0 of a branch as StableDiffusionLatentUpscalePipeline computes it."""
    sigma = p.scheduler.sigmas[i]
    return x / (sigma**2 + 1) + sigma / (sigma**2 + 1).sqrt() * o


def both(p, u, c, x, i):
    return read(p, u, x, i), read(p, c, x, i)


def cfg(u, c, s=S):
    return u + s * (c - u)


def reading(formula, calls="uncond first"):
    scheduler = EulerDiscreteScheduler(**tiny.BETAS, prediction_type="sample")
    return built(formula, calls, scheduler)


@pytest.mark.parametrize("calls", ["uncond first", "cond first", "sequential"])
def test_guidance_of_estimates_is_replaced(calls):
    pipe = reading(lambda p, u, c, x, i: cfg(*both(p, u, c, x, i)), calls)
    plain = pipe()
    with sampler.guide(pipe, {"name": "cfg", "scale": S}) as hook:
        assert (pipe() - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert hook.form.preconditioning is not None and hook.form.scale == pytest.approx(S, rel=1e-4)
    with sampler.guide(pipe, {"name": "cfg", "scale": 5.0}):
        other = pipe()
    wanted = reading(lambda p, u, c, x, i: cfg(*both(p, u, c, x, i), 5.0), calls)()
    assert (other - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_rule_sees_the_estimates():
    rule = sampler.build("guidance", APG)
    state = rule.start(sampler.Cond())

    def by_hand(p, u, c, x, i):
        nonlocal state
        sigma = float(p.scheduler.sigmas[i])
        alpha = (1 + sigma**2) ** -0.5
        level = sampler.Level(0, alpha, alpha * sigma)
        u, c = both(p, u, c, x, i)
        preds = {
            k: sampler.Prediction.from_x0(alpha * x, v, level)
            for k, v in {"cond": c, "uncond": u}.items()
        }
        found, state = rule.combine(alpha * x, preds, sampler.Span(i, level, level), state)
        found, state = sampler.settle((found.x0, state))
        return found

    wanted = reading(by_hand)()
    pipe = reading(lambda p, u, c, x, i: cfg(*both(p, u, c, x, i)))
    with sampler.guide(pipe, APG):
        assert (pipe() - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def rescaled(u, c):
    made = cfg(u, c)
    return made * (c.std((1, 2, 3), keepdim=True) / made.std((1, 2, 3), keepdim=True))


REFUSED = {
    "offset": lambda p, u, c, x, i: cfg(*both(p, u, c, x, i)) + 0.01 * x,
    "clamp": lambda p, u, c, x, i: cfg(*both(p, u, c, x, i)).clamp(-0.5, 0.5),
    "late clamp": lambda p, u, c, x, i: cfg(*both(p, u, c, x, i)).clamp(
        *((-99, 99), (-0.3, 0.3))[i > 2]
    ),
    "rescaled": lambda p, u, c, x, i: rescaled(*both(p, u, c, x, i)),
    "late factor": lambda p, u, c, x, i: cfg(*both(p, u, c, x, i)) * (1, 1.01)[i > 2],
    "level of the next step": lambda p, u, c, x, i: cfg(*both(p, u, c, x, i + 1)),
    "estimates of one branch": lambda p, u, c, x, i: cfg(u, read(p, c, x, i)),
    "noise": lambda p, u, c, x, i: cfg(*both(p, u, c, x, i)) + 1e-3 * torch.randn_like(x),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_estimates_are_refused(name):
    pipe = reading(REFUSED[name])
    with pytest.raises(ValueError, match="sampler.guide cannot replace the guidance of Changed: "):
        with sampler.guide(pipe, {"name": "cfg", "scale": S}):
            pipe()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("space", ["x0", "eps", "v"])
def test_a_sample_of_sigma_units_is_seen_as_the_engine_sees_it(kind, space):
    """Schedulers like Euler's hold x/alpha; x0 of an eps or v in units of x needs x itself."""
    levels = {
        **tiny.BETAS,
        "prediction_type": kind,
        "timestep_spacing": "leading",
        "steps_offset": 1,
    }
    pipe = tiny.sd(scheduler=EulerDiscreteScheduler(**levels))
    rule = {**APG, "space": space}
    call = {"num_inference_steps": STEPS, "output_type": "latent"}
    with sampler.guide(pipe, rule):
        found = pipe("a fox", generator=[torch.Generator().manual_seed(1)], **call).images
    engine = sampler.load(pipe)
    wanted = engine.generate(
        "a fox", seeds=1, steps=STEPS, sampler="ddim", guidance=rule, output="latent"
    ).latents
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


class Twice(Pipe):
    """Steps every branch for its x0, guides these, and steps once more, as Cosmos does."""

    apart = False

    def stepped(self, x, t, u, c, i):
        both = torch.cat([u, c])
        taken = self.scheduler.step(both, t, torch.cat([x, x]), return_dict=False)
        if self.apart and i:
            return taken[0][len(x) :]
        self.scheduler._step_index -= 1
        x0 = type(self).formula(self, *taken[1].chunk(2), x, i)
        return self.scheduler.step(x0, t, x, pred_original_sample=x0, return_dict=False)[0]

    @torch.no_grad()
    def __call__(self):
        cond, uncond = self.encode_prompt(["a fox", "a door"], "cpu", 1, True, ["ugly", "dark"])
        self.scheduler.set_timesteps(STEPS)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
        x = x * self.scheduler.init_noise_sigma
        for i, t in enumerate(self.scheduler.timesteps):
            z = self.scheduler.scale_model_input(x, t)
            c, u = (self.unet(z, t, encoder_hidden_states=e).sample for e in (cond, uncond))
            x = self.stepped(x, t, u, c, i)
        return x


def twice(formula, apart=False):
    class Changed(Twice):
        pass

    Changed.formula, Changed.apart = formula, apart
    parts = {**tiny.sd().components, "scheduler": EDMEulerScheduler()}
    pipe = Changed(**parts, requires_safety_checker=False)
    pipe.unet.conv_out.weight.mul_(3)
    return pipe


def test_a_step_of_every_branch_for_its_x0_is_let_pass():
    pipe = twice(lambda p, u, c, x, i: cfg(u, c))
    plain = pipe()
    with sampler.guide(pipe, {"name": "cfg", "scale": S}) as hook:
        assert (pipe() - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert hook.nfe == [2 * STEPS] * 2 and type(pipe.scheduler) is EDMEulerScheduler
    with sampler.guide(pipe, {"name": "cfg", "scale": 5.0}):
        wanted = twice(lambda p, u, c, x, i: cfg(u, c, 5.0))()
        assert (pipe() - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    with sampler.guide(pipe, {"name": "cfg", "scale": S, "window": [0, 2]}) as hook:
        wanted = twice(lambda p, u, c, x, i: cfg(u, c) if i < 2 else c)()
        assert (pipe() - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(
    ("formula", "apart", "match"),
    [
        (lambda p, u, c, x, i: cfg(u, c).clamp(-1, 1), False, "cannot replace the guidance"),
        (lambda p, u, c, x, i: 1.1 * cfg(u, c), False, "cannot replace the guidance"),
        (lambda p, u, c, x, i: cfg(u, c), True, "steps the branches of its network apart"),
    ],
)
def test_other_steps_of_every_branch_are_refused(formula, apart, match):
    pipe = twice(formula, apart)
    with pytest.raises(ValueError, match=match), sampler.guide(pipe, {"name": "cfg", "scale": S}):
        pipe()


def test_second_order_steps_keep_their_levels():
    pipe = built(lambda p, u, c, x, i: cfg(u, c), scheduler=HeunDiscreteScheduler(**tiny.BETAS))
    plain = pipe()
    with sampler.guide(pipe, {"name": "cfg", "scale": S}):
        assert (pipe() - plain).abs().max() <= 1e-5 * plain.abs().max()
