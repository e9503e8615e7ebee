"""Paths are paths: ~, #, links; and a run goes on from any directory, also after it has moved."""

import json
import os
import shutil

import pytest

from sampler.bundled import FOLDER
from sampler.cli import main
from sampler.config.model import ModelConfig
from sampler.runs.relocation import MODEL_PATHS, WEIGHTED_PATHS

LINE = ("generate", "a fox", "a dog", "--seed", "1", "--steps", "2", "--batch-size", "1")


def run(capsys, *arguments):
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def images(folder):
    return {path.name: path.read_bytes() for path in (folder / "images").iterdir()}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home, and a working directory elsewhere."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def test_the_users_folder_is_found_wherever_a_path_is_given(capsys, home, tmp_path, monkeypatch):
    (home / "p.txt").write_text("a fox\n")
    (home / "cards").mkdir()
    (home / "cards" / "animal.txt").write_text("fox\n")
    short = ("--steps", 1, "--seed", 1, "-q")
    (home / "c.yaml").write_text("run: {steps: 1}\noutput: {dir: ~/yaml}\nprompts: {file: ~/p.txt}")
    assert run(capsys, "generate", "a fox", "--out=~/option", *short)[0] == 0
    assert run(capsys, "generate", "--config=~/c.yaml")[0] == 0
    assert run(capsys, "generate", "--prompts=~/p.txt", "--set", "output.dir=~/set", *short)[0] == 0
    monkeypatch.setenv("SAMPLER_OUT", "~/environment")
    wild = ("--wildcards=~/cards", "--expand", "all")
    assert run(capsys, "generate", "a __animal__", *wild, *short)[0] == 0
    for name in ("option", "yaml", "set", "environment"):
        assert len(images(home / name)) == 1, name
    code, out, _ = run(capsys, "export", "~/option", "--to", "csv", "--out=~/table.csv")
    assert code == 0 and (home / "table.csv").is_file()
    for command in ("verify", "show", "gallery", "grid"):
        assert run(capsys, command, "~/option")[0] == 0, command
    image = f"~/option/images/{next(iter(images(home / 'option')))}"
    assert run(capsys, "replay", image, "--out=~/again.png")[0] == 0
    assert (home / "again.png").is_file()
    assert os.listdir(tmp_path / "work") == [], "no folder is called ~"


def test_paths_may_hold_a_number_sign(capsys, tmp_path):
    code, out, _ = run(capsys, *LINE, "-o", "run #1")
    image, key = out.splitlines()[0], out.splitlines()[0].rpartition("-")[2][:8]
    assert code == 0 and image.startswith("run #1/images/")
    for what in (image, f"run #1#{key}", "run #1#0"):
        code, text, err = run(capsys, "show", what)
        assert code == 0 and json.loads(text)["key"].startswith(key), err
        code, _, err = run(capsys, "replay", what, "-o", "again.png")
        assert code == 0 and "no pixel differs" in err
        os.unlink("again.png")
    assert run(capsys, "show", "run #1")[1].count("\n") == 2


def test_a_run_folder_may_be_a_link(capsys, tmp_path):
    (tmp_path / "disk").mkdir()
    os.symlink(tmp_path / "disk", "link")
    os.symlink(tmp_path / "new", "dangling")
    for link, there in (("link", "disk"), ("dangling", "new")):
        code, out, err = run(capsys, *LINE, "-o", link)
        assert code == 0, err
        assert sorted(out.splitlines()) == [
            f"{tmp_path}/{there}/images/{name}" for name in sorted(images(tmp_path / there))
        ]
        assert run(capsys, "verify", link)[0] == 0


def test_a_link_inside_a_run_folder_is_refused(capsys, tmp_path):
    (tmp_path / "work" / "run").mkdir()
    (tmp_path / "outside").mkdir()
    os.symlink(tmp_path / "outside", "run/images")
    code, _, err = run(capsys, *LINE, "-o", "run")
    assert code == 5 and "symbolic link inside a run folder" in err
    assert os.listdir(tmp_path / "outside") == []


@pytest.fixture
def project(capsys, tmp_path, monkeypatch):
    """A run with a model and a calibration beside it, all named relative to the directory."""
    folder = tmp_path / "project"
    shutil.copytree(FOLDER / "pipeline", folder / "models" / "small")
    monkeypatch.chdir(folder)
    line = (*LINE, "--model", "models/small", "-o", "runs/foxes")
    assert run(capsys, *line)[0] == 0
    return folder


def lose_one(folder):
    """Remove an image and return those that the run had."""
    before = images(folder)
    (folder / "images" / sorted(before)[0]).unlink()
    return before


def test_a_run_goes_on_from_any_directory(capsys, project, tmp_path, monkeypatch):
    before = lose_one(project / "runs/foxes")
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "resume", "project/runs/foxes")
    assert code == 0, err
    assert images(project / "runs/foxes") == before
    code, _, err = run(capsys, "replay", "project/runs/foxes#0", "-o", "again.png")
    assert code == 0 and "no pixel differs" in err


def test_a_run_goes_on_where_it_was_moved_with_its_model(capsys, project, tmp_path, monkeypatch):
    before = lose_one(project / "runs/foxes")
    project.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "resume", "elsewhere/runs/foxes")
    assert code == 0, err
    assert images(tmp_path / "elsewhere/runs/foxes") == before


def test_a_run_goes_on_where_it_was_moved_alone(capsys, project, tmp_path, monkeypatch):
    before = lose_one(project / "runs/foxes")
    shutil.move(project / "runs/foxes", tmp_path / "alone")
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "resume", "alone")
    assert code == 0, err
    assert images(tmp_path / "alone") == before
    lose_one(tmp_path / "alone")
    (project / "models").rename(tmp_path / "weights")
    code, _, err = run(capsys, "resume", "alone")
    assert code == 6 and "models/small" in err, "it is nowhere"
    code, _, err = run(capsys, "resume", "alone", "--model", "weights/small")
    assert code == 0 and images(tmp_path / "alone") == before


def test_files_of_strategies_are_found_again(capsys, tmp_path, monkeypatch):
    from PIL import Image

    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    Image.new("RGB", (64, 64), "red").save("input.png")
    spec = "{name: reddiff, operator: {name: denoise}, space: image, y: input.png}"
    code, _, err = run(capsys, *LINE, "--set", f"sampler={spec}", "-o", "run")
    assert code == 0, err
    before = lose_one(project / "run")
    project.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "resume", "elsewhere/run")
    assert code == 0, err
    assert images(tmp_path / "elsewhere/run") == before


def test_every_file_of_a_model_is_looked_for():
    from dataclasses import fields

    files = {f.name for f in fields(ModelConfig) if f.metadata["identity"] == "files"}
    assert files - {"revision", "variant"} == {*MODEL_PATHS, *WEIGHTED_PATHS, "controlnet"}
