"""The engine's own loop against the stock pipelines' `__call__`: same latents, same images."""

import copy

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)

import sampler
from sampler.bundled import FOLDER
from sampler.pipelines import adapt, supported
from tests import tiny

PROMPTS = ["a red fox", "two green apples", "the sea at night"]
NEGATIVE = ["", "blurry", "a dog"]
SIZE = {"height": 24, "width": 40}
STEPS = 5
PIXART = {"use_resolution_binning": False, "clean_caption": False}

BUILD = {
    "sd-eps": lambda **o: tiny.sd(**o),
    "sd-v": lambda **o: tiny.sd("v", **o),
    "sd-zero-snr": lambda **o: tiny.sd("zero_snr", **o),
    "sd-tiny-vae": lambda **o: tiny.sd(tiny_vae=True, **o),
    "sdxl": tiny.sdxl,
    "sdxl-no-zeros": lambda **o: tiny.sdxl(force_zeros=False, **o),
    "pixart-sigma": tiny.pixart,
    "pixart-alpha": tiny.pixart_alpha,
}


def engine(pipe):
    adapter = adapt(pipe)
    return sampler.Engine(adapter, adapter)


def stock(pipe, prompts, scale, negative=None, steps=STEPS, output="latent", **options):
    """Latents (or images [B, 3, H, W] in [0, 1]) of the stock pipeline, one generator per image."""
    if "PixArt" in type(pipe).__name__:
        options = {**PIXART, **options}
        negative = [""] * len(prompts) if negative is None else negative
    generators = [torch.Generator("cpu").manual_seed(7 + i) for i in range(len(prompts))]
    # The call leaves traces in the pipeline (its scale, its scheduler): use a copy.
    return copy.deepcopy(pipe)(
        prompts,
        negative_prompt=negative,
        guidance_scale=scale,
        num_inference_steps=steps,
        generator=generators,
        output_type={"latent": "latent", "tensor": "pt"}[output],
        **{**SIZE, **options},
    ).images


def ours(pipe, prompts, scale, negative=None, steps=STEPS, output="latent", **options):
    made = engine(pipe).generate(
        prompts,
        negative=negative,
        seeds=list(range(7, 7 + len(prompts))),
        steps=steps,
        guidance={"name": "cfg", "scale": scale},
        output=output,
        **{**SIZE, **options},
    )
    return made.latents if output == "latent" else made.images


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("family", BUILD)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("negative", [False, True])
def test_ddim_and_cfg_equal_the_stock_pipeline_to_the_bit(family, count, negative):
    pipe = BUILD[family]()
    against = NEGATIVE[-count:] if negative else None
    if negative and family == "sdxl" and count == 3:
        against = ["a cat", "blurry", "a dog"]  # stock zeroes "" in all rows or in none
    prompts = PROMPTS[:count]
    wanted = stock(pipe, prompts, 5.0, against)
    made = ours(pipe, prompts, 5.0, against)
    assert made.shape[-2:] == (12, 20)
    assert torch.equal(made, wanted)
    # The comparison can fail: other scales and other prompts give other latents.
    assert relative(ours(pipe, prompts, 4.0, against), wanted) > 1e-3
    assert relative(ours(pipe, PROMPTS[-count:][::-1], 5.0, against), wanted) > 1e-3


@pytest.mark.parametrize("family", BUILD)
def test_scale_one_is_one_pass_and_equals_the_stock_pipeline(family):
    pipe = BUILD[family]()
    made = engine(pipe).generate(
        PROMPTS,
        seeds=[7, 8, 9],
        steps=STEPS,
        guidance={"name": "cfg", "scale": 1.0},
        output="latent",
        **SIZE,
    )
    assert torch.equal(made.latents, stock(pipe, PROMPTS, 1.0))
    assert made.nfe == [STEPS] * 3


@pytest.mark.parametrize("family", BUILD)
def test_decoded_images_equal_the_stock_pipelines(family):
    pipe = BUILD[family]()
    wanted = stock(pipe, PROMPTS[:2], 5.0, output="tensor")
    made = ours(pipe, PROMPTS[:2], 5.0, output="tensor")
    assert made.shape == (2, 3, 24, 40)
    assert torch.equal(made, wanted)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_stock_euler_is_our_ddim_on_its_levels(spacing, karras, prediction):
    scheduler = EulerDiscreteScheduler(
        **tiny.BETAS,
        timestep_spacing=spacing,
        use_karras_sigmas=karras,
        prediction_type=prediction,
        steps_offset=1,
    )
    for build in (tiny.sd, tiny.sdxl):
        pipe = build(scheduler=scheduler)
        wanted = stock(pipe, PROMPTS, 5.0)
        assert relative(ours(pipe, PROMPTS, 5.0), wanted) < 1e-5


