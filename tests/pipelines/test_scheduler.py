"""The drop-in: the engine's latents bit for bit inside stock pipelines, saved and loaded."""

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image

import sampler
from sampler import registry
from sampler.core.noise import Noise
from tests import tiny
from tests.laws.world import FLOW_ONLY

SEEDS = (3, 4)
PROMPTS = ["a red fox", "a blue door"]
SAMPLERS = [
    *(
        name
        for name in registry.names("sampler")
        if name not in {"reddiff", "daps", "admm", "difface", *FLOW_ONLY}
    ),
    {"name": "ddim", "eta": 1.0},
    {"name": "ab", "order": 4},
    {"name": "ab", "order": 3, "steps": "variable"},
    {"name": "ghvb", "momentum_number": 3.8},
    {"name": "heavy_ball", "base": "unipc", "beta": 0.8},
]
PIPELINES = {
    "sd": tiny.sd,
    "zero_snr": lambda: tiny.sd("zero_snr"),
    "euler": lambda: tiny.sd(scheduler=EulerDiscreteScheduler(**tiny.BETAS)),
    "dpm": lambda: tiny.sd(scheduler=DPMSolverMultistepScheduler(**tiny.BETAS)),
    "sdxl": tiny.sdxl,
    "pixart": tiny.pixart,
}


def generators():
    return [torch.Generator().manual_seed(s) for s in SEEDS]


def engine_latents(pipe, method, steps=5, scale=4.0, **options):
    result = sampler.load(pipe).generate(
        PROMPTS,
        seeds=list(SEEDS),
        steps=steps,
        sampler=method,
        guidance={"name": "cfg", "scale": scale},
        batch_size=2,
        output="latent",
        **options,
    )
    return result.latents


def stock_latents(pipe, steps=5, scale=4.0, **options):
    return pipe(
        PROMPTS,
        num_inference_steps=steps,
        guidance_scale=scale,
        generator=generators(),
        output_type="latent",
        **options,
    ).images


@pytest.mark.parametrize("method", SAMPLERS, ids=str)
def test_bit_equal_on_stable_diffusion(method):
    pipe = tiny.sd()
    ours = engine_latents(pipe, method)
    pipe.scheduler = sampler.scheduler(method, pipe.scheduler)
    for _ in range(2):  # history is reset by set_timesteps: the second call is the first again
        assert torch.equal(stock_latents(pipe), ours)


@pytest.mark.parametrize("name", PIPELINES)
def test_bit_equal_on_every_family(name):
    pipe = PIPELINES[name]()
    method = {"name": "ghvb", "momentum_number": 2.5}
    ours = engine_latents(pipe, method)
    pipe.scheduler = sampler.scheduler(method, pipe.scheduler)
    options = {"use_resolution_binning": False} if name == "pixart" else {}
    assert torch.equal(stock_latents(pipe, **options), ours)
    assert len(pipe.scheduler.timesteps) == 5 == len(set(pipe.scheduler.timesteps.tolist()))


def test_it_is_ddim_where_it_is_ddim():
    pipe = tiny.sd()
    stock = stock_latents(pipe)
    pipe.scheduler = sampler.scheduler("ddim", pipe.scheduler)
    assert torch.equal(stock_latents(pipe), stock)
    pipe.scheduler = sampler.scheduler({"name": "ghvb", "momentum_number": 1.0}, pipe.scheduler)
    assert torch.allclose(stock_latents(pipe), stock, atol=1e-5)


@pytest.mark.parametrize("build", [tiny.sd3, tiny.flux])
def test_flow_matching_pipelines(build):
    """Order 1 is the stock Euler scheduler; a momentum sampler runs and is another."""
    pipe = build()
    call = {"num_inference_steps": 4, "output_type": "latent", "height": 32, "width": 32}

    def run():
        return pipe("a fox", generator=torch.Generator().manual_seed(1), **call).images

    stock = run()
    pipe.scheduler = sampler.scheduler({"name": "ghvb", "momentum_number": 1.0}, pipe.scheduler)
    assert torch.allclose(run(), stock, atol=1e-5)
    pipe.scheduler = sampler.scheduler("ghvb", pipe.scheduler)
    assert run().isfinite().all() and not torch.allclose(run(), stock, atol=1e-3)


@pytest.mark.parametrize("name", ["sd", "euler", "sdxl", "pixart"])
def test_reloaded_from_disk_on_every_family(name, tmp_path):
    pipe, method = PIPELINES[name](), {"name": "heavy_ball", "momentum_number": 2.7}
    ours = engine_latents(pipe, method)
    pipe.scheduler = sampler.scheduler(method, pipe.scheduler)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    options = {"use_resolution_binning": False} if name == "pixart" else {}
    assert torch.equal(stock_latents(again, **options), ours)


