"""`sampler.guide`: any rule inside unmodified stock pipelines."""

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)

import sampler
from sampler.types import Cond, Level
from tests import tiny
from tests.guidance.stock import PROMPTS, SCALE, STOCK, Rows

pytestmark = pytest.mark.filterwarnings("ignore")
APG = {"name": "apg", "scale": 9.0, "norm_threshold": 2.0, "momentum": -0.5}
CFG = {"name": "cfg", "scale": SCALE}


@pytest.fixture(params=STOCK)
def stock(request):
    return STOCK[request.param]


def close(a, b, bar=1e-5):
    return float((a - b).abs().max()) <= bar * float(b.abs().max())


def test_cfg_in_the_hook_is_the_stock_pipeline(stock):
    pipe = stock.build()
    own_norm = "Qwen" in type(pipe).__name__  # this pipeline sets each token's norm to that of c
    rule = {**CFG, "match_norm": [-1]} if own_norm else CFG
    plain = stock.run(pipe)
    with sampler.guide(pipe, rule) as calls:
        hooked, other_scale = stock.run(pipe), stock.run(pipe, scale=7.7)
        assert calls.nfe == [10, 10]
    assert close(hooked, plain) if own_norm else torch.equal(hooked, plain)
    assert torch.equal(other_scale, hooked)
    assert torch.equal(stock.run(pipe), plain)
    with sampler.guide(pipe, {**CFG, "scale": 5.0}):
        assert not close(stock.run(pipe), plain, 1e-3)


def engine_run(stock, pipe, rule):
    """The same run by the engine's loop, on the network as the pipeline calls it."""
    network = getattr(pipe, stock.network)
    seen = []

    def see(module, args, kwargs):
        seen.append((args, kwargs))

    handle = network.register_forward_pre_hook(see, with_kwargs=True)
    stock.run(pipe)
    handle.remove()
    two = 2 if not stock.sequential else 1
    first = seen[0][0][0] if seen[0][0] else seen[0][1]["hidden_states"]
    rows = first.shape[0] // two
    unit = 1 / 1000 if stock.sequential else 1

    def fn(x, level, which):
        """One branch after the other, each in a call like the pipeline's own."""
        outs = []
        for row, name in zip(x.split(rows), which.view(-1, rows)[:, 0].tolist(), strict=True):
            args, kwargs = seen[0 if two == 2 or name else 1]
            t = torch.as_tensor(level.t * unit)
            half = torch.cat([row] * two)
            if len(args) > 1:
                args = (half, t)
            else:
                name_of_x = {} if args else {"hidden_states": half}
                args = (half,) if args else ()
                kwargs = {**kwargs, **name_of_x, "timestep": t.expand(half.shape[0])}
            with torch.no_grad():
                out = network(*args, **kwargs)
            out = out[0] if isinstance(out, tuple) else out.sample
            if two == 2:
                cond_first = "DiT" in type(pipe).__name__
                out = out[:rows] if bool(name) == cond_first else out[rows:]
            outs.append(out[:, : x.shape[1]])
        return torch.cat(outs)

    times = pipe.scheduler.timesteps.tolist()
    schedule = sampler.Schedule.from_config(pipe.scheduler.config, type(pipe.scheduler).__name__)
    last = Level(0, 1.0, 0.0)
    levels = [*(schedule.level(t)._replace(t=t) for t in times), last]
    engine = sampler.Engine(sampler.denoiser(fn, stock.kind))
    cond = Cond(cond=torch.ones(rows), uncond=torch.zeros(rows))
    return engine.run(first[:rows], levels, cond, "ddim", rule)


@pytest.mark.parametrize("name", [n for n in STOCK if n != "dit"])
def test_apg_in_the_hook_is_apg_in_the_engine(name):
    stock = STOCK[name]
    pipe = stock.build()
    with sampler.guide(pipe, APG):
        hooked = stock.run(pipe)
    own = engine_run(stock, pipe, APG)
    assert hooked.shape == own.shape and close(hooked, own, 2e-5)
    assert not close(engine_run(stock, pipe, CFG), own, 1e-2)


def test_apg_in_the_hook_is_apg_in_the_engine_for_dit():
    stock = STOCK["dit"]
    pipe = stock.build()
    with sampler.guide(pipe, APG):
        hooked = stock.run(pipe)
    latents = engine_run(stock, pipe, APG)
    image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    image = (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert close(hooked, image, 1e-4)
    assert not close(stock.run(pipe), image, 1e-2)


def test_the_unconditional_half_is_skipped(stock):
    pipe = stock.build()
    counted = Rows(getattr(pipe, stock.network))
    plain = stock.run(pipe)
    assert sum(counted.rows) == 20
    counted.rows.clear()
    with sampler.guide(pipe, {**CFG, "window": [0, 3]}) as calls:
        windowed = stock.run(pipe)
    assert calls.nfe == [8, 8] and sum(counted.rows) == 16
    assert not close(windowed, plain, 1e-4)
    counted.rows.clear()
    with sampler.guide(pipe, {**CFG, "scale": 1.0}) as calls:
        stock.run(pipe)
    # the first step is evaluated in full: the pipeline's formula is solved from it
    assert calls.nfe == [6, 6] and sum(counted.rows) == 12


def test_rows_that_converge_leave_the_call_one_by_one():
    stock = STOCK["sd_v"]
    pipe = stock.build()
    counted = Rows(pipe.unet)
    rule = {"name": "adaptive", "rule": CFG}
    per_row = []
    for threshold in (-0.2, 0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99):
        counted.rows.clear()
        with sampler.guide(pipe, {**rule, "threshold": threshold}) as calls:
            stock.run(pipe, seeds=(1, 2))
        assert sum(calls.nfe) == sum(counted.rows)
        per_row.append(tuple(calls.nfe))
    assert len(set(per_row)) > 1


def test_every_run_starts_anew(stock):
    pipe = stock.build()
    rule = {"name": "adaptive", "rule": APG, "threshold": 0.5}
    with sampler.guide(pipe, rule) as calls:
        runs = [(stock.run(pipe), list(calls.nfe)) for _ in range(2)]
        stock.run(pipe, seeds=(5, 6))
        again = stock.run(pipe)
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]
    assert torch.equal(again, runs[0][0])


