"""The page of the studies says what their files hold; the measures of the inverse study."""

import csv
import shutil

import pytest
import torch

from scripts.study import samplers_tables
from scripts.study.samplers_inverse import best_setting
from scripts.study.samplers_restore import METHODS, name_of, psnr
from tests.samplers.golden import FOLDER

DOCS = FOLDER.parents[2] / "docs"


def stored(study):
    name = study if study.startswith("restore") else f"samplers_{study}"
    path = DOCS / "figures" / f"{name}.csv"
    return list(csv.DictReader(path.open(encoding="utf-8"))) if path.exists() else []


def test_the_tables_of_the_page_are_those_of_the_files(tmp_path):
    (tmp_path / "howto").mkdir()
    for name in samplers_tables.TABLES:
        shutil.copy(DOCS / name, tmp_path / name)
    samplers_tables.write(tmp_path, stored)
    for name in samplers_tables.TABLES:
        assert (tmp_path / name).read_text() == (DOCS / name).read_text()
    (tmp_path / "samplers.md").write_text("<!-- table: none -->\n<!-- end of table -->")
    with pytest.raises(ValueError, match="markers for"):
        samplers_tables.write(tmp_path, stored)


def test_measures():
    g = torch.Generator().manual_seed(0)
    a = torch.rand(2, 3, 32, 32, generator=g)
    assert torch.allclose(
        psnr(a, a + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)), torch.tensor([20.0, 40.0])
    )


def test_the_best_setting_is_of_its_task_and_method():
    rows = [
        {"task": task, "method": "dps", "setting": name_of(setting), "psnr": str(sign * value)}
        for task, sign in (("hdr", 1), ("phase", -1))
        for value, setting in enumerate(METHODS["dps"])
    ]
    assert best_setting(rows, "hdr", "dps") == METHODS["dps"][-1]
    assert best_setting(rows, "phase", "dps") == METHODS["dps"][0]
    assert best_setting([], "hdr", "pseudo-inverse") == {}
    with pytest.raises(ValueError, match="not tuned yet"):
        best_setting(rows[:1], "hdr", "dps")
