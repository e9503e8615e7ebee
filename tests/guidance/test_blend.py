"""Blending with an image: both ends exact, masks from files and words, and what is refused."""

import pytest
import torch
from PIL import Image

import sampler
from sampler import registry
from sampler.core.images import read
from sampler.core.word_maps import word_maps
from tests.analytic import vp_grid
from tests.laws.world import FLOW_ONLY, SHAPE, Counting, buildable, cond, grid, noise, spec

ONES, ZEROS = torch.ones(2, 2), torch.zeros(2, 2)
GIVEN = torch.full((1, *SHAPE), 0.3, dtype=torch.float64)
CFG = {"name": "cfg", "scale": 3.0}
PROMPT = "a red apple on a blue background"


def blended(mask, rule=CFG, **fields):
    return {"name": "blend", "image": GIVEN, "mask": mask, "rule": rule, **fields}


def ran(method, rule, levels, prediction="eps"):
    engine = sampler.Engine(Counting(prediction).denoiser)
    return engine.run(noise(2), levels, cond(2), method, rule, seeds=[1, 2])


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("rule", ["none", CFG, "cfg_pp", {"name": "apg", "momentum": -0.5}])
def test_a_mask_of_one_is_the_inner_rule_bit_for_bit(rule, prediction):
    levels = vp_grid(6)
    assert torch.equal(
        ran("ddim", blended(ONES, rule), levels, prediction), ran("ddim", rule, levels, prediction)
    )


NO_END = {"reddiff", "daps", *FLOW_ONLY}  # fit a measurement; have noise in the last move


@pytest.mark.parametrize("name", [n for n in buildable("sampler") if n not in NO_END])
def test_every_sampler_ends_at_the_image_where_the_mask_is_zero(name):
    found = ran(spec("sampler", name), blended(ZEROS), grid(name, 20), "v")
    assert (found - GIVEN).abs().max() < 1e-3


def test_the_parts_of_a_mask_are_apart():
    mask = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    found = ran("ddim", blended(mask), vp_grid(8))
    assert (found[..., 0, 0] - 0.3).abs().max() < 1e-9
    assert (found[..., 1, 1] - 0.3).abs().min() > 1e-3


def test_one_step_by_the_equation():
    level, x = sampler.Level(500, 0.8, 0.6), noise(2)
    span = sampler.Span(0, level, sampler.Level(0, 1.0, 0.0))
    eps = noise(2).roll(1)
    mask = torch.tensor([[0.0, 0.25], [1.0, 0.5]], dtype=torch.float64)
    rule = sampler.build("guidance", blended(mask, "none"))
    state = rule.start(cond(2))
    pred, _ = rule.combine(x, {"cond": sampler.Prediction.from_eps(x, eps, level)}, span, state)
    right = mask * (x - 0.6 * eps) / 0.8 + (1 - mask) * GIVEN
    assert torch.allclose(sampler.settle(pred.x0), right, atol=1e-12)


def test_outside_the_window_the_inner_rule_runs_alone():
    rule = blended(ZEROS, window=(0, 0))
    assert torch.equal(ran("ddim", rule, vp_grid(5)), ran("ddim", CFG, vp_grid(5)))
    late = ran("ddim", blended(ZEROS, window=(4, 5)), vp_grid(5))
    assert (late - GIVEN).abs().max() < 1e-9  # the last step decides


@pytest.fixture(scope="module")
def engine():
    return sampler.load()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    home = tmp_path_factory.mktemp("blend")
    Image.new("RGB", (64, 64), (40, 160, 80)).save(home / "image.png")
    half = Image.new("L", (64, 64))
    half.paste(255, (32, 0, 64, 64))
    half.save(home / "mask.png")
    return {"image": str(home / "image.png"), "mask": str(home / "mask.png")}