def test_stock_first_order_dpm_solver_is_our_ddim_on_its_levels():
    scheduler = DPMSolverMultistepScheduler(**tiny.BETAS, solver_order=1, steps_offset=1)
    pipe = tiny.pixart(scheduler=scheduler)
    assert relative(ours(pipe, PROMPTS, 5.0), stock(pipe, PROMPTS, 5.0)) < 1e-5


@pytest.mark.parametrize("rescale", [0.7])
def test_guidance_rescale_equals_the_stock_pipeline(rescale):
    pipe = tiny.sd("zero_snr")
    wanted = stock(pipe, PROMPTS, 7.5, guidance_rescale=rescale)
    made = engine(pipe).generate(
        PROMPTS,
        seeds=[7, 8, 9],
        steps=STEPS,
        guidance={"name": "cfg", "scale": 7.5, "rescale": rescale},
        output="latent",
        **SIZE,
    )
    assert relative(made.latents, wanted) < 1e-5
    assert relative(ours(pipe, PROMPTS, 7.5), wanted) > 1e-3


def test_the_bundled_pipeline_equals_stock_to_the_bit():
    pipe = DiffusionPipeline.from_pretrained(
        FOLDER / "pipeline", local_files_only=True, dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a red apple on a blue background", "a dog on a white background"]
    options = {"height": 64, "width": 64, "steps": 10}
    assert torch.equal(ours(pipe, prompts, 3.0, **options), stock(pipe, prompts, 3.0, **options))


def test_a_row_alone_equals_the_same_row_in_a_batch_to_tolerance():
    pipe = tiny.sd()
    together = ours(pipe, PROMPTS, 5.0)
    made = engine(pipe).generate(
        PROMPTS[1],
        seeds=[8],
        steps=STEPS,
        guidance={"name": "cfg", "scale": 5.0},
        output="latent",
        **SIZE,
    )
    assert relative(made.latents[0], together[1]) < 1e-5


def test_mixed_empty_negatives_are_zeroed_per_row_on_sdxl():
    pipe = tiny.sdxl()
    made = ours(pipe, PROMPTS, 5.0, NEGATIVE)
    zeros = ours(pipe, PROMPTS, 5.0)
    texts = ours(pipe, PROMPTS, 5.0, ["x", *NEGATIVE[1:]])
    assert relative(made[0], zeros[0]) < 1e-5
    assert relative(made[1:], texts[1:]) < 1e-5
    assert relative(made[1:], zeros[1:]) > 1e-3


@pytest.mark.parametrize("family", ["sd-v", "sdxl", "pixart-sigma"])
def test_gradients_reach_the_network(family):
    pipe = BUILD[family]()
    e = engine(pipe)
    adapter = e.pipeline
    adapter.network.requires_grad_(True)
    cond = adapter.encode(PROMPTS[:2], ["", ""], True, (24, 40))
    x = torch.randn(2, 4, 12, 20, generator=torch.Generator().manual_seed(0))
    grid = adapter.grid(3, (24, 40))
    rule = {"name": "cfg", "scale": 3.0}
    out = e.run(x, grid, cond, guidance=rule, grad=True)
    loss = adapter.decode(out).mean()
    loss.backward()
    # The last block's bias moves the output directly: its derivative against finite differences.
    bias = [p for n, p in adapter.network.named_parameters() if n.endswith("bias")][-1]
    index = int(bias.grad[:4].abs().argmax())
    with torch.no_grad():
        h = 1e-2
        sides = []
        for step in (h, -2 * h):
            bias[index] += step
            sides.append(adapter.decode(e.run(x, grid, cond, guidance=rule)).mean().item())
    slope = (sides[0] - sides[1]) / (2 * h)
    assert bias.grad[index].item() == pytest.approx(slope, rel=0.05)
    assert all(
        torch.isfinite(p.grad).all() for p in adapter.network.parameters() if p.grad is not None
    )


def test_sdxl_decodes_float16_vaes_in_float32_and_leaves_them_as_they_are():
    pipe = tiny.sdxl()
    pipe.vae.register_to_config(force_upcast=True)
    pipe.vae.half()
    latents = torch.randn(1, 4, 12, 20, generator=torch.Generator().manual_seed(0))
    made = adapt(pipe).decode(latents)
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float16}
    full = copy.deepcopy(pipe.vae).float()
    wanted = full.decode(latents / full.config.scaling_factor).sample / 2 + 0.5
    assert torch.equal(made, wanted.clamp(0, 1))


