"""Ways to call a guided pipeline: counts, embeddings, callbacks, interruption, half precision."""

import pytest
import torch
from diffusers import EDMEulerScheduler, StableDiffusionControlNetPipeline
from diffusers.models.attention_processor import AttnProcessor2_0

import sampler
from tests import tiny
from tests.guidance.stock import Rows
from tests.guidance.stock_hosted import controlnet, half_mask, inpaint, picture

pytestmark = pytest.mark.filterwarnings("ignore")
CFG = {"name": "cfg", "scale": 4.0}


def run(pipe, prompt="a fox", images=1, **options):
    count = images * (len(prompt) if isinstance(prompt, list) else 1)
    given = {"prompt": prompt, "guidance_scale": 4.0, "num_inference_steps": 4, **options}
    return pipe(
        num_images_per_prompt=images,
        generator=[torch.Generator().manual_seed(s) for s in range(count)],
        output_type="latent",
        height=32,
        width=32,
        **given,
    ).images


def embeddings(pipe):
    cond, uncond = pipe.encode_prompt("a fox", "cpu", 1, True, "ugly")
    return {"prompt": None, "prompt_embeds": cond, "negative_prompt_embeds": uncond}


def brighter(_pipe, step, _t, kwargs):
    return {"latents": kwargs["latents"] + 0.1 * step}


def stops(pipe, step, _t, kwargs):
    pipe._interrupt = step == 1
    return kwargs


CALLS = {
    "one": lambda pipe: {},
    "three": lambda pipe: {"prompt": ["a", "b", "c"]},
    "two images per prompt": lambda pipe: {"prompt": ["a fox", "a dog"], "images": 2},
    "embeddings": embeddings,
    "latents changed by a callback": lambda pipe: {"callback_on_step_end": brighter},
    "interrupted": lambda pipe: {"callback_on_step_end": stops},
}


def state_of(pipe):
    """Traces that a call could leave: classes, names, hooks, settings and weights."""
    parts = {k: part for k, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    modules = [module for part in parts.values() for module in part.modules()]
    hooks = [(len(one._forward_hooks), len(one._forward_pre_hooks)) for one in modules]
    owners = (pipe, pipe.scheduler, *modules)
    kept = [(type(one), sorted(vars(one))) for one in owners]
    weights = {f"{k}.{n}": v.clone() for k, p in parts.items() for n, v in p.state_dict().items()}
    return (kept, hooks, dict(pipe.scheduler.config)), weights


@pytest.mark.parametrize("name", CALLS)
def test_cfg_is_the_stock_call(name):
    pipe = tiny.sd()
    options = CALLS[name](pipe)
    plain = run(pipe, **options)
    before, weights = state_of(pipe)
    with sampler.guide(pipe, CFG) as calls:
        guided = run(pipe, **options)
        steps = 2 if name == "interrupted" else 4
        assert calls.nfe == [2 * steps] * len(plain)
    assert (guided - plain).abs().max() <= 1e-5 * plain.abs().max()
    after, kept = state_of(pipe)
    assert after == before and all(torch.equal(kept[name], weights[name]) for name in weights)
    assert torch.equal(run(pipe, **options), plain)


def test_guidance_that_is_switched_off_midway_leaves_cond_only():
    """The documented callback of diffusers for dynamic CFG."""

    def off(pipe, step, _t, kwargs):
        if step == 1:
            pipe._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
        return kwargs

    pipe = tiny.sd()
    options = {
        "callback_on_step_end": off,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    plain = run(pipe, **options)
    with sampler.guide(pipe, CFG) as calls:
        guided = run(pipe, **options)
        assert calls.nfe == [2 * 2 + 2]
    assert (guided - plain).abs().max() <= 1e-5 * plain.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_the_stock_call(dtype):
    pipe = tiny.sd().to(dtype)
    plain = run(pipe).float()
    with sampler.guide(pipe, CFG) as calls:
        guided = run(pipe).float()
    assert calls.nfe == [8] and (guided - plain).abs().max() <= 0.05 * plain.abs().max()


def test_edm_levels_are_served():
    pipe = tiny.sd(scheduler=EDMEulerScheduler())
    plain = run(pipe)
    with sampler.guide(pipe, CFG):
        guided = run(pipe)
    assert (guided - plain).abs().max() <= 1e-5 * plain.abs().max()
    with sampler.guide(pipe, {"name": "apg", "scale": 9.0, "norm_threshold": 2.0}):
        assert (run(pipe) - plain).abs().max() > 1e-3 * plain.abs().max()


def test_rows_leave_the_call_beside_a_mask_and_a_controlnet():
    rule = {"name": "adaptive", "rule": CFG, "threshold": -1.0}
    for pipe, options in (
        (inpaint(), {"image": picture(), "mask_image": half_mask()}),
        (controlnet(), {"image": picture()}),
    ):
        seen = []
        handle = pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        with sampler.guide(pipe, rule) as calls:
            run(pipe, ["a fox", "a dog"], **options)
        handle.remove()
        assert sum(seen) == sum(calls.nfe) < 16 and min(seen) == 2


class Own(AttnProcessor2_0):
    """An attention processor that diffusers does not ship: its networks are evaluated in full."""


def both_controls():
    """Two ControlNets beside a batch of one, whose call has two rows too."""
    pipe = controlnet()
    other = controlnet(seed=1).controlnet
    parts = {**pipe.components, "controlnet": [pipe.controlnet, other]}
    pipe = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    return pipe, {"image": [picture(), picture(1)], "controlnet_conditioning_scale": [0.5, 0.9]}


@pytest.mark.parametrize("build", [lambda: (controlnet(), {"image": picture()}), both_controls])
@pytest.mark.parametrize("prompt", ["a fox", ["a fox", "a dog"]])
def test_controlnets_leave_out_the_rows_of_their_network(build, prompt):
    """Their answers for these rows are read by nothing; the images are those of full calls."""
    rule = {"name": "adaptive", "rule": CFG, "threshold": -1.0}
    pipe, options = build()
    if isinstance(prompt, list) and isinstance(options["image"], list):
        options["image"] = [[one, one] for one in options["image"]]
    nets = getattr(pipe.controlnet, "nets", [pipe.controlnet])
    counted = [Rows(part) for part in (pipe.unet, *nets)]
    with sampler.guide(pipe, rule) as calls:
        cut = run(pipe, prompt, **options)
    assert [sum(one.rows) for one in counted] == [sum(calls.nfe)] * len(counted)
    assert sum(calls.nfe) < 8 * len(calls.nfe)
    for net in nets:
        net.set_attn_processor(Own())
    for one in counted:
        one.rows.clear()
    with sampler.guide(pipe, rule):
        full = run(pipe, prompt, **options)
    assert [sum(one.rows) for one in counted[1:]] == [8 * len(calls.nfe)] * len(nets)
    assert (cut - full).abs().max() <= 1e-5 * full.abs().max()


def test_guess_mode_is_refused_before_any_call():
    pipe = controlnet()
    with sampler.guide(pipe, CFG), pytest.raises(ValueError, match="cannot serve guess_mode"):
        run(pipe, image=picture(), guess_mode=True)
