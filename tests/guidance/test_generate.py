"""Rules through `engine.generate`: what is bound before a run, calibration, classes, refusals."""

import warnings

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
)

import sampler
from sampler.bundled import concepts, prompts
from sampler.calibration.linear_ag import calibrate_linear_ag
from sampler.core.binding import network_hash
from sampler.guidance.linear_ag import default_policy
from sampler.guidance.linear_ag_coefficients import Coefficients
from sampler.pipelines.classes import (
    BundledClasses,
    CandidateClasses,
    clip_classifier,
    gfcg_for,
    image_classifier,
)
from tests import tiny
from tests.processes import Forked

CFG = {"name": "cfg", "scale": 3.0}
SMALL = {"steps": 4, "output": "latent", "seeds": 0, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def engine():
    return sampler.load(tiny.sd("zero_snr"), weak=tiny.sd("zero_snr", seed=5).unet)


@pytest.fixture(scope="module")
def bundled():
    return sampler.load()


@pytest.mark.parametrize("family", ["sd", "sdxl", "pixart"])
@pytest.mark.parametrize(
    "rule",
    [
        "none",
        CFG,
        {"name": "apg", "scale": 5.0},
        {"name": "adaptive", "rule": CFG, "threshold": 0.9},
        {"name": "adaptive", "rule": CFG, "threshold": 0.5, "after": "hold"},
        "autoguidance",
        {"name": "sum", "rules": [CFG, "autoguidance"]},
    ],
)
def test_rules_run_on_every_family(family, rule):
    pipe = getattr(tiny, family)()
    other = getattr(tiny, family)(seed=3)
    weak = other.unet if family != "pixart" else other.transformer
    engine = sampler.load(pipe, weak=weak)
    made = engine.generate(["a fox", "a car"], guidance=rule, **SMALL)
    assert made.latents.isfinite().all()
    again = engine.generate(**made.config)
    assert torch.equal(again.latents, made.latents) and again.nfe == made.nfe
    if isinstance(rule, dict) and rule["name"] == "apg":
        plain = engine.generate(["a fox", "a car"], guidance="none", **SMALL)
        one = engine.generate(["a fox", "a car"], guidance={**rule, "scale": 1.0}, **SMALL)
        assert torch.equal(one.latents, plain.latents) and one.nfe == [4, 4]
        assert not torch.allclose(made.latents, plain.latents, atol=1e-3)


def test_calibrated_coefficients_run_where_they_belong_and_nowhere_else(engine, tmp_path):
    texts = ["a fox", "two cars", "snow", "a tree", "red"]
    fitted = calibrate_linear_ag(engine, texts, scale=3.0, steps=6, policy=[1] * 6, batch_size=2)
    whole = calibrate_linear_ag(engine, texts, scale=3.0, steps=6, policy=[1] * 6, batch_size=5)
    for a, b in zip(fitted.uncond[-1], whole.uncond[-1], strict=True):
        assert abs(a - b) < 1e-2  # the batch only changes how the network rounds
    fitted.save(tmp_path / "k.json")
    rule = {"name": "linear_ag", "coefficients": str(tmp_path / "k.json")}
    small = {**SMALL, "steps": 6, "batch_size": 2, "height": None, "width": None}
    full = engine.generate(texts[:2], guidance=CFG, **small)
    real = engine.generate(texts[:2], guidance=rule, **small)
    assert torch.equal(real.latents, full.latents) and real.nfe == full.nfe
    policy = [1, 1, 1, 0, 1, 0]
    with pytest.raises(ValueError, match="fitted for policy"):
        sampler.build("guidance", {**rule, "policy": policy})
    with pytest.raises(ValueError, match="each of 6 steps"):
        calibrate_linear_ag(engine, texts, scale=3.0, steps=6, policy=[1, 0])
    other = calibrate_linear_ag(engine, texts, scale=3.0, steps=6, policy=policy)
    fewer = {"name": "linear_ag", "coefficients": other}
    some = engine.generate(texts[:2], guidance=fewer, **small)
    assert some.nfe == [10, 10]
    # these texts were among the calibration's: the regression must beat the conditional model
    plain = engine.generate(texts[:2], guidance="none", **small)
    assert (some.latents - full.latents).norm() < 0.2 * (plain.latents - full.latents).norm()
    with pytest.raises(ValueError, match="fitted for sampler"):
        engine.generate(texts[:2], guidance=rule, sampler="dpmpp_2m", **small)
    with pytest.raises(ValueError, match="fitted for 6 levels, not 5; run"):
        engine.generate(texts[:2], guidance=rule, **{**small, "steps": 5})
    with pytest.raises(ValueError, match="fitted for negative"):
        engine.generate(texts[:2], guidance=rule, negative="ugly", **small)
    with pytest.raises(ValueError, match="fitted for model"):
        sampler.load(tiny.sd("zero_snr", seed=9)).generate(texts[:2], guidance=rule, **small)


def test_calibration_from_the_command_line(tmp_path):
    tiny.sd("zero_snr").save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a fox\n\na car\n")
    given = ["--prompts", tmp_path / "prompts.txt", "--model", tmp_path / "model"]
    options = ["--out", tmp_path / "k.json", "--steps", "3", "--scale", "2", "-q"]
    done = Forked(["calibrate", "linear-ag", *given, *options], tmp_path).wait()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "k.json")
    known = Coefficients.load(tmp_path / "k.json")
    assert known.steps == 3 and known.keys["scale"] == 2.0 and known.keys["prompts"] == 2


