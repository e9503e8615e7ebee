"""The distillation script on drawn shapes, and the cost script's table."""

import json

import pytest
import torch
from distill_student import app, neighbours
from emoji_data import draw_sprites
from study_fdistill import _cost_table, _mixture_table
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    return draw_sprites(tmp_path_factory.mktemp("shapes") / "sprites.npz")


def call(*arguments):
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_train_pauses_goes_on_and_is_measured(sprites, tmp_path):
    out = tmp_path / "run"
    few = ["--updates", 4, "--warmup", 1, "--pairs", 2, "--images", 64, "--every", 2]
    train = ["train", "--data", sprites, "--out", out, *few]
    assert "paused" in call(*train, "--minutes", 0)
    assert not (out / "student").exists()
    assert "paused" not in call(*train)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [r["update"] for r in log if r["kind"] == "update"] == [1, 2, 3, 4]
    assert json.loads((out / "student" / "manifest.json").read_text())["f"] == "js"
    measured = ["report", "--student", out, "--data", sprites, "--out", out / "report"]
    call(*measured, "--count", 8)
    rows = json.loads((out / "report" / "report.json").read_text())
    assert [row["of"] for row in rows][:2] == ["student", "teacher, 1 steps"] and len(rows) == 5
    assert all(0 <= row["coverage"] <= 1 and row["seconds"] > 0 for row in rows)
    assert (out / "report" / "student.png").is_file()


def test_neighbours_see_modes_that_are_missing():
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(100, 4, generator=g), torch.randn(100, 4, generator=g) + 20
    real, again = torch.cat([left, right]), torch.randn(200, 4, generator=g)
    whole = torch.cat([again[:100], again[100:] + 20])
    half = neighbours(real, again)
    assert half["coverage"] == pytest.approx(0.5, abs=0.05) and half["recall"] < 0.55
    both = neighbours(real, whole)
    assert both["coverage"] > 0.9 and both["recall"] > 0.7


def test_the_tables_of_the_page_are_those_of_the_files():
    from study_fdistill import ROOT

    page = (ROOT / "docs" / "f_distill.md").read_text()
    assert _mixture_table() in page and _cost_table() in page
