"""Every family of pipelines: the engine against the stock `__call__`, and what else it is used for.

The table that these tests run over, and the document that is written from it: `tests/families.py`.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import sampler
import sampler.pipelines.families
from sampler.pipelines import supported
from tests.families import DOCUMENT, FAMILIES, relative, table

APG = {"name": "apg", "scale": 3.0, "eta": 0.5, "norm_threshold": 0.0, "momentum": -0.5}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def equal(family, made, wanted, guided=True):
    """To the bit where the stock pipeline makes the same calls, else to 1e-5 of the largest."""
    if family.exact or (not guided and family.noise is None and family.latents is not None):
        return torch.equal(made, wanted)
    return relative(made, wanted) <= 1e-5


def test_every_supported_pipeline_is_in_the_table():
    known = {name for family in FAMILIES.values() for name in family.classes}
    assert set(supported()) == known


def test_the_document_is_what_these_tests_say():
    assert DOCUMENT.read_text(encoding="utf-8") == table()


def test_guided_latents_equal_the_stock_pipelines(family):
    pipe = family.build()
    engine = family.engine(pipe)
    result = family.ours(engine)
    made, wanted = family.compared(result, engine), family.stock(pipe)
    assert made.shape == wanted.shape and made.isfinite().all()
    assert equal(family, made, wanted)
    assert result.nfe == [family.steps * (1 + family.guided)] * 2


def test_two_rules_give_different_latents(family):
    engine = family.engine(family.build())
    wanted = family.ours(engine).latents
    if family.guided:
        other = family.ours(engine, guidance=APG).latents
    elif isinstance(family.prompts[0], str) and family.prompts[0]:  # not in the stock pipeline
        other = family.ours(engine, guidance=APG, negative=["blurry", "a dog"]).latents
    else:  # no branch to guide by: two samplers
        with pytest.raises(ValueError, match="guid"):
            family.ours(engine, guidance=APG)
        other = family.ours(engine, sampler={"name": "ddim", "eta": 0.5}).latents
    assert relative(other, wanted) > 1e-3


def test_unguided_latents_equal_the_stock_pipelines(family):
    if not family.guided:
        pytest.skip("tested above")
    pipe = family.build()
    engine = family.engine(pipe)
    result = family.ours(engine, 1.0, negative=None)
    wanted = family.stock(pipe, 1.0)
    assert equal(family, family.compared(result, engine), wanted, guided=False)
    assert result.nfe == [family.steps] * 2


def test_decoded_images_equal_the_stock_pipelines(family):
    pipe = family.build()
    engine = family.engine(pipe)
    made = family.ours(engine, 1.0, "pt", negative=None).images
    wanted = family.stock(pipe, 1.0, "pt")
    assert made.shape == wanted.shape
    assert relative(made, wanted) <= 1e-5
    assert 0 <= made.min() and made.max() <= 1 and made.std() > 0


def test_the_engines_defaults_are_the_stock_pipelines(family):
    """Without any option but the size: the stock scale, rule and sampler."""
    pipe = family.build()
    engine = family.engine(pipe)
    assert engine.sampler.name == engine.pipeline.default_sampler
    scale = engine.guidance.scale if engine.guidance.name == "cfg" else 1.0
    again = family.stock(pipe, scale)
    negative = {"negative": None} if scale == 1 else {}
    made = family.ours(engine, scale, guidance=engine.guidance, **negative)
    assert relative(family.compared(made, engine), again) <= 1e-5


def test_rows_of_a_batch_equal_single_runs(family):
    """Rows of different prompts, at two scales."""
    engine = family.engine(family.build())
    for scale in (2.0, 5.0) if family.guided else (1.0,):
        together = family.ours(engine, scale).latents
        for row in (0, 1):
            alone = family.ours(engine, scale, rows=(row,)).latents
            # With another neighbour, which the network's kernels do not see in their shapes.
            beside = family.ours(engine, scale, rows=(row, row)).latents
            assert relative(beside[row], together[row]) <= 1e-5
            # Alone they round by another path: 1.4e-5 was seen on a processor without AVX-512.
            assert relative(alone[0], together[row]) <= 5e-5
    if family.prompts[0] != family.prompts[1]:
        other = family.ours(engine, scale, rows=(0, 0)).latents[1]
        assert relative(other, together[1]) > 1e-4


def test_gradients_reach_the_network(family):
    engine = family.engine(family.build())
    adapter = engine.pipeline
    adapter.network.requires_grad_(True)
    prompts = [str(p) for p in family.prompts]
    cond = adapter.encode(prompts, ["", ""], family.guided, family.size)
    x = torch.randn(
        2, *adapter.latent_shape(*family.size), generator=torch.Generator().manual_seed(0)
    )
    grid = adapter.grid(2, family.size)
    out = engine.run(
        x * adapter.schedule.initial_scale(grid),
        grid,
        cond,
        sampler=family.sampler,
        guidance=family.rule(engine, 3.0),
        grad=True,
    )
    adapter.decode(out).square().mean().backward()
    grads = [p.grad for p in adapter.network.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in grads)
    assert sum(float(g.abs().sum()) for g in grads) > 0
    assert len(grads) > 0.5 * len(list(adapter.network.parameters()))


def test_image_to_image_starts_from_the_encoded_image(family):
    engine = family.engine(family.build())
    adapter = engine.pipeline
    image = torch.rand(1, 3, *family.size, generator=torch.Generator().manual_seed(0))
    if family.frames is not None:
        adapter.frames = 1
    back = family.ours(engine, image=image, strength=0.0)
    assert back.nfe == [0, 0]
    with torch.no_grad():
        assert torch.equal(back.latents[:1], adapter.latents_of(image))
    # what decoding undoes is what encoding did
    adapter.pixels = lambda vae, latents: latents
    if hasattr(adapter.pipe, "vae"):
        with torch.no_grad():
            video = adapter.pipe.vae.config.get("latents_mean") is not None
            encoded = adapter.encoded(image[:, :, None] if video else image)
            unscaled = adapter.decode(back.latents[:1])
            assert (
                relative(unscaled, encoded[:, :, 0] if unscaled.ndim == 4 and video else encoded)
                <= 1e-5
            )
    del adapter.pixels
    half = family.ours(engine, image=image, strength=0.5)
    kept = int(0.5 * family.steps)
    assert half.nfe == [kept * (1 + family.guided)] * 2
    assert relative(half.latents, back.latents) > 1e-3
    assert relative(half.latents, family.ours(engine).latents) > 1e-3


def test_wrong_sizes_are_refused(family):
    adapter = family.engine(family.build()).pipeline
    with pytest.raises(ValueError, match="multiple of|pixels only"):
        adapter.size(family.size[0] + 1, None)
    height, width = adapter.size(None, None)
    assert height % adapter.unit == 0 and width % adapter.unit == 0


def test_a_scheduler_of_another_kind_is_refused(family):
    adapter = family.engine(family.build()).pipeline
    if "vp" in adapter.processes:
        return
    pipe = family.build()
    pipe.scheduler = tiny_ddim()
    with pytest.raises((sampler.SamplerError, KeyError)) as caught:
        sampler.load(pipe)
    assert type(pipe).__name__ in str(caught.value)


def tiny_ddim():
    from diffusers import DDIMScheduler

    from tests import tiny

    return DDIMScheduler(**tiny.DDIM)


def test_the_drop_in_scheduler_gives_the_engines_latents(family):
    method = {"name": "ghvb", "momentum_number": 2.5}
    pipe = family.build()
    if reason := family.refused.get("scheduler"):
        with pytest.raises(ValueError, match=f"(?i){reason}"):
            sampler.scheduler(method, pipe.scheduler)
        return
    engine = family.engine(pipe)
    wanted = family.compared(family.ours(engine, sampler=method), engine)
    plain = family.stock(pipe)
    pipe.scheduler = sampler.scheduler(method, pipe.scheduler)
    assert relative(family.stock(pipe), wanted) <= 1e-5
    assert relative(plain, wanted) > 1e-4


def test_a_drop_in_of_other_levels_is_refused_in_flow_pipelines(family):
    """A velocity would be read as noise, without any error of the stock pipeline's."""
    pipe = family.build()
    if {"vp", "consistency"} & {*sampler.pipelines.families.processes(type(pipe).__name__)}:
        return
    if "scheduler" in family.refused:
        return
    pipe.scheduler = sampler.scheduler("ddim", tiny_ddim())
    with pytest.raises((ValueError, TypeError), match="scale_model_input|sigmas"):
        family.stock(pipe)


