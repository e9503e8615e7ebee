"""`sampler restore`: files and folders of images as runs, with means and maps of the spread."""

import json
import shutil

import numpy as np
import pytest
from matplotlib import cbook
from PIL import Image

from sampler.cli import main
from sampler.runs.restored import WHITE

SMALL = "configs/images/apple_small.png"
FAST = ["--task", "superres", "--steps", "2", "-n", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two images of different sizes, and their finished run."""
    where = tmp_path_factory.mktemp("restore")
    images = where / "images"
    images.mkdir()
    Image.open(SMALL).convert("RGB").save(images / "apple.png")
    Image.new("RGB", (8, 16), (90, 120, 40)).save(images / "green.jpg")
    (images / "notes.txt").write_text("no image")
    assert main(["restore", str(images), *FAST, "--noise", "0.1", "-o", str(where / "run")]) == 0
    return where


def pixels(path):
    return np.asarray(Image.open(path), dtype=float) / 255


def test_every_image_of_a_folder_is_restored_with_its_mean_and_spread(folder):
    run = folder / "run"
    names = sorted(path.name for path in (run / "images").iterdir())
    sizes = [Image.open(run / "images" / name).size for name in names]
    assert sizes == [(64, 64), (64, 64), (32, 64), (32, 64)]
    plan = json.loads((run / "plan.json").read_text())
    assert [group["sampler"]["name"] for group in plan["groups"]] == ["daps", "daps"]
    assert {group["guidance"]["name"] for group in plan["groups"]} == {"none"}
    assert [group["sampler"]["y"].split("/")[-1] for group in plan["groups"]] == [
        "apple.png",
        "green.jpg",
    ]
    pair = np.stack([pixels(run / "images" / name) for name in names[:2]])
    mean, std = (pixels(run / f"restored/000000_apple_{kind}.png") for kind in ("mean", "std"))
    assert np.abs(mean - pair.mean(0)).max() <= 0.5 / 255 + 1e-9
    spread = np.sqrt(pair.var(0, ddof=1).mean(-1)) / WHITE
    assert np.abs(std - spread.clip(0, 1)).max() <= 0.5 / 255 + 1e-9
    assert std.ndim == 2 and 0 < std.mean() < 1


def test_a_run_goes_on_and_is_the_same(folder, capsys):
    lost = next((folder / "run" / "images").iterdir())
    before = pixels(lost)
    lost.unlink()
    capsys.readouterr()
    arguments = ["restore", str(folder / "images"), *FAST, "--noise", "0.1"]
    assert main([*arguments, "-o", str(folder / "run")]) == 0
    assert np.array_equal(pixels(lost), before)
    out = capsys.readouterr().out
    assert "restored/000001_green_std.png" in out and out.count("images/") >= 4


def test_resume_draws_means_and_spreads_as_well(folder, capsys):
    """Of a run that was stopped before them, and of images that were made again."""
    drawn = folder / "run" / "restored"
    before = {path.name: path.read_bytes() for path in drawn.iterdir()}
    shutil.rmtree(drawn)
    next((folder / "run" / "images").iterdir()).unlink()
    capsys.readouterr()
    assert main(["resume", str(folder / "run")]) == 0
    assert {path.name: path.read_bytes() for path in drawn.iterdir()} == before
    assert capsys.readouterr().out.count("/restored/") == len(before) == 4


def test_a_run_that_restores_nothing_has_no_means(tmp_path):
    given = ["generate", "a dog", "--task", "superres", "--image", SMALL, "--steps", "1", "-n", "2"]
    assert main([*given, "-o", str(tmp_path / "run")]) == 0
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert not (tmp_path / "run" / "restored").exists()


def test_the_rule_data_has_its_means_too(tmp_path):
    given = ["restore", SMALL, *FAST, "--method", "data", "--noise", "0.1"]
    assert main([*given, "-o", str(tmp_path / "run")]) == 0
    names = {path.name for path in (tmp_path / "run" / "restored").iterdir()}
    assert names == {"000000_apple_small_mean.png", "000000_apple_small_std.png"}


def test_a_photograph(tmp_path):
    """The path from a real photograph of a face, cropped and made small, to its restorations.

    Grace Hopper by James S. Davis, US Navy: public domain, in matplotlib's sample data. The bundled
    model has seen no face, so what is asked is that the restorations fit the photograph.
    """
    source = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    face = Image.open(source).convert("RGB").crop((130, 40, 386, 296))
    face.resize((16, 16), Image.Resampling.BOX).save(tmp_path / "small.png")
    arguments = ["--task", "superres", "--noise", "0.05", "--steps", "3", "-n", "2"]
    out = tmp_path / "run"
    assert main(["restore", str(tmp_path / "small.png"), *arguments, "-o", str(out)]) == 0
    given = pixels(tmp_path / "small.png")
    for path in (out / "images").iterdir():
        seen = pixels(path).reshape(16, 4, 16, 4, 3).mean((1, 3))
        assert np.sqrt(((seen - given) ** 2).mean()) < 0.1 < given.std()


def test_difface_says_what_is_left_of_the_error(tmp_path, capsys):
    command = ["restore", SMALL, *FAST, "--method", "difface", "--strength", "0.5"]
    assert main([*command, "-o", str(tmp_path / "run")]) == 0
    assert "of the restorer's squared error remains" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["none.png", "--task", "deblur"], "none.png"),
        (["in.png", "--task", "blur"], "is not one of"),
        (["in.png", "--task", "inpaint"], "--mask FILE goes with"),
        (["in.png", "--task", "inpaint", "--mask", "small.png"], "--mask is 16 x 16"),
        (["in.png", "--task", "deblur", "--method", "dapps"], "Unknown method 'dapps'"),
        (["in.png", "--task", "deblur", "--method", "data"], "needs noise, such as 0.05"),
        (["in.png", "--task", "deblur", "--noise", "0"], "must be above 0"),
        (["in.png", "--task", "deblur", "-n", "0"], "-n"),
        (["in.png", "--task", "deblur", "--restorer", "bicubic"], "belong to the method 'difface'"),
        (["empty", "--task", "deblur"], "holds no image"),
        (
            ["in.png", "--task", "deblur", "--method", "difface", "--restorer", "os:getcwd"],
            "restorer = 'os:getcwd' must be",
        ),
    ],
)
def test_bad_input_is_one_sentence(arguments, part, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("in.png")
    Image.new("L", (16, 16)).save("small.png")
    (tmp_path / "empty").mkdir()
    assert main(["restore", *arguments, "-o", "out"]) == 2
    told = capsys.readouterr().err
    assert part in told and "Traceback" not in told
    assert not (tmp_path / "out").exists()