def test_calibration_refuses_what_it_cannot_record(engine):
    with pytest.raises(ValueError, match="no prompts"):
        calibrate_linear_ag(engine, [], scale=3.0)
    with pytest.raises(ValueError, match="no unconditional pass"):
        calibrate_linear_ag(engine, ["a"], scale=1.0)


def test_a_negative_prompt_without_effect_is_told(engine):
    with pytest.warns(UserWarning, match="negative prompt has no effect"):
        engine.generate("a fox", negative="ugly", guidance={**CFG, "scale": 1.0}, **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        engine.generate("a fox", negative="ugly", guidance=CFG, **SMALL)


def test_gfcg_among_candidate_prompts(engine):
    candidates = ["a fox", "a car", "snow"]

    def brightness(images):
        mean = images.flatten(1).mean(1, keepdim=True)
        return 40 * mean * torch.tensor([1.0, -1.0, 0.5])

    rule = gfcg_for(engine, candidates, brightness, interval=None)
    made = engine.generate(["a fox", "a car"], guidance=rule, **SMALL)
    plain = engine.generate(["a fox", "a car"], guidance="none", **SMALL)
    assert 4 <= min(made.nfe) and 4 < max(made.nfe) <= 7
    assert not torch.equal(made.latents, plain.latents)
    with pytest.raises(ValueError, match="not one of the candidate"):
        engine.generate("a cow", guidance=rule, **SMALL)
    with pytest.raises(ValueError, match="at least two candidate"):
        gfcg_for(engine, ["a fox"], brightness)
    with pytest.raises(ValueError, match="classifier is needed"):
        engine.generate("a fox", guidance="gfcg", **SMALL)


def test_a_reference_is_the_same_prompt_with_another_class(engine):
    reader = CandidateClasses(engine.pipeline, ["a fox", "a car"], lambda images: images)
    found = reader.conditions(["a fox", "a fox"], (32, 32))(torch.tensor([1, 0]))
    expected = engine.pipeline.encode(["a car", "a fox"], ["", ""], False, (32, 32)).cond
    for key, value in expected.items():
        assert torch.equal(found[key], value)


def test_classes_of_the_bundled_model(bundled):
    reader = BundledClasses(bundled.pipeline)
    asked = prompts(len(concepts()))
    assert reader.target([p.text for p in asked]).tolist() == [p.concept for p in asked]
    other = reader.conditions([asked[0].text], (64, 64))(torch.tensor([5]))
    text = asked[0].text.replace(concepts()[asked[0].concept], concepts()[5])
    expected = bundled.pipeline.encode([text], [""], False, (64, 64)).cond
    assert torch.equal(other["encoder_hidden_states"], expected["encoder_hidden_states"])
    with pytest.raises(ValueError, match="names no concept"):
        reader.target(["a sunset"])


@pytest.mark.parametrize("rule", ["gfcg", "classifier"])
def test_rules_with_a_classifier_run_by_name_on_the_bundled_model(bundled, rule):
    texts = [p.text for p in prompts(2)]
    settings = {"seeds": 0, "steps": 4, "output": "latent"}
    made = bundled.generate(texts, guidance=rule, **settings)
    plain = bundled.generate(texts, guidance="none", **settings)
    assert made.latents.isfinite().all() and not torch.equal(made.latents, plain.latents)
    assert torch.equal(bundled.generate(**made.config).latents, made.latents)
    with pytest.raises(ValueError, match="names no concept"):
        bundled.generate("a sunset", guidance=rule, **settings)


def test_rules_inside_rules_are_bound_too(bundled, engine):
    texts = [p.text for p in prompts(2)]
    settings = {"seeds": 0, "steps": 4, "output": "latent"}
    made = bundled.generate(texts, guidance={"name": "sum", "rules": ["gfcg", CFG]}, **settings)
    assert made.latents.isfinite().all() and max(made.nfe) > 8
    with pytest.raises(ValueError, match="fitted for 20 levels, not 4"):
        bundled.generate(texts, guidance={"name": "adaptive", "rule": "linear_ag"}, **settings)


def test_clip_as_the_classifier(tmp_path):
    tokenizer = tiny.clip_tokenizer(16)
    text = tiny.clip_config(tokenizer).to_dict()
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 16,
    }
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)).eval()
    model.save_pretrained(tmp_path)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    CLIPProcessor(processor, tokenizer).save_pretrained(tmp_path)
    candidates = ["a fox", "a red car", "snow"]
    logits = clip_classifier(str(tmp_path), candidates)
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    given = tokenizer(candidates, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model(**given, pixel_values=(images - mean) / std).logits_per_image
    assert logits(images).shape == (2, 3)
    assert torch.allclose(logits(images), expected, atol=1e-4)
    leaf = images.clone().requires_grad_()
    logits(leaf).sum().backward()
    assert leaf.grad.abs().sum() > 0


def test_an_image_classifier_from_a_folder(tmp_path):
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        id2label={0: "fox", 1: "car", 2: "snow"},
        label2id={"fox": 0, "car": 1, "snow": 2},
    )
    torch.manual_seed(0)
    model = ResNetForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    images = torch.rand(2, 3, 32, 32)
    found = image_classifier(str(tmp_path), ["snow", "fox"])(images)
    with torch.no_grad():
        expected = model((images - 0.5) / 0.5).logits[:, [2, 0]]
    assert torch.allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match="no label 'dog'"):
        image_classifier(str(tmp_path), ["dog"])


def test_the_shipped_coefficients_belong_to_the_bundled_model(bundled):
    known = Coefficients.load("bundled")
    assert known.keys["model"] == network_hash(bundled.pipeline.network)
    texts = [p.text for p in prompts(2, start=900)]
    settings = {"seeds": 0, "output": "latent", "steps": 20}
    made = bundled.generate(texts, guidance="linear_ag", **settings)
    full = bundled.generate(texts, **settings)
    assert made.nfe == [20 + sum(default_policy(20))] * 2 and full.nfe == [40, 40]
    plain = bundled.generate(texts, guidance="none", **settings)
    assert (made.latents - full.latents).norm() < 0.7 * (plain.latents - full.latents).norm()