def test_saved_and_loaded_with_its_pipeline(tmp_path):
    pipe = tiny.sd("v")
    method = {"name": "ghvb", "momentum_number": 2.5}
    pipe.scheduler = sampler.scheduler(method, pipe.scheduler)
    before = stock_latents(pipe)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is type(pipe.scheduler)
    assert again.scheduler.method == pipe.scheduler.method
    assert torch.equal(stock_latents(again), before)
    assert torch.equal(engine_latents(again, method), before)
    other = sampler.scheduler("ddim", again.scheduler)  # a drop-in in the place of a drop-in
    assert other.config["base"] == pipe.scheduler.config["base"]
    assert other.config.prediction_type == "v_prediction"


def test_half_precision_keeps_its_state_in_float32():
    pipe = tiny.sd()
    drop = sampler.scheduler({"name": "ab", "order": 4}, pipe.scheduler)
    whole = sampler.scheduler({"name": "ab", "order": 4}, pipe.scheduler)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    y = x.float()
    for one in (drop, whole):
        one.set_timesteps(6)
    for t in drop.timesteps:
        out = torch.sin(3 * y).half()
        x = drop.step(out, t, x).prev_sample
        y = whole.step(out.float(), t, y).prev_sample
        assert x.dtype == torch.float16 and torch.equal(x, y.half())


def test_a_half_precision_sample_that_the_pipeline_changed_is_taken_as_it_is():
    """Inpainting pipelines blend the known part in between two steps."""
    drop = sampler.scheduler("ddim", tiny.sd().scheduler)
    drop.set_timesteps(4)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    out = torch.zeros_like(x)  # no noise: every step multiplies x with a ratio of alphas
    once = drop.step(out, drop.timesteps[0], x).prev_sample
    again = drop.step(out, drop.timesteps[1], 0.5 * once).prev_sample
    levels = drop.schedule.grid(4)
    ratio = levels[2].alpha / levels[1].alpha
    assert torch.allclose(again.float(), 0.5 * once.float() * ratio, rtol=2e-3)


def test_every_run_has_the_seeds_of_its_own_generators():
    drop = sampler.scheduler({"name": "ddim", "eta": 1.0}, tiny.sd().scheduler)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    drop.set_timesteps(4)
    span, plain = drop.schedule.grid(4), sampler.build("sampler", {"name": "ddim", "eta": 1.0})
    pred = sampler.Prediction.from_eps(x, x, span[0])
    move = plain.step(x, pred, sampler.Span(0, span[0], span[1]), ())
    for seed in (7, 20):  # one generator for all rows: row b has its seed + b
        drop.set_timesteps(4)
        one = torch.Generator().manual_seed(seed)
        noise = Noise((seed, seed + 1)).draw(0, x)
        expected = sampler.settle(move.mean) + move.std * noise
        ours = drop.step(x, drop.timesteps[0], x, generator=one).prev_sample
        assert torch.allclose(ours, expected, atol=1e-6)


def test_the_last_step_gives_what_the_sampler_finishes_with(monkeypatch):
    drop = sampler.scheduler("ddim", tiny.sd().scheduler)
    monkeypatch.setattr(type(drop.method), "finish", lambda self, x, state: x + 1)
    x = torch.ones(1, 4, 8, 8)
    ends = []
    drop.set_timesteps(2)
    for t in drop.timesteps:
        x = drop.step(torch.zeros_like(x), t, x).prev_sample
        ends.append(x)
    levels = drop.schedule.grid(2)
    first = levels[1].alpha / levels[0].alpha
    assert torch.allclose(ends[0], torch.full_like(x, first))
    assert torch.allclose(ends[1], torch.full_like(x, 1 / levels[0].alpha + 1))


def test_edm_networks_see_a_scaled_input():
    """DDIM on Karras' levels is the stock Euler scheduler, and scales x as it does."""
    stock = EDMEulerScheduler()
    drop = sampler.scheduler("ddim", stock)
    stock.set_timesteps(6)
    drop.set_timesteps(6)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = theirs = x * drop.init_noise_sigma
    assert drop.init_noise_sigma == pytest.approx(float(stock.init_noise_sigma), rel=1e-6)
    for t, u in zip(drop.timesteps, stock.timesteps, strict=True):
        seen, wanted = drop.scale_model_input(ours, t), stock.scale_model_input(theirs, u)
        assert torch.allclose(seen, wanted, rtol=1e-4, atol=1e-5) and not torch.equal(seen, ours)
        out = torch.tanh(wanted)
        ours = drop.step(out, t, ours).prev_sample
        theirs = stock.step(out, u, theirs).prev_sample
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_noise_for_flow_matching_starts_midway():
    drop = sampler.scheduler("ddim", tiny.sd3().scheduler)
    drop.set_timesteps(4)
    x0, noise = torch.ones(2, 4, 8, 8), torch.full((2, 4, 8, 8), 3.0)
    level = drop.schedule.grid(4)[2]
    started = drop.scale_noise(x0, drop.timesteps[2:3].repeat(2), noise)
    assert torch.allclose(started, level.alpha * x0 + level.sigma * noise)


