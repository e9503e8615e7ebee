"""The walk of a new user, shortened: a table with settings per row, killed three times, resumed,
looked at, one image made again, and a sweep as a labelled grid. The bundled model, real commands.
"""

import csv
import re
from pathlib import Path

import pytest
from PIL import Image

from sampler import bundled
from sampler.cli import main
from tests.runs.stub import pictures
from tests.runs.test_hosted_kill import killed_at_rename

SETTINGS = [
    {"guidance": "cfg", "scale": 3, "sampler": "ddim"},
    {"guidance": "apg", "scale": 7, "sampler": "dpmpp_2m"},
    {"guidance": "none", "scale": "", "sampler": "ab"},
]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("walk") / "prompts.csv"
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(
            stream, ["prompt", "seed", "steps", "guidance", "scale", "sampler", "tag", "meta_id"]
        )
        writer.writeheader()
        for k, prompt in enumerate(bundled.prompts(24)):
            own = {"prompt": prompt.text, "seed": k, "steps": 2 + k % 2, "tag": f"set {k % 3}"}
            writer.writerow({**own, **SETTINGS[k % 3], "meta_id": f"row-{k}"})
    return path


def generate(table, where):
    return main(["generate", "--prompts", str(table), "--batch-size", "2", "-q", "-o", str(where)])


@pytest.fixture(scope="module")
def run(table):
    """The folder of a run that was killed three times, and resumed."""
    where = table.parent / "run"
    assert generate(table, table.parent / "whole") == 0
    for number in (9, 5, 5):  # the first ones are those of the plan
        assert killed_at_rename(lambda: generate(table, where), number)
    assert 0 < len(pictures(where)) < 24
    assert main(["resume", str(where), "-q"]) == 0
    return where


def test_killed_three_times_it_is_as_if_never_killed(run, table):
    assert pictures(run) == pictures(table.parent / "whole") and len(pictures(run)) == 24
    assert main(["verify", str(run), "-q"]) == 0


def test_its_gallery_shows_every_row(run, capsys):
    assert main(["gallery", str(run)]) == 0
    page = Path(capsys.readouterr().out.strip()).read_text(encoding="utf-8")
    assert page.count("<article") == 24 and "<script" not in page
    assert all(f"set {k}" in page for k in range(3)) and "row-23" in page


def test_an_image_is_made_again_bit_equal(run, tmp_path):
    name = sorted(pictures(run))[5]
    key = name.partition("-")[2].partition(".")[0]
    again = tmp_path / "again.png"
    assert main(["replay", f"{run}#{key}", "-o", str(again), "-q"]) == 0
    assert again.read_bytes() == pictures(run)[name]


def test_a_sweep_is_a_labelled_grid(tmp_path, capsys):
    where = tmp_path / "sweep"
    axes = ["--axis", "guidance=cfg,apg", "--axis", "scale=1,3,7"]
    prompt = "a red apple on a blue background"
    assert main(["sweep", prompt, *axes, "--steps", "2", "-q", "-o", str(where)]) == 0
    capsys.readouterr()
    assert main(["grid", str(where), "--x", "scale", "--y", "guidance"]) == 0
    (sheet,) = capsys.readouterr().out.split()
    with Image.open(sheet) as image:
        assert image.width > image.height > 2 * 128 and image.width > 3 * 128
    assert re.fullmatch(r"000\.png", Path(sheet).name)
