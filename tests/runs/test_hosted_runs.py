"""Run folders of hosted pipelines: inputs in files, resuming, keys by content, replay."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

import sampler
from sampler.cli import main
from tests.guidance.stock_hosted import controlnet, half_mask, inpaint, picture

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    inpaint().save_pretrained(root / "inpaint")
    controlnet().save_pretrained(root / "controlnet")
    return root


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for k in range(3):
        picture(k).save(f"{k}.png")
    half_mask().save("mask.png")
    return tmp_path


def generate(*args):
    line = ["generate", *map(str, args), "--device", "cpu", "--steps", "3", "-q"]
    return main([*line, "--width", "32", "--height", "32"])


def rows(path, columns, count=3):
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["prompt", "seed", *columns])
        table.writeheader()
        for k in range(count):
            cells = {name: str(value).format(k=k) for name, value in columns.items()}
            table.writerow({"prompt": f"a fox {k}", "seed": k, **cells})


def pixels(path):
    return np.asarray(Image.open(path), dtype=int)


MASKED = {"input.image": "{k}.png", "input.mask_image": "mask.png", "input.strength": 0.9}


def test_a_table_of_inpaintings_is_resumed_and_equals_single_calls(models, pictures, capsys):
    rows("prompts.csv", MASKED)
    line = ("--prompts", "prompts.csv", "--model", models / "inpaint", "-o", "run")
    assert generate(*line, "--scale", "4") == 0
    made = sorted((pictures / "run").rglob("*.png"))
    assert len(made) == 3
    before = {path: path.read_bytes() for path in made}
    made[1].unlink()
    assert generate(*line, "--scale", "4") == 0
    assert {path: path.read_bytes() for path in made} == before
    engine = sampler.load(models / "inpaint", device="cpu")
    for k, path in enumerate(made):
        inputs = {"image": f"{k}.png", "mask_image": "mask.png", "strength": 0.9}
        alone = engine.generate(
            f"a fox {k}",
            seeds=k,
            steps=3,
            guidance={"name": "cfg", "scale": 4.0},
            inputs=inputs,
            height=32,
            width=32,
        )
        assert np.array_equal(pixels(path), np.asarray(alone.images[0], dtype=int))


def test_another_content_of_a_file_is_another_image(models, pictures):
    line = ("a fox", "--seed", 1, "--model", models / "controlnet", "-o")
    given = ("--input", "image=0.png", "--input", "controlnet_conditioning_scale=0.8")
    assert generate(*line, "one", *given) == 0
    keys = [
        json.loads(t)["key"] for t in (pictures / "one" / "jobs.jsonl").read_text().splitlines()
    ]
    picture(0).save("renamed.png")
    same = ("--input", "image=renamed.png", "--input", "controlnet_conditioning_scale=0.8")
    assert generate(*line, "two", *same) == 0
    picture(5).save("0.png")
    assert generate(*line, "one", *given) == 4  # another plan
    assert generate(*line, "three", *given) == 0
    found = {
        name: [
            json.loads(t)["key"] for t in (pictures / name / "jobs.jsonl").read_text().splitlines()
        ]
        for name in ("two", "three")
    }
    assert found["two"] == keys and found["three"] != keys


def test_a_file_that_changes_before_the_run_ends_is_told(models, pictures, capsys):
    given = ("--input", "image=0.png")
    line = ("a fox", "--seed", 1, "--model", models / "controlnet", "-o", "run", *given)
    assert generate(*line) == 0
    next((pictures / "run").rglob("*.png")).unlink()
    picture(5).save("0.png")
    capsys.readouterr()
    assert main(["resume", "run", "-q"]) == 3
    journal = "".join(p.read_text() for p in (pictures / "run").rglob("*.jsonl"))
    assert "content has changed" in journal


def test_replay_makes_the_same_file(models, pictures):
    line = ("a fox", "--seed", 1, "--model", models / "controlnet", "-o", "run")
    assert generate(*line, "--input", "image=0.png") == 0
    path = next((pictures / "run").rglob("*.png"))
    assert main(["replay", str(path), "-o", "again.png", "-q"]) == 0
    assert np.array_equal(pixels("again.png"), pixels(path))


def test_inputs_are_an_axis(models, pictures):
    line = ("a fox", "--model", models / "inpaint", "-o", "run", "--input", "image=0.png")
    axis = ("--input", "mask_image=mask.png", "--axis", "input.strength=0.4,1.0")
    assert generate(*line, *axis) == 0
    first, second = sorted((pictures / "run").rglob("*.png"))
    assert not np.array_equal(pixels(first), pixels(second))


def test_generate_in_python_writes_a_run_folder(pictures):
    engine = sampler.load(controlnet())
    inputs = {"image": ["0.png", "1.png"]}
    settings = {"seeds": [1, 2], "steps": 3, "height": 32, "width": 32, "inputs": inputs}
    stored = engine.generate(["a fox", "a dog"], out="run", **settings)
    plain = engine.generate(["a fox", "a dog"], **settings)
    for a, b in zip(stored.images, plain.images, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
    assert stored.nfe == plain.nfe
    with pytest.raises(sampler.SamplerError, match="can be recorded"):
        engine.generate("a", out="two", steps=3, inputs={"image": picture()})


WRONG = {
    "unknown": (("--input", "imaeg=0.png"), 2, "has no argument 'imaeg' (did you mean 'image'"),
    "reserved": (("--input", "num_inference_steps=3"), 2, "give steps instead"),
    "missing": (("--input", "image=nowhere.png"), 2, "image: nowhere.png: no such file"),
    "form": (("--input", "image"), 2, "--input takes NAME=VALUE"),
    "twice": (("--input", "image=0.png", "--input", "image=1.png"), 2, "given twice"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("dry", [(), ("--dry-run", "--sampler", "ddim", "--guidance", "cfg")])
def test_wrong_inputs_are_one_sentence(models, pictures, capsys, name, dry):
    options, code, words = WRONG[name]
    found = generate("a fox", "--model", models / "controlnet", "-o", "run", *options, *dry)
    error = capsys.readouterr().err
    assert (found, error.count("\n")) == (code, 1) and words in error
    assert not (pictures / "run").exists()