def test_a_rule_in_the_hook_is_the_rule_in_the_engine(family):
    pipe = family.build()
    if reason := family.refused.get("hook"):
        with pytest.raises(ValueError, match=reason), sampler.guide(pipe, APG):
            family.stock(pipe, copied=False)
        return
    engine = family.engine(pipe)
    wanted = family.compared(family.ours(engine, guidance=APG), engine)
    plain = family.stock(pipe)
    with sampler.guide(pipe, APG) as calls:
        made = family.stock(pipe, 7.7, copied=False)
    assert calls.nfe == [2 * family.steps] * 2
    assert relative(made, wanted) <= 2e-5
    assert relative(plain, wanted) > 1e-4
    with sampler.guide(pipe, {"name": "cfg", "scale": 3.0, "window": [0, 2]}) as calls:
        family.stock(pipe, 7.7, copied=False)
    again = family.name == "Wan with two networks"  # the first step of each is evaluated in full
    assert calls.nfe == [family.steps + 2 + again] * 2
    assert relative(family.stock(pipe), plain) == 0  # nothing is left behind


def test_the_hook_refuses_what_it_cannot_see(family):
    """Guidance that is off, and levels of another kind."""
    if "hook" in family.refused:
        return
    pipe = family.build()
    with pytest.raises(ValueError, match="must be on"), sampler.guide(pipe, APG):
        family.stock(pipe, 1.0, copied=False)
    if "vp" not in sampler.pipelines.families.processes(type(pipe).__name__):
        pipe.scheduler = tiny_ddim()
        with pytest.raises(sampler.SamplerError, match="is trained with flow levels"):
            with sampler.guide(pipe, APG):
                pass


