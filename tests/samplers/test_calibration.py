"""Calibrated momentum numbers: found, written, looked up, and refused elsewhere."""

import json

import pytest
import torch

import sampler
from sampler.calibration.momentum import calibrate_momentum, chosen, save, squared_errors
from sampler.cli import main
from sampler.samplers.calibrated import BUNDLED, calibration_key, look_up, same
from tests import tiny
from tests.analytic import vp_grid

RULE = {"name": "cfg", "scale": 5.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    engine = sampler.load(tiny.sd())
    found = calibrate_momentum(
        engine, ["a", "b"], steps=[4], guidance=[RULE], numbers=[1.0, 2.5], batch_size=2, seed=7
    )
    path = tmp_path_factory.mktemp("calibration") / "momentum.json"
    save(found, path)
    return engine, found, path


def test_the_number_of_least_error_is_found(made):
    engine, found, _ = made
    (entry,) = found["entries"]
    errors = {float(m): e for m, e in entry["errors"].items()}
    assert set(errors) == {1.0, 1.8, 2.5} and entry["momentum_number"] in errors
    assert errors[entry["momentum_number"]] <= errors[1.8]
    options = {"seeds": 7, "guidance": RULE, "batch_size": 2, "output": "latent"}
    reference = {"name": "ghvb", "momentum_number": 1.8}
    exact = engine.generate(["a", "b"], steps=40, sampler=reference, **options).latents
    for number, error in errors.items():
        method = {"name": "ghvb", "momentum_number": number}
        latents = engine.generate(["a", "b"], steps=4, sampler=method, **options).latents
        gap = ((latents - exact).square().mean() / exact.square().mean()).sqrt()
        assert float(gap) == pytest.approx(error, abs=2e-6)  # six digits are stored


def test_generate_uses_and_records_it(made):
    engine, found, path = made
    options = {"seeds": [3], "steps": 4, "guidance": RULE, "output": "latent"}
    number = found["entries"][0]["momentum_number"]
    for name in ("ghvb",):
        method = {"name": name, "momentum_number": f"calibrated:{path}"}
        result = engine.generate("a", sampler=method, **options)
        assert result.config["sampler"]["momentum_number"] == number
        fixed = {"name": name, "momentum_number": number}
        assert torch.equal(engine.generate("a", sampler=fixed, **options).latents, result.latents)


@pytest.mark.parametrize(
    "change", [{"steps": 5}, {"guidance": {"name": "cfg", "scale": 4.0}}, {"guidance": "none"}]
)
def test_another_setting_is_refused(made, change):
    engine, _, path = made
    method = {"name": "ghvb", "momentum_number": f"calibrated:{path}"}
    options = {"steps": 4, "guidance": RULE, "sampler": method, **change}
    with pytest.raises(sampler.SamplerError, match="no momentum number for"):
        engine.generate("a", **options)


def test_another_sampler_model_and_file_are_refused(made, tmp_path):
    engine, found, path = made
    options = {"steps": 4, "guidance": RULE}
    method = {"name": "heavy_ball", "momentum_number": f"calibrated:{path}"}
    with pytest.raises(sampler.SamplerError, match="no momentum number for heavy_ball"):
        engine.generate("a", sampler=method, **options)
    method = {"name": "ghvb", "momentum_number": f"calibrated:{path}"}
    with pytest.raises(sampler.SamplerError, match="was calibrated for model"):
        sampler.load(tiny.sd(seed=1)).generate("a", sampler=method, **options)
    (tmp_path / "bad.json").write_text("{}")
    method["momentum_number"] = f"calibrated:{tmp_path / 'bad.json'}"
    with pytest.raises(sampler.SamplerError, match="not a readable momentum calibration"):
        engine.generate("a", sampler=method, **options)
    (tmp_path / "bad.json").write_text(json.dumps({**found, "format": 1}))
    with pytest.raises(sampler.SamplerError, match="is of format 1, and this version reads 2"):
        engine.generate("a", sampler=method, **options)


@pytest.mark.skipif(not BUNDLED.exists(), reason="no calibration is shipped with these weights")
def test_the_shipped_file_serves_the_bundled_model():
    engine = sampler.load()
    for steps in (8, 12, 20):
        for scale in (3.0, 7.5, 12.0):
            method = {"name": "ghvb", "momentum_number": "calibrated:bundled"}
            rule = {"name": "cfg", "scale": scale}
            result = engine.generate("a dog", steps=steps, sampler=method, guidance=rule, n=1)
            assert 0 < result.config["sampler"]["momentum_number"] <= 5
    stored = json.loads(BUNDLED.read_text())
    for entry in stored["entries"]:  # never more error than the default had
        assert entry["errors"][f"{entry['momentum_number']:g}"] <= entry["errors"]["1.8"]
    with pytest.raises(sampler.SamplerError):
        look_up("calibrated:bundled", "another", stored["entries"][0])


def test_the_scale_of_a_rule_in_a_rule_counts():
    levels = vp_grid(4)
    keys = [
        calibration_key(
            "ghvb", levels, {"name": "adaptive", "rule": {"name": "apg", "scale": scale}}
        )
        for scale in (3.0, 7.0)
    ]
    assert [(key.guidance, key.scale, key.steps) for key in keys] == [
        ("adaptive", 3.0, 4),
        ("adaptive", 7.0, 4),
    ]
    assert calibration_key("ghvb", levels, {"name": "none"}).scale == 1.0


def test_the_command(made, tmp_path, capsys):
    engine, _, _ = made
    (tmp_path / "prompts.txt").write_text("a dog\n\n")
    engine.pipeline.pipe.save_pretrained(tmp_path / "model")
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["calibrate", "momentum", "--prompts", str(tmp_path / "prompts.txt"), "-q"]
    arguments += ["--model", str(tmp_path / "model"), "--steps", "2", "--scale", "3"]
    assert main([*arguments, "-o", str(out), "--plot", str(plot)]) == 0, capsys.readouterr().err
    assert json.loads(out.read_text())["entries"][0]["steps"] == 2 and plot.stat().st_size > 1000


def test_a_number_is_chosen_only_beyond_noise():
    """Squared errors of the same images: what counts is their difference, image by image."""
    generator = torch.Generator().manual_seed(0)
    default = torch.rand(24, generator=generator, dtype=torch.float64) + 0.5
    always, by_one = 0.97 * default, default.clone()
    by_one[3] -= 0.4  # the least mean of all, from a single image
    found = {1.8: default, 2.0: always, 2.5: by_one}
    assert chosen(found) == 2.0
    assert chosen({1.8: default, 2.5: by_one}) == 1.8
    assert chosen({1.8: default, 2.0: 1.2 * default}) == 1.8
    assert chosen({m: e[:1] for m, e in found.items()}) == 1.8  # one image says nothing of noise
    diverged = squared_errors(torch.full((24, 2), torch.nan), torch.ones(24, 2))
    assert chosen({1.8: default, 3.0: diverged}) == 1.8
    assert chosen({1.8: diverged, 1.5: default}) == 1.5


def test_a_schedule_is_the_same_on_another_processor():
    """Levels differ there in their last digits; other betas differ in more."""
    levels, rule = vp_grid(4), {"name": "cfg", "scale": 3.0}
    near = [level._replace(alpha=level.alpha + 1e-6) for level in levels]
    far = [level._replace(alpha=level.alpha + 1e-4) for level in levels]
    here = calibration_key("ghvb", levels, rule)
    assert same(here, calibration_key("ghvb", near, rule)) and not same(
        here, calibration_key("ghvb", far, rule)
    )
    assert not same(here, calibration_key("ghvb", levels, {**rule, "scale": 4.0}))
    assert not same(here, calibration_key("ab", levels, rule))