def test_an_interrupted_run_leaves_nothing_behind(stock):
    pipe = stock.build()
    network = getattr(pipe, stock.network)
    with sampler.guide(pipe, APG):
        expected = stock.run(pipe)
    calls = []

    def stop(module, args, kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = network.register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt), sampler.guide(pipe, APG):
        stock.run(pipe)
    handle.remove()
    with sampler.guide(pipe, APG):
        assert torch.equal(stock.run(pipe), expected)


@pytest.mark.parametrize(
    "scheduler", [EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler]
)
def test_other_schedulers_keep_their_levels(scheduler):
    pipe = tiny.sd(scheduler=scheduler(**tiny.BETAS))
    stock = STOCK["sd"]
    plain = stock.run(pipe)
    seen = []
    with sampler.guide(pipe, CFG) as calls:
        original = calls.levels.span

        def span(index, t):
            seen.append((float(torch.as_tensor(t).flatten()[0]), original(index, t)))
            return seen[-1][1]

        calls.levels.span = span
        assert torch.equal(stock.run(pipe), plain)
    assert all(abs(told - at.now.t) < 1e-3 for told, at in seen)
    assert all(at.next.sigma <= at.now.sigma for _, at in seen)
    assert [at.index for _, at in seen] == list(range(len(seen)))


def test_repeated_timesteps_have_the_levels_of_their_positions():
    scheduler = DPMSolverMultistepScheduler(
        **tiny.BETAS, use_karras_sigmas=True, final_sigmas_type="sigma_min"
    )
    pipe = tiny.sd(scheduler=scheduler)
    seen = []
    with sampler.guide(pipe, CFG) as calls:
        original = calls.levels.span
        calls.levels.span = lambda index, t: seen.append(original(index, t)) or seen[-1]
        pipe("a", num_inference_steps=100, output_type="latent")
    ratios = [level.sigma / level.alpha for level in (*(s.now for s in seen), seen[-1].next)]
    assert len(set(pipe.scheduler.timesteps.tolist())) < 100
    assert ratios == pytest.approx(pipe.scheduler.sigmas.tolist(), rel=1e-6)


def test_a_rule_that_leaves_the_first_step_out():
    """The network is called, since the formula is solved there, and the rule ignores its answer."""
    for name in ("sd3", "flux"):
        stock = STOCK[name]
        pipe = stock.build()
        counted = Rows(getattr(pipe, stock.network))
        with sampler.guide(pipe, {"name": "cfg_zero", "scale": SCALE}) as calls:
            out = stock.run(pipe)
        assert out.isfinite().all() and calls.nfe == [10, 10] and sum(counted.rows) == 20


def test_refused_with_a_reason_before_any_call():
    pipe = tiny.sd()
    counted = Rows(pipe.unet)
    for rule, words in (
        ("autoguidance", "weak"),
        ("gfcg", "classifier is needed"),
        ("classifier", "classifier is needed"),
    ):
        with pytest.raises(ValueError, match=words), sampler.guide(pipe, rule):
            pass
    with sampler.guide(pipe, CFG):
        with pytest.raises(ValueError, match="guided already"), sampler.guide(pipe, CFG):
            pass
        with pytest.raises(ValueError, match="guidance_scale > 1"):
            pipe(**PROMPTS, guidance_scale=1.0, num_inference_steps=2)
        with pytest.raises(ValueError, match="rescale in the rule"):
            pipe(**PROMPTS, guidance_rescale=0.7, num_inference_steps=2)
    with sampler.guide(pipe, "cfg_zero"), pytest.raises(ValueError, match="not a flow model"):
        STOCK["sd"].run(pipe)
    assert counted.rows == []


def test_what_is_no_pipeline_is_refused():
    with pytest.raises(sampler.SamplerError, match="Rows, which has no scheduler") as error:
        with sampler.guide(object.__new__(Rows), CFG):
            pass
    assert error.value.code == 6


def test_skip_layer_guidance_is_refused():
    stock = STOCK["sd3"]
    pipe = stock.build()
    with sampler.guide(pipe, CFG), pytest.raises(ValueError, match="skip-layer"):
        stock.run(pipe, skip_guidance_layers=[0], skip_layer_guidance_stop=1.0)


@pytest.mark.parametrize("name", ["pixart", "dit"])
def test_pipelines_that_do_not_tell_are_refused_without_guidance(name):
    stock = STOCK[name]
    pipe = stock.build()
    with sampler.guide(pipe, CFG), pytest.raises(ValueError, match="guidance_scale > 1"):
        stock.run(pipe, scale=1.0)


def test_true_cfg_that_is_off_is_told():
    stock = STOCK["flux"]
    pipe = stock.build()
    with pytest.raises(ValueError, match="true_cfg_scale > 1"), sampler.guide(pipe, CFG):
        stock.run(pipe, negative_prompt=None)


def test_bfloat16_pipelines_run():
    pipe = tiny.sd().to(torch.bfloat16)
    stock = STOCK["sd"]
    with sampler.guide(pipe, APG):
        out = stock.run(pipe)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