def test_fine_tuning_by_the_rewards_gradient(family, tmp_path):
    engine = family.engine(family.build())
    settings = {"steps": 2, "batch": 2, "lr": 1e-2, "checkpoint_every": 2}
    settings.update(height=family.size[0], width=family.size[1])

    def tune():
        return sampler.finetune(
            engine,
            trainer={"name": "alignprop", "truncation": "fixed", "k": 1},
            reward="brightness",
            prompts=[str(prompt) for prompt in family.prompts],
            out=tmp_path / "tune",
            updates=2,
            settings=settings,
        )

    if reason := family.refused.get("finetune"):
        with pytest.raises(ValueError, match=reason):
            tune()
        return
    before = {k: v.clone() for k, v in engine.pipeline.network.state_dict().items()}
    tune()
    log = (tmp_path / "tune" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["kept_steps"] for line in log if "kept_steps" in line] == [1, 1]
    tuned = sampler.load(engine.pipeline.pipe).pipeline.network.state_dict()
    assert all(torch.equal(before[k], tuned[k]) for k in before)
    weights = load_file(tmp_path / "tune" / "lora" / "pytorch_lora_weights.safetensors")
    assert any(float(v.abs().max()) > 0 for k, v in weights.items() if "lora_B" in k)


def test_a_measurement_is_restored_by_reddiff(family):
    engine = family.engine(family.build())
    y = torch.rand(1, 3, *family.size, generator=torch.Generator().manual_seed(0))
    rows = y.expand(2, -1, -1, -1)
    spec = {"name": "reddiff", "operator": "denoise", "y": rows, "lr": 0.05, "space": "image"}

    def restored():
        return family.ours(engine, 1.0, sampler=spec, negative=None)

    if reason := family.refused.get("reddiff"):
        with pytest.raises(ValueError, match=reason):
            restored()
        return
    made = restored()
    assert made.latents.isfinite().all() and made.nfe == [family.steps] * 2
    assert relative(made.latents, family.ours(engine, 1.0, negative=None).latents) > 1e-2


def test_videos_are_lists_of_frames():
    family = FAMILIES["Wan (text to video)"]
    engine = family.engine(family.build())
    videos = family.ours(engine, output="pil").images
    assert [len(frames) for frames in videos] == [5, 5]
    assert videos[0][0].size == (family.size[1], family.size[0])
    engine.pipeline.frames = 4
    with pytest.raises(ValueError, match="1 more than a multiple of 2"):
        family.ours(engine)


def test_classes_are_numbers_or_labels():
    pipe = FAMILIES["DiT"].build()
    pipe.labels = {"goldfish": 1}
    engine = sampler.load(pipe)
    options = {"seeds": 3, "steps": 2, "output": "latent"}
    same = [engine.generate(prompt, **options).latents for prompt in (1, "1", "goldfish", [1])]
    assert all(torch.equal(same[0], other) for other in same[1:])
    result = engine.generate(1, **options)
    assert torch.equal(engine.generate(**result.config).latents, result.latents)
    for bad in ("shark", "1000", -1, ""):
        with pytest.raises(ValueError, match="is not a class of this model"):
            engine.generate(bad, **options)
    with pytest.raises(ValueError, match="no negative prompt"):
        engine.generate(1, negative="x", **options)


def test_what_unconditional_models_are_not_given():
    engine = sampler.load(FAMILIES["DDIM, unconditional"].build())
    assert len(engine.generate("", n=3, steps=2).images) == 3
    with pytest.raises(ValueError, match="takes no prompt"):
        engine.generate("a fox", steps=2)
    with pytest.raises(ValueError, match="cannot be guided"):
        engine.generate("", steps=2, guidance={"name": "cfg", "scale": 2.0})


@pytest.mark.parametrize("name", ["Flux (guidance embedding)", "Flux 2"])
def test_the_network_is_told_a_scale(name):
    """The rule "embedded" is the stock guidance_scale of distilled networks."""
    family = FAMILIES[name]
    pipe = family.build()
    engine = family.engine(pipe)
    told = replace(family, call={"guidance_scale": 1.5}, scale=(None, 0.0))
    options = {"guidance": {"name": "embedded", "scale": 1.5}, "negative": None}
    made = family.compared(family.ours(engine, **options), engine)
    assert torch.equal(made, told.stock(pipe))
    assert relative(family.compared(family.ours(engine, 1.0, negative=None), engine), made) > 1e-4
    with pytest.raises(ValueError, match="does not take the guidance scale"):
        other = FAMILIES["Stable Diffusion 3"]
        other.ours(other.engine(other.build()), **options)
