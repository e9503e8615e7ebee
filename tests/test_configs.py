"""Every recipe in configs/ runs on the bundled model; steps, images and prompts are cut here."""

import os
from pathlib import Path

import pytest

from sampler.cli import main
from sampler.config.layers import read_file, resolve
from sampler.runs.metadata import read_record

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(recipe, tmp_path, capsys):
    config = resolve([read_file(recipe)], [], [])
    assert recipe.read_text().startswith("# "), "a recipe says in its first line what it is for"
    assert config.version == 1 and (config.prompts.file or config.prompts.texts)
    arguments = ["generate", "a red apple on a blue background", "-c", str(recipe), "-q"]
    code = main([*arguments, "-o", str(tmp_path), "--steps", "5", "-n", "1"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    (name,) = os.listdir(tmp_path / "images")
    record = read_record((tmp_path / "images" / name).read_bytes())["record"]
    assert record["sampler"]["name"] == _name(config.sampler or "ddim")
    assert record["guidance"]["name"] == _name(config.guidance or "cfg")


def _name(spec):
    return spec if isinstance(spec, str) else spec["name"]