def test_files_are_encoded_and_masks_averaged(engine, files):
    run = {"seeds": 1, "steps": 3, "output": "latent"}
    rule = {"name": "blend", **files, "rule": CFG}
    found = engine.generate(PROMPT, guidance=rule, **run)
    image = read(files["image"])
    right = engine.pipeline.latents_of(image)
    last = engine.pipeline.grid(3, (64, 64))[-1]  # this model's grid keeps its least noise
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    right = last.alpha * right + last.sigma * noise
    assert torch.allclose(found.latents[..., :8], right[..., :8], atol=1e-3)
    assert (found.latents[..., 8:] - right[..., 8:]).abs().max() > 0.1
    again = engine.generate(**found.config)
    assert torch.equal(again.latents, found.latents) and found.nfe == [6]
    tensors = {"name": "blend", "image": image, "mask": ONES.repeat(32, 32), "space": "image"}
    plain = engine.generate(PROMPT, guidance="none", **run)
    assert torch.equal(engine.generate(PROMPT, guidance=tensors, **run).latents, plain.latents)


def test_a_words_mask_is_that_of_the_step_before(engine, files):
    """Two steps: the second is blended by the attention that the first has recorded."""
    run = {"seeds": 1, "steps": 2, "output": "latent"}
    rule = {"name": "blend", "image": files["image"], "mask": {"word": "apple"}, "rule": CFG}
    with engine.pipeline.recording(attention=True) as seen:
        found = engine.generate(PROMPT, guidance=rule, **run)
    columns = engine.pipeline.word_tokens([PROMPT], "apple")
    layers = {name: values[0][1:] for name, values in seen.attention.items()}  # [uncond; cond]
    known = word_maps(layers, [columns], (16, 16))
    mask = (known > known.mean()).float()
    assert 0.05 < mask.mean() < 0.8 and found.nfe == [4]
    fixed = {
        "name": "blend",
        "image": engine.pipeline.latents_of(read(files["image"])),
        "mask": mask,
        "rule": CFG,
        "window": [1, 2],
    }
    right = engine.generate(PROMPT, guidance=fixed, **run)
    assert torch.allclose(found.latents, right.latents, atol=1e-5)
    bare = engine.generate(PROMPT, guidance=CFG, **run)
    assert (found.latents - bare.latents).abs().max() > 0.1


def test_a_weighted_map_costs_no_evaluation(engine, files):
    mask = {"word": "apple", "map": "grad", "threshold": 0.5}
    rule = {"name": "blend", "image": files["image"], "mask": mask, "rule": CFG}
    found = engine.generate(PROMPT, guidance=rule, seeds=1, steps=3)
    assert found.nfe == [6] and found.config["guidance"]["mask"] == mask


def test_refusals(engine, files, tmp_path):
    def fails(match, **fields):
        rule = {"name": "blend", **files, "rule": CFG, **fields}
        with pytest.raises(ValueError, match=match):
            engine.generate(PROMPT, guidance=rule, seeds=1, steps=2)

    fails("no field 'wrod' .did you mean 'word'", mask={"wrod": "apple"})
    fails("map = 'mean' must be", mask={"word": "apple", "map": "mean"})
    fails("needs a word", mask={"threshold": 1})
    fails("'pear' is not in the prompt", mask={"word": "pear"})
    Image.new("RGB", (32, 32)).save(tmp_path / "small.png")
    fails("the image is 32 x 32 pixels, the run 64 x 64", image=str(tmp_path / "small.png"))
    fails("does not cover latents", mask=torch.ones(3, 3))
    fails("2 rows for a batch of 1", mask=torch.ones(2, 1, 16, 16))
    bare = sampler.Engine(Counting().denoiser)
    with pytest.raises(ValueError, match=r"need generate\(\)"):
        bare.run(noise(1), vp_grid(2), cond(1), "ddim", {"name": "blend", **files})
    with pytest.raises(ValueError, match="set space='image'"):
        rule = registry.build("guidance", {**blended(ONES), "image": torch.zeros(1, 3, 4, 4)})
        bare.run(noise(1), vp_grid(2), cond(1), "ddim", rule)