def test_sdxl_latents_with_mean_and_std_decode_as_stock_does():
    pipe = tiny.sdxl()
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.1, 0.9, 1.3, 0.7]
    pipe.vae.register_to_config(latents_mean=mean, latents_std=std)
    wanted = stock(pipe, PROMPTS[:1], 5.0, output="tensor")
    assert torch.equal(ours(pipe, PROMPTS[:1], 5.0, output="tensor"), wanted)


def fingerprint(pipe):
    """Everything of a pipeline that a caller could see changing."""
    seen = {k: repr(v) for k, v in vars(pipe).items() if not isinstance(v, torch.nn.Module)}
    seen["attributes"] = sorted(vars(pipe))
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            seen[name] = [(k, v.clone(), v.dtype, v.device) for k, v in part.state_dict().items()]
            seen[name + ".mode"] = [m.training for m in part.modules()]
            if "text" not in name:  # transformers hooks its own models when it wants their states
                seen[name + ".hooks"] = [len(m._forward_hooks) for m in part.modules()]
            if hasattr(part, "attn_processors"):
                seen[name + ".processors"] = {k: id(v) for k, v in part.attn_processors.items()}
        if hasattr(part, "config"):
            seen[name + ".config"] = repr(part.config)
    seen["scheduler"] = {k: repr(v) for k, v in vars(pipe.scheduler).items()}
    return seen


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


@pytest.mark.parametrize("family", ["sd-eps", "sdxl", "pixart-alpha"])
def test_the_given_pipeline_is_not_modified(family):
    pipe = BUILD[family]()
    before = fingerprint(pipe)
    e = sampler.load(pipe)
    e.generate(PROMPTS[:1], seeds=1, steps=2, output="tensor", **SIZE)
    after = fingerprint(pipe)
    assert [k for k in before if not same(before[k], after[k])] == []
    # The comparison sees what the stock call leaves behind.
    if family != "pixart-alpha":
        pipe(PROMPTS[0], num_inference_steps=2, output_type="latent", **SIZE)
        assert not same(before, fingerprint(pipe))


def test_other_pipelines_are_refused_by_name():
    pipe = tiny.flux()
    pipe.__class__ = type("FluxFillPipeline", (type(pipe),), {})
    with pytest.raises(sampler.SamplerError, match="FluxFillPipeline is not a supp") as caught:
        adapt(pipe)
    assert caught.value.code == 6
    for name in supported():
        assert name in str(caught.value)


def test_an_image_prompt_is_refused():
    pipe = tiny.sd()
    pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    with pytest.raises(sampler.SamplerError, match="unload_ip_adapter") as caught:
        adapt(pipe)
    assert caught.value.code == 6


def test_a_scheduler_without_known_levels_is_a_model_error():
    scheduler = EulerDiscreteScheduler(**tiny.BETAS, interpolation_type="log_linear")
    with pytest.raises(sampler.SamplerError, match="interpolation_type") as caught:
        adapt(tiny.sd(scheduler=scheduler))
    assert caught.value.code == 6


def test_sizes_that_the_latents_cannot_have_are_refused():
    for family, size in (("sd-eps", 20), ("sd-eps", 0), ("sd-eps", -8), ("pixart-sigma", 12)):
        with pytest.raises(ValueError, match="height = .* multiple of 8"):
            adapt(BUILD[family]()).size(size, None)
    assert adapt(tiny.sd()).size(None, 40) == (32, 40)


def test_a_weak_network_is_a_second_model():
    pipe, other = tiny.sd(), tiny.sd(seed=1).unet
    adapter = adapt(pipe, other)
    assert adapter.models == ("main", "weak")
    cond = adapter.encode(PROMPTS[:1], [""], False, (24, 40))
    x = torch.randn(1, 4, 12, 20, generator=torch.Generator().manual_seed(0))
    span = sampler.Span(0, *adapter.grid(5, (24, 40))[:2])
    branches = {
        "cond": sampler.Branch(cond.cond),
        "weak": sampler.Branch(cond.cond, model="weak"),
    }
    nfe = [0]
    made = adapter(x, span, branches, nfe)
    level = span.now
    text = cond.cond["encoder_hidden_states"]
    for name, network in (("cond", pipe.unet), ("weak", other)):
        assert torch.equal(made[name].out.tensor(), network(x, level.t, text).sample)
    assert nfe == [2]


def test_the_device_is_the_networks_or_what_offloading_says():
    pipe = tiny.sd()
    assert adapt(pipe).device == torch.device("cpu") == pipe._execution_device
    pipe.unet.to("meta")
    assert adapt(pipe).device.type == "meta"
    pipe.unet._hf_hook = object()  # as accelerate marks what it offloads
    assert adapt(pipe).device == pipe._execution_device