def test_image_to_image_starts_midway():
    pipe = tiny.sd()
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
    other = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)

    def run():
        return other(
            "a fox",
            image,
            strength=0.6,
            num_inference_steps=10,
            output_type="latent",
            generator=torch.Generator().manual_seed(2),
        ).images

    stock = run()
    for method in ({"name": "ghvb", "momentum_number": 1.0}, "heun"):
        other.scheduler = sampler.scheduler(method, pipe.scheduler)
        same = torch.allclose(run(), stock, atol=1e-5)
        assert same == (method != "heun")


def test_custom_timesteps():
    drop = sampler.scheduler("ghvb", tiny.sd().scheduler)
    drop.set_timesteps(timesteps=[900, 500, 100])
    assert drop.timesteps.tolist() == [900, 500, 100]
    with pytest.raises(ValueError, match="must fall"):
        drop.set_timesteps(timesteps=[801, 801, 1])
    drop.set_timesteps(3)
    x = torch.zeros(1, 4, 8, 8)
    drop.step(x, drop.timesteps[0], x)
    with pytest.raises(ValueError, match="not the next one"):
        drop.step(x, drop.timesteps[0], x)


@pytest.mark.parametrize(
    "dynamic", [{}, {"use_dynamic_shifting": True}, {"time_shift_type": "linear"}]
)
def test_timesteps_and_sigmas_of_flow_matching_are_the_stock_ones(dynamic):
    """CogView4 gives timesteps, sigmas and mu on every call (diffusers #14013, #14461)."""
    dynamic = {**dynamic, "use_dynamic_shifting": bool(dynamic)}
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0, **dynamic)
    drop = sampler.scheduler("ddim", stock)
    times = [1000.0, 700.0, 333.0, 20.0]
    mu = {"mu": 1.3} if dynamic["use_dynamic_shifting"] else {}
    for given in (
        {"timesteps": times, "sigmas": [0.9, 0.6, 0.3, 0.1]},
        {"timesteps": times},
        {"sigmas": [0.9, 0.6, 0.3, 0.1]},
    ):
        for scheduler in (stock, drop):
            scheduler.set_timesteps(**given, **mu)
        assert drop.timesteps.tolist() == pytest.approx(stock.timesteps.tolist(), rel=1e-6)
        assert drop.sigmas.tolist() == pytest.approx(stock.sigmas.tolist(), rel=1e-6)
    for given in ({"sigmas": [0.9, 0.1]}, {"num_inference_steps": 3}):
        with pytest.raises(ValueError, match="agree in length"):
            drop.set_timesteps(timesteps=times, **given, **mu)
    with pytest.raises(ValueError, match="must fall"):
        drop.set_timesteps(timesteps=times, sigmas=[0.9, 0.9, 0.3, 0.1], **mu)


def test_timesteps_and_sigmas_together_are_refused_for_vp_levels():
    drop = sampler.scheduler("ddim", tiny.sd().scheduler)
    with pytest.raises(ValueError, match="not both"):
        drop.set_timesteps(timesteps=[900, 100], sigmas=[0.9, 0.1])


def test_repeated_timesteps_have_the_levels_of_their_positions():
    """Karras' ramp is rounded to timesteps, which repeat near the clean end."""
    stock = DPMSolverMultistepScheduler(**tiny.BETAS, use_karras_sigmas=True)
    drop = sampler.scheduler("ddim", stock)
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    for begin in (95, 97, 99):
        noises = []
        for scheduler in (stock, drop):
            scheduler.set_timesteps(100)
            scheduler.set_begin_index(begin)
            noises.append(scheduler.add_noise(zero, one, scheduler.timesteps[begin : begin + 1]))
        assert len(set(drop.timesteps.tolist())) < 100
        assert torch.allclose(*noises, rtol=1e-4)


