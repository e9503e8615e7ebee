"""The distillation script on drawn shapes, and the cost script's table."""

import json

import pytest
import torch
from typer.testing import CliRunner

import sampler
from sampler import bundled
from sampler.pipelines.stable_diffusion import scale_embedding
from scripts.bundled import distill_student
from scripts.bundled.distill_student import app, few_step_network
from scripts.bundled.emoji_data import draw_sprites
from scripts.study import four_steps
from scripts.study import students as study_students
from scripts.study.fdistill import _cost_table, _mixture_table
from scripts.study.students import neighbours

FIGURES = ("rows", "concept", "frechet_distance", "recall")


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    return draw_sprites(tmp_path_factory.mktemp("shapes") / "sprites.npz")


def call(*arguments):
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_train_pauses_goes_on_and_is_packed(sprites, tmp_path, monkeypatch):
    monkeypatch.setattr(distill_student, "prompts", lambda count: bundled.prompts(2))
    out = tmp_path / "run"
    few = ["--updates", 4, "--warmup", 1, "--pairs", 2, "--images", 64, "--every", 2, "--batch", 4]
    train = ["train", "--data", sprites, "--out", out, *few]
    assert "paused" in call(*train, "--minutes", 0)
    assert not (out / "student").exists()
    assert "paused" not in call(*train)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [r["update"] for r in log if r["kind"] == "update"] == [1, 2, 3, 4]
    call("pack", "--out", out)
    whole, stored = (sampler.load(student=out / name) for name in ("student", "packed"))
    manifest = dict(stored.pipeline.student)
    assert manifest["f"] == "js" and manifest["form"] == "difference"
    assert str(tmp_path) not in json.dumps(manifest)
    ours, exact, begun = (
        engine.pipeline.networks[name].conv_in.weight
        for engine, name in ((stored, "student"), (whole, "student"), (whole, "main"))
    )
    assert 0 < (ours - exact).abs().max() < 0.005 * (exact - begun).abs().max()


def test_the_few_step_network_is_the_few_step_student_at_one_scale():
    teacher, lcm = (sampler.load(name).pipeline.network for name in ("bundled", "bundled-lcm"))
    g = torch.Generator().manual_seed(0)
    x, context = (torch.randn(size, generator=g) for size in ((2, 4, 16, 16), (2, 16, 128)))
    told = scale_embedding(torch.tensor([3.0, 3.0]), 256)
    with torch.no_grad():
        ours = few_step_network(teacher)(x, 999, context).sample
        theirs = lcm(x, 999, context, timestep_cond=told).sample
        other = lcm(x, 999, context, timestep_cond=scale_embedding(torch.ones(2), 256)).sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - other).abs().max() > 1e-2


def test_students_are_measured_once(sprites, tmp_path, monkeypatch):
    """The way of making images alone is replaced: one student, one teacher, few images."""

    def few(runs):
        yield "student", {"f": "js"}, sampler.load(), {"steps": 1}
        yield study_students.TEACHER, {}, sampler.load(), {"steps": 2, **study_students.CFG}

    monkeypatch.setattr(study_students, "cases", few)
    out = tmp_path / "students.csv"
    options = [str(tmp_path), "--data", str(sprites), "--count", "8", "--out", str(out)]
    for _ in range(2):
        done = CliRunner().invoke(study_students.app, ["measure", *options], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    rows = study_students.read(out)
    assert [(row["of"], row["rows"]) for row in rows] == [
        ("student", "2"),
        (study_students.TEACHER, "4"),
    ]
    assert all(0 <= float(row["coverage"]) <= 1 and float(row["cpu_seconds"]) > 0 for row in rows)


def test_students_of_four_steps_are_trained_collected_and_tabled(tmp_path, monkeypatch):
    """One case, shortened; the teacher's scores are of the same prompts."""
    for name, value in {"UPDATES": 2, "HELD": 3}.items():
        monkeypatch.setattr(four_steps, name, value)
    monkeypatch.setitem(four_steps.CASES, "own-lora-apg", {**four_steps.OWN, **four_steps.LORA})
    train = ["train", "--out", str(tmp_path), "--case", "own-lora-apg", "--longer", "2"]
    for _ in range(2):  # the second time there is nothing left to do
        done = CliRunner().invoke(four_steps.app, train, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "own-lora-apg-0" / "student" / "manifest.json").read_text())
    assert manifest["trajectory"] == "own" and manifest["updates"] == 4
    assert manifest["baked_guidance"]["name"] == "apg"
    to = tmp_path / "found.csv"
    collect = ["collect", "--out", str(tmp_path), "--to", str(to)]
    assert CliRunner().invoke(four_steps.app, collect, catch_exceptions=False).exit_code == 0
    rows = study_students.read(to)
    assert [row["update"] for row in rows] == ["0", "2", "4"]
    assert len({row["teacher_saturation"] for row in rows}) == 1
    lines = four_steps.table(to).splitlines()[2:]
    assert [line.split("|")[2].strip() for line in lines] == ["0", "2", "4"]
    assert "accuracy" in lines[1] and "drift" not in lines[1] and "drift" in lines[2]
    page = tmp_path / "page.md"
    page.write_text("## What it costs\n", encoding="utf-8")
    monkeypatch.setattr(four_steps, "PAGE", page)
    monkeypatch.setattr(four_steps, "table", lambda path=to, table=four_steps.table: table(path))
    for _ in range(2):
        assert CliRunner().invoke(four_steps.app, ["document"]).exit_code == 0
        assert page.read_text(encoding="utf-8").count("## ") == 2
    assert four_steps.table() in page.read_text(encoding="utf-8")


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
    from scripts.study.fdistill import ROOT

    page = (ROOT / "docs" / "f_distill.md").read_text()
    assert _mixture_table() in page and _cost_table() in page
    assert study_students.table() in page
    assert not four_steps.CSV.is_file() or four_steps.table() in page


def test_what_the_page_says_of_the_students_is_in_the_file():
    rows = {row["of"]: {k: float(row[k]) for k in FIGURES} for row in study_students.read()}
    for seed in range(3):
        js, rkl = (rows[f"{f}, seed {seed}"] for f in ("js", "rkl"))
        assert rkl["concept"] > js["concept"] and rkl["recall"] > js["recall"]
        assert rkl["frechet_distance"] < js["frechet_distance"]
    teacher, begun = rows[study_students.TEACHER], rows["where they start, 1 step"]
    two, four = (rows[f"teacher, {n} steps"] for n in (2, 4))
    students = [row for of, row in rows.items() if "seed" in of or of == study_students.SHIPPED]
    assert len(students) == 9
    for row in students:
        assert row["rows"] == 1 and teacher["rows"] == 40
        assert row["concept"] > max(two["concept"], begun["concept"], 0.9 * teacher["concept"])
        assert row["frechet_distance"] < two["frechet_distance"]
        assert row["concept"] < four["concept"]
        assert row["frechet_distance"] > max(four["frechet_distance"], begun["frechet_distance"])
        assert row["recall"] > begun["recall"]
        assert row["concept"] < rows[study_students.BEGIN]["concept"]
