"""f-distill and its students on the command line."""

import json
from pathlib import Path

import pytest
from PIL import Image

import sampler
from sampler.cli import main

FIT = ["fit.steps=1", "fit.batch=1", "fit.sampler=ddim", "trainer.samples=1"]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A student of the bundled model after three updates, by the command."""
    folder = tmp_path_factory.mktemp("student")
    (folder / "a.txt").write_text("a dog on a green background\n")
    sets = [part for value in [*FIT, "trainer.student_every=2"] for part in ("--set", value)]
    call = ["finetune", "--trainer", "f_distill", "--prompts", str(folder / "a.txt"), *sets]
    assert main([*call, "--updates", "3", "-o", str(folder / "run"), "-q"]) == 0
    return folder / "run"


def images(out):
    return sorted(path for path in Path(out).rglob("*.png") if "sheet" not in path.name)


def test_no_reward_is_asked_for_and_the_student_is_told(student, capsys):
    call = ["finetune", "--trainer", "f_distill", "--prompts", str(student.parent / "a.txt")]
    sets = [part for value in [*FIT, "trainer.student_every=2"] for part in ("--set", value)]
    assert main([*call, *sets, "--updates", "3", "-o", str(student)]) == 0
    assert capsys.readouterr().out.strip() == str(student / "student")
    log = [json.loads(line) for line in (student / "log.jsonl").read_text().splitlines()]
    assert "loss_fake_score" in log[0] and "loss_distill" in log[1] and "reward" not in log[0]


def test_progress_has_a_line_per_update(tmp_path, student, capsys):
    call = ["finetune", "--trainer", "f_distill", "--prompts", str(student.parent / "a.txt")]
    sets = [part for value in [*FIT, "trainer.student_every=2"] for part in ("--set", value)]
    assert main([*call, *sets, "--updates", "2", "-o", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[:2] for line in lines] == [["1/2", "loss"], ["2/2", "loss"]]


def test_generate_with_a_student(student, tmp_path, capsys, monkeypatch):
    """Sampler, rule and number of steps are the student's own; the image is Python's."""
    call = ["generate", "a dog on a green background", "--seed", "5", "--student", str(student)]
    assert main([*call, "-o", str(tmp_path / "one"), "-q"]) == 0
    engine = sampler.load(student=student)
    made = engine.generate("a dog on a green background", seeds=5, steps=1)
    (path,) = images(tmp_path / "one")
    assert list(Image.open(path).getdata()) == list(made.images[0].getdata())
    assert made.nfe == [1]
    assert main(["resume", str(tmp_path / "one"), "-q"]) == 0
    assert main(["verify", str(tmp_path / "one"), "-q"]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["replay", str(path), "-q"]) == 0  # its run folder knows the student
    alone = path.rename(tmp_path / "alone.png")
    assert main(["replay", str(alone), "-o", "again.png"]) == 6
    assert "generated with the option student" in capsys.readouterr().err


def test_the_rule_by_name_without_a_student_says_how_to_make_one(tmp_path, capsys):
    call = ["generate", "a dog", "--guidance", "student", "--steps", "1", "-o", str(tmp_path)]
    assert main([*call, "--sampler", "consistency"]) != 0
    error = capsys.readouterr().err
    assert "sampler finetune --trainer f_distill" in error and "--student DIR" in error


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--set", "guidance.scale=7.5"], "inside the weights: cfg at scale 3"),
        (["--negative", "a cat"], "inside the weights: cfg at scale 3"),
        (["--lora", "somewhere"], "drop one"),
    ],
)
def test_refusals_name_the_baked_scale(student, tmp_path, capsys, options, problem):
    call = ["generate", "a dog", "--student", str(student), "-o", str(tmp_path / "out")]
    assert main([*call, *options]) != 0
    assert problem in capsys.readouterr().err


def test_another_student_is_another_model(student, tmp_path, capsys):
    """A run folder is not added to when the student's files have changed."""
    import shutil

    copy = tmp_path / "student"
    shutil.copytree(student / "student", copy)
    call = ["generate", "a dog", "--seed", "1", "--student", str(copy), "-o", str(tmp_path / "o")]
    assert main([*call, "-q"]) == 0
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "updates": 99}))
    assert main([*call, "-q"]) == 4
    assert "another" in capsys.readouterr().err