def refiner_and_base(method):
    base = tiny.sdxl()
    parts = {
        name: part
        for name, part in base.components.items()
        if name not in ("image_encoder", "feature_extractor")
    }
    refiner = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    refiner.set_progress_bar_config(disable=True)
    base.scheduler = refiner.scheduler = sampler.scheduler(method, base.scheduler)
    return base, refiner


def in_two_parts(base, refiner, **options):
    call = {"prompt": "a", "num_inference_steps": 11, "output_type": "latent", **options}
    seed = torch.Generator().manual_seed(0)
    half = base(**call, height=32, width=32, generator=seed, denoising_end=0.5).images
    return refiner(**call, image=half, denoising_start=0.5, generator=seed).images


def test_a_refiner_goes_on_where_the_base_stopped():
    base, refiner = refiner_and_base("ddim")
    seed = torch.Generator().manual_seed(0)
    one = base("a", num_inference_steps=11, output_type="latent", height=32, width=32,
               generator=seed).images  # fmt: skip
    assert torch.allclose(in_two_parts(base, refiner), one, atol=1e-4)


def test_a_refiner_with_two_evaluations_per_step_is_refused():
    """The cut falls between the two: diffusers #5447."""
    with pytest.raises(ValueError, match="heun evaluates each step twice.*one evaluation"):
        in_two_parts(*refiner_and_base("heun"))


def test_the_channels_of_a_learned_variance_are_dropped():
    """As pixel models have them (IF); a size error before."""
    stock = DDPMScheduler(**tiny.BETAS, variance_type="learned_range")
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    out = torch.cat([torch.sin(x), torch.ones_like(x)], 1)
    drop = sampler.scheduler("ddim", stock)
    ends = []
    for given in (out, out[:, :3]):
        drop.set_timesteps(4)
        ends.append(drop.step(given, drop.timesteps[0], x).prev_sample)
    assert torch.equal(*ends)
    plain = sampler.scheduler("ddim", DDPMScheduler(**tiny.BETAS))
    plain.set_timesteps(4)
    with pytest.raises(ValueError, match=r"output has shape \(2, 6, 8, 8\)"):
        plain.step(out, plain.timesteps[0], x)


def test_refusals(tmp_path):
    base = tiny.sd().scheduler
    Image.new("RGB", (32, 32)).save(tmp_path / "in.png")
    plain = {"name": "reddiff", "operator": "denoise", "y": str(tmp_path / "in.png")}
    with pytest.raises(ValueError, match="starts from an x of its own"):
        sampler.scheduler(plain, base)
    y = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="plain data"):
        sampler.scheduler({"name": "reddiff", "operator": "denoise", "y": y}, base)
    with pytest.raises(ValueError, match="needs a flow-matching model"):
        sampler.scheduler({"name": "ghvb", "space": "flow"}, base)
    with pytest.raises(ValueError, match="looked up by generate"):
        sampler.scheduler({"name": "ghvb", "momentum_number": "calibrated:x.json"}, base)
    from diffusers import ScoreSdeVeScheduler

    with pytest.raises(ValueError, match="has no levels that a sampler"):
        sampler.scheduler("ghvb", ScoreSdeVeScheduler())


def test_other_arguments_of_a_step_are_neutral_or_refused_by_name():
    drop = sampler.scheduler("ab", EulerDiscreteScheduler(**tiny.BETAS))
    x = torch.randn(2, 4, 8, 8)
    drop.set_timesteps(4)
    t = drop.timesteps[0]
    plain = drop.step(x, t, x).prev_sample
    neutral = {"s_churn": 0.0, "s_noise": 1.0, "per_token_timesteps": None}
    drop.set_timesteps(4)
    assert torch.equal(drop.step(x, t.expand(2), x, **neutral).prev_sample, plain)
    drop.set_timesteps(4)
    for name, value in (("s_churn", 0.5), ("per_token_timesteps", x), ("r_timestep", t)):
        with pytest.raises(ValueError, match=f"{name} is an argument of EulerDiscreteSched"):
            drop.step(x, t, x, **{name: value})
    with pytest.raises(ValueError, match="at different timesteps"):
        drop.step(x, drop.timesteps[:2], x)
    assert torch.equal(drop.step(x, t, x).prev_sample, plain)


def test_a_result_that_is_not_finite_is_an_error():
    drop_in = sampler.scheduler("ddim", tiny.sd().scheduler)
    drop_in.set_timesteps(2)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    broken = torch.zeros_like(x)
    broken[1, 0, 0, 0] = float("nan")
    x = drop_in.step(broken, drop_in.timesteps[0], x).prev_sample
    with pytest.raises(sampler.SamplerError, match="not finite after the last step of ddim"):
        drop_in.step(broken, drop_in.timesteps[1], x)
