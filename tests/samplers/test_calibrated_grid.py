"""`sampler calibrate grid`: chosen on half of the prompts, confirmed on the others, looked up."""

import json

import pytest
import torch

import sampler
from sampler.calibration.grids import CANDIDATES, calibrate_grid, chosen
from sampler.calibration.momentum import save
from sampler.cli import main
from sampler.core.calibrated_grid import grid_of
from tests import tiny

RULE = {"name": "cfg", "scale": 3.0}
OPTIONS = {"seeds": 1, "steps": 3, "guidance": RULE, "output": "latent"}
KARRAS = {"name": "karras", "rho": 7.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    engine = sampler.load(tiny.sd())
    found = calibrate_grid(
        engine, list("abcd"), sampler="unipc", steps=[3], guidance=[RULE],
        candidates=["simple", KARRAS], seed=5,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("calibration") / "grid.json"
    return engine, found, path


def written(path, found, grid, **changed):
    """The file with this grid as the chosen one."""
    entry = {**found["entries"][0], "grid": grid}
    save({**found, "entries": [entry], **changed}, path)
    return f"calibrated:{path}"


def test_errors_are_distances_to_ten_times_the_steps(made):
    engine, found, _ = made
    (entry,) = found["entries"]
    assert [json.loads(key) for key in entry["errors"]] == [None, "simple", KARRAS]
    options = {"seeds": 5, "guidance": RULE, "output": "latent", "batch_size": 8}
    exact = engine.generate(list("abcd"), steps=30, sampler="dpmpp_2m", **options).latents
    for key, error in entry["errors"].items():
        grid = json.loads(key)
        made = engine.generate(list("abcd"), steps=3, sampler="unipc", grid=grid, **options).latents
        gap = float((made - exact).norm() / exact.norm())
        assert gap == pytest.approx(error, rel=1e-3)


def test_a_grid_is_chosen_only_if_the_other_half_confirms_it():
    own = 1 + 0.1 * torch.rand(16, generator=torch.Generator().manual_seed(0)).double()
    on_one_half = own.clone()
    on_one_half[::2] *= 0.5
    assert chosen(own, [1.1 * own, 0.9 * own]) == 1
    assert chosen(own, [on_one_half, 0.9 * own]) is None
    assert chosen(own, [1.01 * own]) is None


def test_generate_and_run_folders_look_it_up(made, tmp_path):
    engine, found, path = made
    spec = written(path, found, KARRAS)
    own = engine.generate("a", sampler="unipc", **OPTIONS).latents
    right = engine.generate("a", sampler="unipc", grid=KARRAS, **OPTIONS)
    result = engine.generate("a", sampler="unipc", grid=spec, **OPTIONS)
    assert torch.equal(result.latents, right.latents) and result.config["grid"] == KARRAS
    pixels = {"seeds": 1, "steps": 3, "guidance": RULE, "sampler": "unipc"}
    (image,) = engine.generate("a", grid=KARRAS, **pixels).images
    (stored,) = engine.generate("a", grid=spec, out=tmp_path / "run", **pixels).images
    assert stored.tobytes() == image.tobytes()
    spec = written(path, found, None)  # the model's own was the best
    assert torch.equal(engine.generate("a", sampler="unipc", grid=spec, **OPTIONS).latents, own)


def test_hosted_engines_look_it_up(made, tmp_path):
    engine, found, path = made
    spec, hosted = written(path, found, KARRAS), engine.as_hosted()
    right = hosted.generate("a", sampler="unipc", grid=KARRAS, **OPTIONS)
    result = hosted.generate("a", sampler="unipc", grid=spec, **OPTIONS)
    assert torch.equal(result.latents, right.latents) and result.config["grid"] == KARRAS
    own = hosted.generate("a", sampler="unipc", **OPTIONS)
    assert not torch.allclose(own.latents, right.latents, atol=1e-3)
    pixels = {"seeds": 1, "steps": 3, "guidance": RULE, "sampler": "unipc"}
    pixels["inputs"] = {"cross_attention_kwargs": {"scale": 1.0}}  # changes nothing
    (image,) = engine.generate("a", grid=KARRAS, **pixels).images
    (stored,) = engine.generate("a", grid=spec, out=tmp_path / "run", **pixels).images
    assert stored.tobytes() == image.tobytes()
    with pytest.raises(sampler.SamplerError, match="no grid for ddim at 3 steps"):
        hosted.generate("a", sampler="ddim", grid=spec, **OPTIONS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "ddim"}, "no grid for ddim at 3 steps with cfg 3; it has unipc at 3 steps"),
        ({"steps": 4}, "no grid for unipc at 4 steps"),
        ({"guidance": {"name": "cfg", "scale": 4.0}}, "no grid for unipc at 3 steps with cfg 4"),
    ],
)
def test_other_settings_are_refused(made, change, message):
    engine, found, path = made
    options = {**OPTIONS, "sampler": "unipc", "grid": written(path, found, KARRAS), **change}
    with pytest.raises(sampler.SamplerError, match=message):
        engine.generate("a", **options)


def test_other_models_files_and_places_are_refused(made, tmp_path):
    engine, found, path = made
    spec = written(path, found, KARRAS, model="another")
    with pytest.raises(sampler.SamplerError, match="is for model another, not"):
        engine.generate("a", sampler="unipc", grid=spec, **OPTIONS)
    with pytest.raises(sampler.SamplerError, match="not a readable calibration of grids"):
        grid_of(f"calibrated:{tmp_path / 'none.json'}", "m", "ddim", 3, RULE)
    drop = sampler.scheduler("unipc", engine.pipeline.pipe.scheduler)
    with pytest.raises(ValueError, match="give the grid that"):
        drop.schedule.grid(3, spacing=spec)
    with pytest.raises(ValueError, match="at least 4 prompts, not 3"):
        calibrate_grid(engine, ["a"] * 3, guidance=[RULE])


def test_every_candidate_is_a_grid(made):
    engine, _, _ = made
    for grid in CANDIDATES:
        assert len(engine.pipeline.with_grid(grid).grid(5, (32, 32))) == 6


def test_the_command(made, tmp_path, capsys):
    engine, _, _ = made
    (tmp_path / "prompts.txt").write_text("a\nb\nc\nd\n")
    engine.pipeline.pipe.save_pretrained(tmp_path / "model")
    arguments = ["calibrate", "grid", "--prompts", str(tmp_path / "prompts.txt"), "--scale", "3"]
    arguments += ["--model", str(tmp_path / "model"), "--steps", "2", "--sampler", "DPM++ 2M"]
    out = tmp_path / "grid.json"
    assert main([*arguments, "-o", str(out)]) == 0, capsys.readouterr().err
    (entry,) = json.loads(out.read_text())["entries"]
    assert entry["sampler"]["name"] == "dpmpp_2m" and entry["steps"] == 2
